// The chosen node, the search, the keyboard.
"use strict";
(() => {
  const panel = document.getElementById("panel"), search = document.getElementById("search"), frame = document.getElementById("graph");
  const share = document.getElementById("share"), errors = document.getElementById("errors"), LISTED = 40;
  let chosen = null;
  const digits = value => value === null ? "–" : Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 1 ? value.toFixed(2) : value.toPrecision(2);

  function row(weight, i) {
    const button = make("button", { className: "row" });
    button.append(make("b", { className: weight < 0 ? "minus" : "" }, digits(weight)), make("span", {}, [label(i), where(i)].filter(Boolean).join("  ")));
    button.onclick = () => { choose(i); frame.focus({ preventScroll: true }); };
    return button;
  }
  function list(title, edges, nothing) {
    const found = [make("h3", {}, title)];
    if (!edges.length) found.push(make("p", {}, nothing));
    found.push(...edges.slice(0, LISTED).map(([other, weight]) => row(weight, other)));
    if (edges.length >= LISTED) found.push(make("p", {}, `the ${LISTED} strongest; circuit.json holds all`));
    return found;
  }
  function context([tokens, tenths, largest]) {
    const line = make("div", { className: "context", title: `largest here: ${largest}` });
    tokens.forEach((token, n) => {
      const span = make("span", {}, words[token] ?? "");
      if (tenths[n]) span.style.background = `rgba(var(--mark), ${tenths[n] / 14})`;
      line.append(span);
    });
    return line;
  }
  function chips(title, pairs) {
    const line = make("p", { className: "chips" });
    line.append(make("small", {}, title + " "));
    for (const [token, logit] of pairs) line.append(make("span", { title: String(logit) }, word(token)));
    return line;
  }

  function choose(i) {
    chosen = i;
    graph.connect(i);
    panel.replaceChildren();
    if (i === null) {
      panel.append(make("h2", {}, "No node is chosen"), make("p", {}, "Choose one to see what makes it fire and what it does."));
      return;
    }
    graph.show(i);
    const node = nodes[i], it = shown(node), pin = make("button", {}, own.has(i) ? "Unpin (P)" : "Pin (P)");
    pin.onclick = () => { own.toggle(i); choose(i); };
    panel.append(make("h2", {}, label(i)));
    const facts = [where(i)];
    if (node.kind === "logit") facts.push(`probability ${digits(node.probability)}, logit ${digits(node.value)} above the mean`);
    if (node.kind === "latent") facts.push(`activation ${digits(node.value)}, of which ${digits(node.constant)} comes from biases and positions left out`);
    if (node.kind === "error") facts.push("what this layer's coder does not reconstruct");
    panel.append(make("p", {}, facts.filter(Boolean).join("; ")), pin);
    if (node.kind === "latent" && pages[node.layer]) panel.append(" ", make("a", { href: `${pages[node.layer]}#latent/${node.latent}` }, "its page"));
    if (it?.contexts.length) panel.append(make("h3", {}, "Where it is largest in the store"), ...it.contexts.map(context));
    if (it?.up.length) panel.append(chips("raises", it.up), chips("lowers", it.down));
    const logits = outof[i].filter(([target]) => nodes[target].kind === "logit");
    if (logits.length) panel.append(chips("directly on next tokens", logits.map(([target, weight]) => [nodes[target].token, digits(weight)])));
    panel.append(...list("Comes from", into[i], "Nothing: it is where the graph begins."), ...list("Acts on", outof[i], "Nothing in this graph."));
    panel.scrollTop = 0;
  }

  function find() {
    const wanted = search.value.trim().toLowerCase();
    let first = null;
    nodes.forEach((node, i) => {
      const it = shown(node), contexts = it?.contexts.map(c => c[0].map(t => words[t]).join("")).join(" ") ?? "";
      const text = [label(i), where(i), node.id, it?.up.map(([t]) => word(t)).join(" ") ?? "", contexts].join(" ").toLowerCase();
      const match = wanted !== "" && text.includes(wanted);
      graph.marks[i]?.classList.toggle("found", match);
      graph.marks[i]?.classList.toggle("faint", wanted !== "" && !match);
      if (match && graph.drawn(i) && (first === null || node.influence < nodes[first].influence)) first = i;
    });
    return first;
  }

  frame.addEventListener("click", event => {
    const i = event.target.closest?.(".node")?.dataset.i;
    if (i !== undefined) choose(Number(i));
  });
  search.addEventListener("input", find);
  search.addEventListener("keydown", event => { if (event.key === "Enter") { const first = find(); if (first !== null) choose(first); } });
  for (const control of [share, errors]) control.addEventListener("input", () => {
    graph.filter(Number(share.value) / 100, errors.checked);
    own.render();
    find();
    graph.connect(chosen);
  });
  addEventListener("keydown", event => {
    if (["INPUT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "checkbox" && event.target.type !== "range") {
      if (event.key === "Escape") event.target.blur();
      return;
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); search.focus(); return; }
    if (chosen === null) return;
    const strongest = edges => edges.find(([other]) => graph.drawn(other))?.[0];
    if (event.key === "p" || event.key === "P") { own.toggle(chosen); choose(chosen); }
    if (event.key === "Escape") choose(null);
    if (document.activeElement !== frame) return;
    const next = { ArrowUp: () => strongest(outof[chosen]), ArrowDown: () => strongest(into[chosen]), ArrowLeft: () => graph.beside(chosen, -1), ArrowRight: () => graph.beside(chosen, 1) }[event.key]?.();
    if (event.key.startsWith("Arrow")) event.preventDefault();
    if (next !== undefined) choose(next);
  });

  const likely = nodes.filter(n => n.kind === "logit").sort((a, b) => b.probability - a.probability).slice(0, 5);
  document.title = "Circuit: " + circuit.prompt;
  document.getElementById("title").textContent = circuit.prompt + " …";
  const verified = circuit.verified?.real.correlation != null ? `; switching latents off in the model changes the logits as predicted with correlation ${circuit.verified.real.correlation.toFixed(2)}` : "";
  document.getElementById("facts").textContent = `${circuit.model}; next: ${likely.map(n => `“${word(n.token)}” ${digits(n.probability)}`).join(", ")}. `
    + `${nodes.length} nodes and ${window.skipcoderCircuit.edges} edges of ${circuit.active} active latents; replacement score ${circuit.replacement.toFixed(2)}, completeness ${circuit.completeness.toFixed(2)}${verified}.`;
  graph.render();
  own.render();
  choose(graph.best());
})();
