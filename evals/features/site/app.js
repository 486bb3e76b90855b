// Shows data/table.js and, when a latent is opened, the chunk of data that holds it. Everything from the text is put into
// the page as text, never as HTML.
"use strict";
const table = window.skipcoderTable, chunks = new Map(), HEIGHT = 34;
const main = document.getElementById("main");
document.getElementById("title").textContent = document.title = table.title;

function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const number = (value, digits = 3) => value === null || value === undefined ? "\u2013" : value.toPrecision(digits);

function load(src) {
  return new Promise((done, fail) => {
    document.head.append(make("script", { src, onload: done, onerror: () => fail(new Error("cannot read " + src)) }));
  });
}
window.skipcoderChunk = (key, content) => chunks.set(key, content);
async function chunk(name) {
  if (!chunks.has(name)) await load("data/" + name + ".js");
  return chunks.get(name);
}

// A table of many rows: only those in sight are in the page. Arrow keys move, Enter opens.
function list(columns, count, order, href) {
  const space = make("div", { className: "space" }), rows = new Map();
  const view = make("div", { className: "viewport", tabIndex: 0, role: "grid", ariaLabel: "latents" }, space);
  let chosen = -1;
  function draw() {
    const first = Math.max(0, Math.floor(view.scrollTop / HEIGHT) - 8);
    const last = Math.min(order.length, first + Math.ceil(view.clientHeight / HEIGHT) + 16);
    for (const [i, node] of rows) if (i < first || i >= last) { node.remove(); rows.delete(i); }
    for (let i = first; i < last; i++) {
      if (rows.has(i)) continue;
      const row = make("a", { className: "row grid" + (i === chosen ? " chosen" : ""), href: href(order[i]), tabIndex: -1, role: "row", id: "row-" + i });
      row.style.top = i * HEIGHT + "px";
      for (const c of columns) row.append(make("span", { textContent: c.show(order[i]), className: c.wide ? "wide" : "", role: "gridcell" }));
      rows.set(i, row);
      space.append(row);
    }
  }
  function choose(i) {
    rows.get(chosen)?.classList.remove("chosen");
    chosen = Math.max(0, Math.min(order.length - 1, i));
    if (chosen * HEIGHT < view.scrollTop) view.scrollTop = chosen * HEIGHT;
    if ((chosen + 1) * HEIGHT > view.scrollTop + view.clientHeight) view.scrollTop = (chosen + 1) * HEIGHT - view.clientHeight;
    draw();
    rows.get(chosen)?.classList.add("chosen");
    view.setAttribute("aria-activedescendant", "row-" + chosen);
  }
  view.addEventListener("scroll", draw);
  new ResizeObserver(draw).observe(view);
  view.addEventListener("keydown", event => {
    const page = Math.floor(view.clientHeight / HEIGHT);
    const step = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -order.length, End: order.length }[event.key];
    if (step) { choose(chosen + step); event.preventDefault(); }
    if (event.key === "Enter" && chosen >= 0) location.hash = href(order[chosen]);
  });
  return { view, show(next) { order = next; chosen = -1; rows.forEach(n => n.remove()); rows.clear(); view.setAttribute("aria-rowcount", order.length); space.style.cssText = `height:${order.length * HEIGHT}px`; view.scrollTop = 0; draw(); }, draw };
}

const state = { search: "", sort: "latent", down: false };
const COLUMNS = [
  { key: "latent", title: "latent", value: i => i, show: i => String(i) },
  { key: "density", title: "density", value: i => table.density[i], show: i => number(table.density[i], 2), wide: true },
  { key: "explanation", title: "explanation", value: i => table.explanation[i] ?? "\uffff", show: i => table.explanation[i] ?? "" },
  { key: "detection", title: "detection", value: i => table.detection[i] ?? -1, show: i => number(table.detection[i], 2) },
  { key: "fuzzing", title: "fuzzing", value: i => table.fuzzing[i] ?? -1, show: i => number(table.fuzzing[i], 2), wide: true },
];

