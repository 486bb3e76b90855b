// Shows data/table.js and, when a latent is opened, the chunk of data that holds it. Everything from the text is put into
// the page as text, never as HTML.
"use strict";
const table = window.skipcoderTable, chunks = new Map();
const main = document.getElementById("main");
document.getElementById("title").textContent = document.title = table.title;

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

// In the order of the list until a column is chosen; what a latent is about: its explanation, or where it is largest.
const state = { search: "", sort: null, down: false, onlyKept: false };
const judged = table.detection.some(score => score !== null), explained = table.explanation.some(text => text !== null);
const about = i => table.explanation[i] ?? (table.preview[i].length ? [table.preview[i][0], make("mark", { textContent: table.preview[i][1] }), table.preview[i][2]] : "never fires");
const COLUMNS = [
  { key: "latent", title: "latent", value: i => i, show: i => (kept.star(i) ? "\u2605 " : kept.has(i) ? "\u270e " : "") + i, width: "80px" },
  { key: "tokens", title: "largest on", value: i => table.tokens[i] || "\uffff", show: i => table.tokens[i], width: "minmax(0, .35fr)", wide: true },
  { key: "about", title: explained ? "explanation" : "in context", value: i => table.explanation[i] ?? "\uffff" + (table.preview[i][1] ?? "\uffff"), show: about, width: "minmax(0, 1fr)" },
  { key: "density", title: "density", value: i => table.density[i], show: i => number(table.density[i], 2), width: "86px", wide: judged },
  { key: "largest", title: "largest", value: i => table.largest[i], show: i => number(table.largest[i]), width: "80px", wide: true },
  ...(judged ? [
    { key: "detection", title: "detection", value: i => table.detection[i] ?? -1, show: i => number(table.detection[i], 2), width: "92px" },
    { key: "fuzzing", title: "fuzzing", value: i => table.fuzzing[i] ?? -1, show: i => number(table.fuzzing[i], 2), width: "84px", wide: true },
  ] : []),
];
// Of a crosscoder: how much of a latent is on each side; of one between two models also whose it is.
(table.sides?.length <= 4 ? table.sides : []).forEach((side, s) => COLUMNS.push({ key: "side-" + s, title: side.replace(/ output$/, ""), value: i => table.shares[i][s], show: i => number(table.shares[i][s], 2), width: "minmax(60px, 130px)", wide: true }));
if (table.kind) COLUMNS.push({ key: "kind", title: "belongs to", value: i => table.kind[i], show: i => table.kind[i], width: "132px", wide: true });
const TEXT = ["tokens", "about", "kind"]; // columns that begin with A, others with their largest
let texts; // of each latent, in small letters; made when something is first searched

function showTable() {
  const search = make("input", { type: "search", placeholder: "search tokens, contexts, explanations, or a number", value: state.search, ariaLabel: "search" });
  const found = make("p", { role: "status" });
  const rows = list(COLUMNS, table.density.length, [], i => "#latent/" + i);
  const head = make("div", { className: "grid head" });
  function update() {
    const words = state.search.toLowerCase(), column = COLUMNS.find(c => c.key === state.sort);
    if (words) texts ??= table.tokens.map((tokens, i) => [table.explanation[i] ?? "", tokens, table.preview[i].join(""), table.kind?.[i] ?? ""].join("\n").toLowerCase());
    let order = table.order.filter(i => (!state.onlyKept || kept.has(i)) && (!words || String(i) === words || texts[i].includes(words) || kept.note(i).toLowerCase().includes(words)));
    if (column) order = sorted(order, column);
    rows.show(order);
    found.textContent = `${order.length.toLocaleString()} of ${table.density.length.toLocaleString()} latents`;
    head.replaceChildren(...COLUMNS.map(c => {
      const button = make("button", { textContent: c.title, title: c.title, className: c.wide ? "wide" : "" });
      if (c.key === state.sort) button.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      button.onclick = () => { state.down = c.key === state.sort ? !state.down : c.key !== "latent" && !TEXT.includes(c.key); state.sort = c.key; update(); };
      return button;
    }));
  }
  function sorted(order, column) {
    const keys = order.map(column.value), sign = state.down ? -1 : 1;
    const by = typeof keys[0] === "string" ? (a, b) => keys[a].localeCompare(keys[b]) : (a, b) => keys[a] - keys[b];
    return order.map((_, n) => n).sort((a, b) => sign * by(a, b) || a - b).map(n => order[n]);
  }
  state.onlyKept &&= kept.count() > 0;
  const only = make("input", { type: "checkbox", checked: state.onlyKept });
  only.onchange = () => { state.onlyKept = only.checked; update(); };
  const save = make("a", { href: "#", textContent: "download", download: "latents.json" });
  save.onclick = () => { save.href = URL.createObjectURL(kept.file()); };
  const favourites = kept.count() ? [make("label", {}, only, ` favourites and notes only (${kept.count()}), `), save] : [];
  search.oninput = () => { state.search = search.value; update(); };
  const notes = table.warning ? [make("p", { className: "warning", textContent: table.warning })] : [];
  const listed = make("div", {}, head, rows.view);
  listed.style.setProperty("--columns", COLUMNS.map(c => c.width).join(" "));
  main.replaceChildren(...notes, make("p", { textContent: table.facts }), search, ...favourites, found, listed);
  update();
}

