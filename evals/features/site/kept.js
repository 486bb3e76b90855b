// Favourites and notes: kept by this browser, for these pages; downloaded as JSON.
"use strict";
const kept = (() => {
  const name = "skipcoder " + window.skipcoderTable.title;
  let of = {};
  try { of = JSON.parse(localStorage.getItem(name)) ?? {}; } catch { /* a browser that keeps nothing, or a damaged entry */ }
  const save = () => { try { localStorage.setItem(name, JSON.stringify(of)); } catch { /* nothing is kept */ } };
  return {
    has: i => i in of,
    note: i => of[i]?.note ?? "",
    count: () => Object.keys(of).length,
    toggle: i => { if (i in of) delete of[i]; else of[i] = { note: "" }; save(); },
    write: (i, note) => { of[i] = { note }; save(); },
    file: () => new Blob([JSON.stringify({ pages: window.skipcoderTable.title, latents: of }, null, 1)], { type: "application/json" }),
  };
})();