function showTable() {
  const search = make("input", { type: "search", placeholder: "search explanations, or a latent's number", value: state.search, ariaLabel: "search" });
  const found = make("p", { role: "status" });
  const rows = list(COLUMNS, table.density.length, [], i => "#latent/" + i);
  const head = make("div", { className: "grid head" });
  function update() {
    const words = state.search.toLowerCase(), column = COLUMNS.find(c => c.key === state.sort);
    let order = [];
    for (let i = 0; i < table.density.length; i++) {
      if (!words || String(i) === words || (table.explanation[i] ?? "").toLowerCase().includes(words)) order.push(i);
    }
    const keys = order.map(column.value), sign = state.down ? -1 : 1;
    const by = typeof keys[0] === "string" ? (a, b) => keys[a].localeCompare(keys[b]) : (a, b) => keys[a] - keys[b];
    order = order.map((_, n) => n).sort((a, b) => sign * by(a, b) || a - b).map(n => order[n]);
    rows.show(order);
    found.textContent = `${order.length.toLocaleString()} of ${table.density.length.toLocaleString()} latents`;
    head.replaceChildren(...COLUMNS.map(c => {
      const button = make("button", { textContent: c.title, className: c.wide ? "wide" : "" });
      if (c.key === state.sort) button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      button.onclick = () => { state.down = c.key === state.sort ? !state.down : c.key !== "latent" && c.key !== "explanation"; state.sort = c.key; update(); };
      return button;
    }));
  }
  search.oninput = () => { state.search = search.value; update(); };
  const notes = table.warning ? [make("p", { className: "warning", textContent: table.warning })] : [];
  main.replaceChildren(...notes, make("p", { textContent: table.facts }), search, found, head, rows.view);
  update();
}

function contexts(title, windows, words, largest) {
  const box = make("div", { className: "contexts" });
  for (const [tokens, levels, top] of windows) {
    const line = make("div", { className: "context" }, make("b", { textContent: number(top) }));
    tokens.forEach((token, n) => {
      const span = make("span", { textContent: words[token] });
      if (levels[n]) { span.style.background = `rgba(var(--mark), ${0.12 + 0.07 * levels[n]})`; span.title = number(levels[n] * largest / 10); }
      line.append(span);
    });
    box.append(line);
  }
  return [make("h2", { textContent: title }), windows.length ? box : make("p", { textContent: "none" })];
}
const chips = words => make("div", { className: "chips" }, ...words.map(word => make("span", { textContent: word.replaceAll("\n", "\u21b5") })));
const link = (i, text) => make("a", { href: "#latent/" + i, textContent: text });

async function showLatent(i) {
  if (!(i >= 0 && i < table.density.length)) return main.replaceChildren(make("p", { textContent: "There is no latent of this number." }));
  const asked = location.hash;
  const [part, words] = await Promise.all([chunk("latents-" + Math.floor(i / table.chunk)), chunk("words")]);
  if (location.hash !== asked) return; // gone elsewhere meanwhile
  const it = part[i % table.chunk];
  const title = make("h2", { textContent: `Latent ${i}` });
  const step = make("p", {}, ...(i ? [link(i - 1, "previous"), " "] : []), ...(i + 1 < table.density.length ? [link(i + 1, "next")] : []));
  const scores = [["detection", table.detection[i]], ["fuzzing", table.fuzzing[i]]].filter(s => s[1] !== null).map(s => `${s[0]} ${number(s[1])}`);
  const facts = `fires on ${number(table.density[i], 2)} of tokens, ${it.n.toLocaleString()} times; largest ${number(it.largest)}` + (scores.length ? "; " + scores.join(", ") : "");
  const bars = make("div", { className: "bars" }), most = Math.max(...it.histogram, 1);
  it.histogram.forEach(n => { const bar = make("i", { title: n.toLocaleString() }); bar.style.height = 100 * n / most + "%"; bars.append(bar); });
  const nearest = make("div", { className: "chips" }, ...it.nearest.map(([j, cosine]) => make("span", {}, link(j, `${j}`), ` ${number(cosine, 2)}`)));
  main.replaceChildren(
    title, step, make("p", { textContent: table.explanation[i] ?? "no explanation", style: "color: var(--ink)" }), make("p", { textContent: facts }),
    make("div", { className: "two" },
      make("div", {}, make("h2", { textContent: "Promotes" }), chips(it.up), make("h2", { textContent: "Suppresses" }), chips(it.down)),
      make("div", {}, make("h2", { textContent: "Activations" }), bars, make("div", { className: "axis" }, make("span", { textContent: "0" }), make("span", { textContent: number(it.largest) })),
        make("h2", { textContent: "Nearest latents, by decoder cosine" }), nearest)),
    ...contexts("Largest activations", it.top, words, it.largest), ...contexts("From each quantile", it.quantiles, words, it.largest));
}

