// Pins and groups (supernodes): kept by this browser, for this prompt and model; downloaded as circuit-tracer's qParams.
"use strict";
const own = (() => {
  const name = `skipcoder circuit ${circuit.model} ${circuit.layers.map(l => l.run).join()} ${circuit.prompt}`;
  const frame = document.getElementById("own"), number = new Map(nodes.map((node, i) => [node.id, i]));
  let state = { pinned: [], groups: [] };
  try {
    const { pinned, groups } = JSON.parse(localStorage.getItem(name)), known = ids => ids.filter(id => number.has(id));
    state = { pinned: known(pinned), groups: groups.map(g => ({ name: String(g.name), ids: known(g.ids) })).filter(g => g.ids.length) };
  } catch { /* nothing was kept, or it is damaged */ }

  function keep() {
    try { localStorage.setItem(name, JSON.stringify(state)); } catch { /* a browser that keeps nothing */ }
    render();
  }
  const has = i => state.pinned.includes(nodes[i].id);
  function toggle(i) {
    const id = nodes[i].id;
    state.pinned = has(i) ? state.pinned.filter(other => other !== id) : [...state.pinned, id];
    state.groups = state.groups.map(g => ({ ...g, ids: g.ids.filter(other => state.pinned.includes(other)) })).filter(g => g.ids.length);
    keep();
  }

  function boxes() { // what the small picture shows: groups, and pins that are in none
    const grouped = new Set(state.groups.flatMap(g => g.ids));
    return [
      ...state.groups.map(g => ({ name: g.name, group: true, members: g.ids.map(id => number.get(id)) })),
      ...state.pinned.filter(id => !grouped.has(id)).map(id => number.get(id)).map(i => ({ name: label(i), group: false, members: [i] })),
    ].map(box => ({ ...box, layer: box.members.reduce((sum, i) => sum + nodes[i].layer, 0) / box.members.length }))
      .sort((a, b) => b.layer - a.layer);
  }
  function between(a, b) { // direct effect of box a on box b, as a share of all input of b
    let sum = 0, size = 0;
    for (const target of b.members) {
      size += reaching[target];
      for (const [source, weight] of into[target]) if (a.members.includes(source)) sum += weight;
    }
    return size ? sum / size : 0;
  }

  function picture(list) {
    const W = 190, H = 30, GAP = 46, rows = [];
    for (const box of list) {
      const row = rows.at(-1);
      row && Math.abs(row[0].layer - box.layer) < 1 ? row.push(box) : rows.push([box]);
    }
    const width = Math.max(...rows.map(r => r.length)) * (W + 20), svg = draw("svg", { width, height: rows.length * (H + GAP), role: "img", "aria-label": "Pins and groups" });
    rows.forEach((row, r) => row.forEach((box, n) => { box.x = n * (W + 20) + (width - row.length * (W + 20)) / 2; box.y = r * (H + GAP) + 4; }));
    for (const a of list) for (const b of list) {
      const share = a === b ? 0 : between(a, b);
      if (Math.abs(share) < 0.001) continue;
      const [x0, y0, x1, y1] = [a.x + W / 2, a.y, b.x + W / 2, b.y + H];
      svg.append(draw("path", { class: share < 0 ? "edge minus" : "edge", d: `M${x0} ${y0}C${x0} ${y0 - 20} ${x1} ${y1 + 20} ${x1} ${y1}`, "stroke-width": 1 + 5 * Math.abs(share) }));
      svg.append(draw("text", { x: (x0 + x1) / 2 + 4, y: (y0 + y1) / 2 }, `${(100 * share).toPrecision(2)} %`));
    }
    for (const box of list) {
      const g = draw("g", { class: box.group ? "box group" : "box" }), text = visible(box.name);
      g.append(draw("rect", { x: box.x, y: box.y, width: W, height: H, rx: 6 }), draw("text", { class: "word", x: box.x + 8, y: box.y + 19 }, text.length > 24 ? text.slice(0, 23) + "…" : text));
      svg.append(g);
    }
    return svg;
  }

  function render() {
    for (const [i, mark] of graph.marks.entries()) mark?.classList.toggle("pinned", has(i));
    frame.replaceChildren();
    if (!state.pinned.length) return;
    const card = make("div", { className: "own" }), form = make("form"), choice = make("input", { type: "text", placeholder: "Name of the group", maxLength: 80 });
    choice.setAttribute("aria-label", "Name of the group");
    card.append(make("h2", {}, "Pinned"));
    for (const id of state.pinned) {
      const line = make("label");
      line.append(make("input", { type: "checkbox", name: "member", value: id }), label(number.get(id)) + " " + where(number.get(id)));
      form.append(line);
    }
    form.append(make("br"), choice, " ", make("button", {}, "Group those ticked"));
    form.onsubmit = event => {
      event.preventDefault();
      const ids = [...form.querySelectorAll("input[name=member]:checked")].map(box => box.value);
      if (!ids.length) return;
      state.groups = state.groups.map(g => ({ ...g, ids: g.ids.filter(id => !ids.includes(id)) })).filter(g => g.ids.length);
      state.groups.push({ name: choice.value.trim() || "group", ids });
      keep();
    };
    card.append(form);
    const chips = make("p", { className: "chips" });
    for (const group of state.groups) {
      const chip = make("button", { title: "Dissolve this group" }, `${group.name} (${group.ids.length}) ×`);
      chip.onclick = () => { state.groups = state.groups.filter(g => g !== group); keep(); };
      chips.append(chip);
    }
    card.append(chips, picture(boxes()), make("p", {}, "Shares of what reaches a box from the nodes of this graph; dashed: it is lowered."));
    frame.append(card);
  }

  document.getElementById("export").onclick = () => {
    const params = { pinnedIds: state.pinned, supernodes: state.groups.map(g => [g.name, ...g.ids]), linkType: "both", clickedId: "", sg_pos: "" };
    const file = new Blob([JSON.stringify({ prompt: circuit.prompt, model: circuit.model, qParams: params }, null, 1)], { type: "application/json" });
    const link = make("a", { href: URL.createObjectURL(file), download: "circuit-groups.json" });
    link.click();
    URL.revokeObjectURL(link.href);
  };
  return { has, toggle, render };
})();
