// The explorer. Everything that comes from text or model is put into the page as text, never as HTML. The address keeps
// the text and the edits, so that it can be sent to a colleague who explores the same run.
"use strict";
const at = id => document.getElementById(id);
const state = { text: "", edits: [], read: null, latent: null, token: null, listed: () => showAll() };
let hasPages = false;

function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const line = text => text.replaceAll("\n", "\u21b5");

async function ask(what, content) {
  const status = at("status");
  status.className = "";
  status.textContent = "\u2026";
  const began = performance.now();
  try {
    const answer = await fetch("/" + what, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(content) });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    status.textContent = `${((performance.now() - began) / 1000).toFixed(1)} s`;
    return found;
  } catch (error) {
    status.className = "error";
    status.textContent = error.message === "Failed to fetch" ? "the server does not answer; start it again" : error.message;
    throw error;
  }
}
const quietly = action => () => action().catch(() => {});

function remember() {
  history.replaceState(null, "", "#" + encodeURIComponent(JSON.stringify({ text: state.text, edits: state.edits })));
}

async function read() {
  const text = at("text").value;
  const found = await ask("annotate", { text });
  Object.assign(state, { text, read: found, token: null, latent: null });
  remember();
  for (const id of ["tokens", "reading", "acting"]) at(id).hidden = false;
  at("written").replaceChildren();
  showTokens();
  showAll();
}

// Shaded by the chosen latent or, without one, by the largest activation on each token.
function showTokens() {
  const value = fires => Math.max(0, ...fires.filter(([i]) => state.latent === null || i === state.latent).map(f => f[1]));
  const values = state.read.fires.map(value), most = Math.max(...values, 1e-9);
  at("tokens").replaceChildren(...state.read.tokens.map((token, n) => {
    const span = make("span", { textContent: token, className: n === state.token ? "chosen" : "", tabIndex: 0, role: "button" });
    if (values[n]) { span.style.background = `rgba(var(--mark), ${0.08 + 0.6 * values[n] / most})`; span.title = values[n].toPrecision(3); }
    span.onclick = () => chooseToken(n);
    span.onkeydown = event => event.key === "Enter" && chooseToken(n);
    return span;
  }));
}

function rows(title, latents) {
  at("listed").textContent = title;
  at("latents").replaceChildren(...latents.map(({ latent, value, label }) => {
    const edit = make("button", { textContent: "edit", title: `edit latent ${latent}` });
    edit.onclick = event => { event.stopPropagation(); addEdit(latent); };
    const name = hasPages ? make("a", { href: `/features/index.html#latent/${latent}`, textContent: latent }) : make("span", { textContent: latent });
    const row = make("div", { className: "row" + (latent === state.latent ? " chosen" : ""), tabIndex: 0 }, name, make("span", { className: "label", textContent: line(label), title: label }), make("span", { className: "value", textContent: value }), edit);
    row.onclick = event => { if (event.target.tagName !== "A") chooseLatent(latent); };
    row.onkeydown = event => event.key === "Enter" && event.target === row && chooseLatent(latent);
    return row;
  }));
}
function showAll() {
  state.listed = showAll;
  rows(`Latents of this text, of ${Object.keys(state.read.labels).length} that fire`, state.read.latents.map(l => ({ ...l, label: state.read.labels[l.latent], value: l.largest.toPrecision(3) })));
}
function showToken() {
  state.listed = showToken;
  const fires = state.read.fires[state.token], out = state.read.left_out.includes(state.token);
  rows(`Latents on \u201c${line(state.read.tokens[state.token])}\u201d${out ? ": none; training left this position out" : fires.length ? "" : ": none"}`,
    fires.map(([latent, value]) => ({ latent, label: state.read.labels[latent], value: value.toPrecision(3) })));
}
function chooseToken(n) { state.token = state.token === n ? null : n; showTokens(); if (state.token === null) showAll(); else showToken(); }
function chooseLatent(i) { state.latent = state.latent === i ? null : i; showTokens(); state.listed(); }

function addEdit(latent) { state.edits.push({ latent, how: "ablate", amount: 0 }); showEdits(); }
function showEdits() {
  remember();
  at("edits").replaceChildren(...state.edits.map((edit, n) => {
    const how = make("select", { ariaLabel: "what to do" }, ...[["ablate", "switch off"], ["scale", "multiply by"], ["add", "add everywhere"], ["set", "hold at"]].map(([value, textContent]) => make("option", { value, textContent, selected: value === edit.how })));
    const amount = make("input", { type: "number", step: "any", value: edit.amount, hidden: edit.how === "ablate", ariaLabel: "amount" });
    how.onchange = () => { edit.how = how.value; edit.amount = { scale: 2, add: 5, set: 5, ablate: 0 }[how.value]; showEdits(); };
    amount.onchange = () => { edit.amount = Number(amount.value); remember(); };
    const gone = make("button", { textContent: "remove" });
    gone.onclick = () => { state.edits.splice(n, 1); showEdits(); };
    return make("div", { className: "edit" }, make("b", { textContent: edit.latent }), how, amount, gone);
  }), ...(state.edits.length ? [] : [make("p", { textContent: "None: choose a latent and press edit." })]));
}

async function go() {
  const text = at("text").value;
  const found = await ask("continue", { text, edits: state.edits, replaced: at("replaced").checked, new_tokens: Number(at("count").value) });
  const side = (title, it) => make("div", { className: "card" }, make("b", { textContent: title }), make("p", { textContent: it.text || "(ends here)" }),
    make("table", {}, ...it.next.map(([token, chance]) => make("tr", {}, make("td", { textContent: line(token) }), make("td", { textContent: (100 * chance).toFixed(1) + " %" })))));
  at("written").replaceChildren(make("div", { className: "both" }, side("as it is", found.plain), side("edited", found.edited)));
}

async function differ() {
  const found = await ask("difference", { text: at("text").value, other: at("other").value });
  const latents = found.latents.map(l => ({ ...l, value: `${l.here.toPrecision(3)} \u2212 ${l.there.toPrecision(3)}` }));
  state.listed = () => rows("Latents by difference: here less there", latents);
  state.listed();
}

at("read").onclick = quietly(read);
at("go").onclick = quietly(go);
at("differ").onclick = quietly(differ);
at("add").onclick = () => { if (at("number").value !== "") addEdit(Number(at("number").value)); };
at("text").onkeydown = event => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) quietly(read)(); };

(async () => {
  const about = await (await fetch("/about")).json();
  document.title = at("title").textContent = about.title;
  hasPages = about.pages;
  at("pages").hidden = !hasPages;
  if (location.hash.length > 1) {
    const kept = JSON.parse(decodeURIComponent(location.hash.slice(1)));
    at("text").value = kept.text;
    state.edits = kept.edits;
    if (kept.text) await read();
  }
  showEdits();
})().catch(error => { at("status").textContent = error.message; });