async function showCompare(other) {
  const pick = make("select", { ariaLabel: "other coder" }, make("option", { value: "", textContent: "choose another coder" }), ...table.others.map((o, n) => make("option", { value: n, textContent: o.title, selected: String(n) === other })));
  pick.onchange = () => { location.hash = "#compare/" + pick.value; };
  main.replaceChildren(make("p", { textContent: table.others.length ? "Each latent beside the other coder's nearest, by decoder cosine." : "These pages were made for one coder alone; make them for a sweep (runs='GLOB') to compare." }), pick);
  if (!other) return;
  const asked = location.hash, it = table.others[Number(other)], match = await chunk("match-" + other), mine = table;
  if (!it.table) { await load(it.path + "/data/table.js"); it.table = window.skipcoderTable; window.skipcoderTable = mine; }
  if (location.hash !== asked) return;
  const theirs = it.table, shared = match.cosine.filter(c => c >= 0.7).length / match.cosine.length;
  const rows = list([
    { show: i => String(i) }, { show: i => table.explanation[i] ?? "" }, { show: i => String(match.latent[i]) },
    { show: i => number(match.cosine[i], 2) }, { show: i => theirs.explanation[match.latent[i]] ?? "", wide: true },
  ], match.latent.length, [], i => "#latent/" + i);
  const head = make("div", { className: "grid head" }, ...["latent", "explanation", "theirs", "cosine", "their explanation"].map((t, n) => make("button", { textContent: t, tabIndex: -1, className: n === 4 ? "wide" : "" })));
  main.append(make("p", { textContent: `Here: ${mine.facts}` }), make("p", { textContent: `There: ${theirs.facts}` }),
    make("p", { textContent: `${(100 * shared).toFixed(1)} % of the latents have a near twin (cosine 0.7 or more).` }), make("div", { className: "compare" }, head, rows.view));
  rows.show([...match.cosine.keys()].sort((a, b) => match.cosine[b] - match.cosine[a]));
}

function route() {
  const [page, argument] = location.hash.slice(1).split("/");
  const shown = page === "latent" ? showLatent(Number(argument)) : page === "compare" ? showCompare(argument) : showTable();
  Promise.resolve(shown).catch(error => main.replaceChildren(make("p", { className: "warning", textContent: error.message })));
  scrollTo(0, 0);
}
addEventListener("hashchange", route);
addEventListener("keydown", event => {
  const at = /^#latent\/(\d+)$/.exec(location.hash);
  if (event.target.matches("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (at && event.key === "j") location.hash = "#latent/" + (Number(at[1]) + 1);
  if (at && event.key === "k" && at[1] > 0) location.hash = "#latent/" + (at[1] - 1);
  if (event.key === "/") { document.querySelector("input[type=search]")?.focus(); event.preventDefault(); }
});
route();
