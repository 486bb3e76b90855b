// The graph: tokens across, layers up, the edges of the chosen node.
"use strict";
const { circuit, latents, pages, words, reaching } = window.skipcoderCircuit, nodes = circuit.nodes, EDGES = 30;
const into = nodes.map(() => []), outof = nodes.map(() => []);
for (const [source, target, weight] of circuit.edges) {
  into[target].push([source, weight]);
  outof[source].push([target, weight]);
}
for (const list of [...into, ...outof]) list.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));
const shown = node => latents[node.layer + "_" + node.latent];
const visible = text => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
const word = token => visible(words[token] ?? "");
const place = node => visible(circuit.tokens[node.position]);

function label(i) { // what a node is, in words
  const node = nodes[i], it = shown(node);
  if (node.kind === "token") return `token “${place(node)}”`;
  if (node.kind === "logit") return `next token “${word(node.token)}”`;
  if (node.kind === "error") return `error of layer ${node.layer} at “${place(node)}”`;
  return it?.explanation || it?.tokens.map(word).join("  ") || `latent ${node.latent}`;
}
const where = i => nodes[i].kind === "latent" ? `${nodes[i].layer}/${nodes[i].latent} at “${place(nodes[i])}”` : "";

function make(tag, attributes = {}, text = "") {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) name in element ? element[name] = value : element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}
function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

const graph = (() => {
  const frame = document.getElementById("graph"), ROW = 24, STEP = 11, AXIS = 34, EMPTY = 30;
  const last = Math.max(...nodes.map(n => n.layer)), cells = new Map(), at = [];
  const order = nodes.map((_, i) => i).sort((a, b) => nodes[a].influence - nodes[b].influence); // most influential first
  const marks = [], lines = draw("g", {});
  let limit = nodes.length, errors = true;

  const included = i => (nodes[i].kind !== "error" || errors) && (rank[i] < limit || ["token", "logit"].includes(nodes[i].kind));
  const rank = [];
  order.forEach((i, r) => { rank[i] = r; });

  function layout() {
    cells.clear();
    for (const i of order) if (included(i)) {
      const key = nodes[i].layer + " " + nodes[i].position;
      cells.has(key) ? cells.get(key).push(i) : cells.set(key, [i]);
    }
    const width = circuit.tokens.map((token, p) => {
      let most = 1;
      for (let l = -1; l <= last; l++) most = Math.max(most, cells.get(l + " " + p)?.length ?? 0);
      return Math.max(EMPTY, 8 + STEP * most, Math.min(visible(token).length, 14) * 7.5 + 8);
    });
    const left = [0];
    width.forEach((w, p) => { left[p + 1] = left[p] + w; });
    return { left, width, height: ROW * (last + 2) + 12, total: left.at(-1) + 10 };
  }

  function render() {
    const { left, width, height, total } = layout(), y = layer => 10 + ROW * (last - layer) + ROW / 2;
    const svg = draw("svg", { width: total, height, role: "img", "aria-label": circuit.prompt });
    const axis = draw("svg", { class: "axis", width: AXIS, height }), text = draw("svg", { class: "words", width: AXIS + total, height: 24 });
    circuit.tokens.forEach((token, p) => {
      if (p % 2) svg.append(draw("rect", { class: "stripe", x: left[p], y: 0, width: width[p], height }));
      const shown = visible(token);
      text.append(draw("text", { class: "word", x: AXIS + left[p] + 4, y: 16 }, shown.length > 14 ? shown.slice(0, 13) + "…" : shown));
    });
    for (let layer = -1; layer <= last; layer++) {
      const name = layer < 0 ? "in" : layer === last ? "out" : String(layer);
      axis.append(draw("text", { x: 6, y: y(layer) + 4 }, name));
    }
    lines.replaceChildren();
    svg.append(lines);
    marks.length = 0;
    for (const [key, members] of cells) {
      const [layer, position] = key.split(" ").map(Number);
      members.forEach((i, n) => {
        const x = left[position] + 9 + STEP * n, cy = y(layer), kind = nodes[i].kind;
        at[i] = [x, cy];
        const mark = kind === "latent" ? draw("circle", { cx: x, cy, r: 4.2 })
          : kind === "error" ? draw("path", { d: `M${x} ${cy - 5}L${x + 5} ${cy}L${x} ${cy + 5}L${x - 5} ${cy}Z` })
          : draw("rect", { x: x - 4, y: cy - 4, width: 8, height: 8 });
        mark.setAttribute("class", "node " + kind);
        mark.dataset.i = i;
        mark.append(draw("title", {}, [label(i), where(i)].filter(Boolean).join(", ")));
        marks[i] = mark;
        svg.append(mark);
      });
    }
    frame.replaceChildren(axis, svg, text);
    document.getElementById("count").textContent = `${marks.filter(Boolean).length} of ${nodes.length}`;
  }

  function connect(chosen) { // edges of a node
    lines.replaceChildren();
    for (const mark of marks) mark?.classList.remove("near", "selected");
    if (chosen === null) return;
    marks[chosen]?.classList.add("selected");
    const list = [...into[chosen].slice(0, EDGES).map(e => [...e, true]), ...outof[chosen].slice(0, EDGES).map(e => [...e, false])];
    const most = Math.max(...list.map(e => Math.abs(e[1])), 1e-9);
    for (const [other, weight, below] of list) {
      if (!marks[other] || !marks[chosen]) continue;
      const [x0, y0] = below ? at[other] : at[chosen], [x1, y1] = below ? at[chosen] : at[other], middle = (y0 + y1) / 2;
      lines.append(draw("path", {
        class: weight < 0 ? "edge minus" : "edge", d: `M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}`,
        "stroke-width": 0.6 + 3.4 * Math.abs(weight) / most, "stroke-opacity": 0.35 + 0.6 * Math.abs(weight) / most,
      }));
      marks[other].classList.add("near");
    }
  }

  function show(i) { // bring a node into view
    if (!at[i] || !marks[i]) return;
    const [x, y] = [at[i][0] + AXIS, at[i][1]];
    if (x < frame.scrollLeft + 40 || x > frame.scrollLeft + frame.clientWidth - 40) frame.scrollLeft = x - frame.clientWidth / 2;
    if (y < frame.scrollTop + 30 || y > frame.scrollTop + frame.clientHeight - 30) frame.scrollTop = y - frame.clientHeight / 2;
  }

  function beside(i, step) { // the next node of the same layer
    const row = [...cells.entries()].filter(([key]) => Number(key.split(" ")[0]) === nodes[i].layer)
      .sort((a, b) => Number(a[0].split(" ")[1]) - Number(b[0].split(" ")[1])).flatMap(([, members]) => members);
    return row.includes(i) ? row[row.indexOf(i) + step] : undefined;
  }

  return {
    render, connect, show, beside, marks, drawn: i => Boolean(marks[i]),
    filter: (share, withErrors) => { limit = Math.max(1, Math.round(nodes.length * share)); errors = withErrors; render(); },
    best: () => nodes.map((n, i) => [n.kind === "logit" ? n.probability : -1, i]).sort((a, b) => b[0] - a[0])[0][1],
  };
})();
