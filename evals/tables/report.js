// The report: sort and filter its table, draw its figures, follow light and dark.
"use strict";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia("(prefers-color-scheme: dark)");

function painted(layout, plot, lines) {
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const columns = plot.clientWidth > 480 ? 2 : 1, legend = 12 + 19 * Math.min(Math.ceil(lines / columns), 8);
  plot.style.height = 300 + legend + "px";
  return {
    ...layout,
    xaxis: { ...axis, ...layout.xaxis, title: { text: layout.xaxis.title, standoff: 8 } },
    yaxis: { ...axis, ...layout.yaxis, title: { text: layout.yaxis.title }, automargin: true },
    font: { color: colour("--ink"), size: 12 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    height: 300 + legend, margin: { l: 52, r: 12, t: 8, b: 52 + legend }, showlegend: true,
    legend: {
      orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, maxheight: legend,
      entrywidth: 1 / columns, entrywidthmode: "fraction", font: { size: 11 },
    },
    hoverlabel: { namelength: -1 },
  };
}

function draw(plot) {
  const figure = JSON.parse(plot.querySelector("script").textContent);
  const show = () => Plotly.react(plot, figure.data, painted(figure.layout, plot, figure.data.length), { displayModeBar: false, responsive: true });
  for (const name of ["xaxis", "yaxis"]) {
    const button = document.createElement("button");
    const label = () => button.setAttribute("aria-pressed", figure.layout[name].type === "log");
    button.textContent = `log ${name[0]}`;
    button.onclick = () => {
      figure.layout[name].type = figure.layout[name].type === "log" ? "linear" : "log";
      delete figure.layout[name].range;
      label();
      show();
    };
    label();
    plot.parentElement.querySelector(".axes").append(button);
  }
  show();
  return show;
}

const shows = [...document.querySelectorAll(".plot")].map(draw);
const repaint = () => shows.forEach((show) => show());
dark.addEventListener("change", repaint);
addEventListener("beforeprint", repaint);
addEventListener("afterprint", repaint);

const table = document.querySelector("table.runs");
const rows = [...table.tBodies[0].rows];
const value = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const number = parseFloat(text);
  return Number.isNaN(number) ? (text === "-" ? Infinity : text) : number;
};

function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const compare = (a, b) => (typeof a === typeof b ? (a > b) - (a < b) : typeof a === "number" ? -1 : 1);
  rows.sort((a, b) => (down ? -1 : 1) * compare(value(a, head.cellIndex), value(b, head.cellIndex)));
  table.tBodies[0].append(...rows);
}
for (const head of table.tHead.rows[0].cells) {
  head.tabIndex = 0;
  head.onclick = () => sort(head);
  head.onkeydown = (event) => event.key === "Enter" && sort(head);
}

document.querySelector("input[type=search]").oninput = (event) => {
  const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const row of rows) {
    const cells = [...row.cells].map((cell) => cell.textContent.toLowerCase());
    row.hidden = !words.every((word) => cells.some((cell) => (isNaN(word) ? cell.includes(word) : cell === word)));
  }
};