function contexts(title, windows, words, largest) {
  const box = make("div", { className: "contexts" });
  const [each, size] = table.window;
  for (const [tokens, levels, top, window] of windows) {
    const from = window % each * size, where = `row ${Math.floor(window / each)} of the text, tokens ${from} to ${from + tokens.length - 1}`;
    const line = make("div", { className: "context" }, make("b", { textContent: number(top), title: where }));
    tokens.forEach((token, n) => {
      const span = make("span", { textContent: words[token] });
      if (levels[n]) { span.style.background = `rgba(var(--mark), ${0.12 + 0.07 * levels[n]})`; span.title = number(levels[n] * largest / 10); }
      line.append(span);
    });
    box.append(line);
  }
  return [make("h2", { textContent: title }), windows.length ? box : make("p", { textContent: "none" })];
}
const chips = words => make("div", { className: "chips" }, ...words.map(([word, logit]) => make("span", { title: `${number(logit)} for each unit of activation` }, word.replaceAll("\n", "\u21b5"), make("small", { textContent: " " + number(logit, 2) }))));
const linked = pairs => make("div", { className: "chips" }, ...pairs.map(([j, share]) => make("span", { title: table.explanation[j] ?? table.tokens[j] }, link(j, `${j}`), ` ${number(share, 2)}`)));
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
  const sides = (table.sides ?? []).map((side, s) => [side, table.shares[i][s]]);
  const facts = `fires on ${number(table.density[i], 2)} of tokens, ${it.n.toLocaleString()} times; largest ${number(it.largest)}` + (scores.length ? "; " + scores.join(", ") : "") + (table.kind ? "; belongs to: " + table.kind[i] : "");
  const bars = make("div", { className: "bars" }), most = Math.max(...it.histogram, 1);
  it.histogram.forEach(n => { const bar = make("i", { title: n.toLocaleString() }); bar.style.height = 100 * n / most + "%"; bars.append(bar); });
  const star = make("button", { className: "star" }), note = make("textarea", { rows: 2, value: kept.note(i), placeholder: "A note, kept by this browser", ariaLabel: "note" });
  const starred = () => { star.textContent = kept.star(i) ? "\u2605 favourite" : "\u2606 favourite"; star.setAttribute("aria-pressed", kept.star(i)); };
  star.onclick = () => { kept.toggle(i); starred(); };
  note.oninput = () => kept.write(i, note.value);
  starred();
  main.replaceChildren(
    title, step, make("p", { textContent: table.explanation[i] ?? (table.tokens[i] ? "largest on: " + table.tokens[i] : "never fires"), style: "color: var(--ink)" }), make("p", { textContent: facts }), make("div", { className: "own" }, star, note),
    make("div", { className: "two" },
      make("div", {}, make("h2", { textContent: "Promotes" }), chips(it.up), make("h2", { textContent: "Suppresses" }), chips(it.down)),
      make("div", {}, make("h2", { textContent: "Activations" }), bars, make("div", { className: "axis" }, make("span", { textContent: "0" }), make("span", { textContent: number(it.largest) })),
        ...(sides.length ? [make("h2", { textContent: "Share of its decoder on each side" }), make("div", { className: "chips" }, ...sides.map(([side, share]) => make("span", {}, side, make("small", { textContent: " " + number(share, 2) }))))] : []),
        make("h2", { textContent: "Nearest latents, by decoder cosine" }), linked(it.nearest),
        ...(it.together.length ? [make("h2", { textContent: "Fire together: share of the tokens on which either fires" }), linked(it.together)] : []))),
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
  const theirs = it.table, shared = match.cosine.filter(c => c >= 0.7).length.toLocaleString();
  const rows = list([
    { show: i => String(i) }, { show: i => table.explanation[i] ?? table.tokens[i] }, { show: i => String(match.latent[i]) },
    { show: i => number(match.cosine[i], 2) }, { show: i => theirs.explanation[match.latent[i]] ?? theirs.tokens[match.latent[i]], wide: true },
  ], match.latent.length, [], i => "#latent/" + i);
  const head = make("div", { className: "grid head" }, ...["latent", "explanation, or largest on", "theirs", "cosine", "theirs, the same"].map((t, n) => make("button", { textContent: t, tabIndex: -1, className: n === 4 ? "wide" : "" })));
  main.append(make("p", { textContent: `Here: ${mine.facts}` }), make("p", { textContent: `There: ${theirs.facts}` }),
    make("p", { textContent: `${shared} of ${match.cosine.length.toLocaleString()} latents have a near twin there (cosine 0.7 or more).` }), make("div", { className: "compare" }, head, rows.view));
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
  if (event.target.matches("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  if (at && event.key === "j") location.hash = "#latent/" + (Number(at[1]) + 1);
  if (at && event.key === "k" && at[1] > 0) location.hash = "#latent/" + (at[1] - 1);
  if (event.key === "/") { document.querySelector("input[type=search]")?.focus(); event.preventDefault(); }
});
route();
