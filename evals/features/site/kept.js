// Favourites and notes: kept by this browser, for this coder; downloaded as JSON.
"use strict";
const kept = (() => {
  const { title, weights } = window.skipcoderTable, name = "skipcoder " + (weights ?? title);
  let of = {};
  try { of = JSON.parse(localStorage.getItem(name)) ?? {}; } catch { /* a browser that keeps nothing, or a damaged entry */ }
  const change = (i, what) => {
    of[i] = { star: false, note: "", ...of[i], ...what };
    if (!of[i].star && !of[i].note) delete of[i];
    try { localStorage.setItem(name, JSON.stringify(of)); } catch { /* nothing is kept */ }
  };
  return {
    has: i => i in of,
    star: i => of[i]?.star ?? false,
    note: i => of[i]?.note ?? "",
    count: () => Object.keys(of).length,
    toggle: i => change(i, { star: !of[i]?.star }),
    write: (i, note) => change(i, { note }),
    file: () => new Blob([JSON.stringify({ pages: title, weights, latents: of }, null, 1)], { type: "application/json" }),
  };
})();
