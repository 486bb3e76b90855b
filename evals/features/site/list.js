// What the page is made of: elements, numbers, and a table of which only the rows in sight are there.
"use strict";
const HEIGHT = 34;
function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const number = (value, digits = 3) => value === null || value === undefined ? "\u2013" : value.toPrecision(digits);

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
      for (const c of columns) row.append(make("span", { className: c.wide ? "wide" : "", role: "gridcell" }, ...[c.show(order[i])].flat()));
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
