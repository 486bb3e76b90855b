"""The figures of the report, as Plotly's data and layout. Rows are those of the table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipcoder.evals.tables.metrics import METRICS, Row, interval_of
from skipcoder.trainer.run.run import RunDirectory

Figure = dict[str, Any]
"""`data` and `layout` of https://plotly.com/javascript/reference."""

_HUES = {
    "sae": (38, 40),
    "transcoder": (212, 58),
    "skip_transcoder": (11, 62),
    "neurons": (220, 6),
    "affine": (145, 42),
}
"""Hue and saturation of each kind."""
_BEFORE = {"k": "k=", "seed": "seed ", "width": "width "}
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_CONTROLS, _OF_CONTROLS = ("neurons", "affine"), ("kind", "hookpoint", "k")
TELLING = ("kind", "k", "width", "activation", "side", "hookpoint", "train_tokens", "model", "seed")
"""What tells runs apart. A label has the kind, and what else differs among those that are shown."""


def against_l0(seeds: list[Row], key: str, baseline: str = "") -> Figure:
    """A line for each kind, width and so on, dashed by width, with 95 % intervals over seeds or, with one seed, over
    held-out documents. The L0 that was measured need not be the k that was asked for."""
    seeds = sorted((row for row in seeds if row.get(key) is not None), key=_l0)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(seeds, key=lambda row: row["width"]):
        groups.setdefault(tuple(row.get(name) for name in TELLING if name not in ("k", "seed")), []).append(row)
    for of, rows in list(groups.items()):  # what tells them apart is unknown, so nothing joins them
        if len({row["k"] for row in rows}) < len(rows) and rows[0]["kind"] not in _CONTROLS:
            groups |= {(*of, number): [row] for number, row in enumerate(rows)}
            del groups[of]
    firsts = [{name: value for name, value in rows[0].items() if name not in ("k", "seed")} for rows in groups.values()]
    data, shapes = [], []
    for rows, look in zip(groups.values(), looks(firsts, dashed="width"), strict=True):
        if rows[0]["kind"] == "affine":  # has no latents
            shapes.append(_level(rows[0][key], look["line"]["color"], look["name"]))
            continue
        data.append({**look, "mode": "lines+markers", "x": [_l0(r) for r in rows], **_with_bars(rows, key)})
    levels = {row[baseline] for row in seeds if baseline in row} if baseline else set()
    if len(levels) == 1:  # runs on different stores have no common line
        shapes.append(_level(levels.pop(), "#888", METRICS[baseline].short if baseline in METRICS else "baseline"))
    ks = sorted({row["k"] for row in seeds if row["k"]})
    x = {"title": "L0: latents that fire, per token", "type": "log", "tickvals": ks}
    return {"data": data, "layout": {"xaxis": x, "yaxis": {"title": METRICS[key].short}, "shapes": shapes}}


def against_fvu(rows: list[Row], key: str) -> Figure:
    """The paper's figure: a point for each coder, joined within a kind."""
    data = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        group = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["fvu"])
        (look,) = looks([{"kind": kind}])
        said = [row["run"] for row in group]
        x = [row["fvu"] for row in group]
        data.append({**look, "mode": "lines+markers", "x": x, "text": said, **_with_bars(group, key)})
    y = {"title": f"{key}, balanced accuracy"}
    return {
        "data": data,
        "layout": {"xaxis": {"title": "FVU"}, "yaxis": y, "shapes": [_level(0.5, "#888", "chance")]},
    }


def curves(rows: list[Row]) -> Figure:
    """Training FVU of runs against tokens."""
    data = []
    for row, look in zip(rows, looks(rows), strict=True):
        lines = RunDirectory(Path(row["run"])).metrics
        x, y = [line["tokens"] for line in lines], [line["fvu"] for line in lines]
        data.append({**look, "mode": "lines" if len(x) > 2 else "lines+markers", "x": x, "y": y})
    return {"data": data, "layout": {"xaxis": {"title": "tokens"}, "yaxis": {"title": "FVU", "type": "log"}}}


def densities(rows: list[Row]) -> Figure:
    """Histograms of firing densities, as ReconstructionMetrics gives them."""
    data, occupied = [], []
    for row, look in zip(rows, looks(rows), strict=True):
        edges, counts = row["density_histogram"]["log10_edges"], row["density_histogram"]["latents"]
        look["line"]["shape"] = "hv"
        data.append({**look, "mode": "lines", "x": edges, "y": [*counts, 0][: len(edges)]})
        occupied += [edge for edge, count in zip(edges, counts, strict=False) if count]
    x: dict[str, Any] = {"title": "log10 share of tokens"}
    if occupied:
        x["range"] = [min(occupied) - 0.25, 0.1]
    return {"data": data, "layout": {"xaxis": x, "yaxis": {"title": "latents"}}}


def telling(rows: Sequence[Row]) -> list[str]:
    """The keys of TELLING that differ; among the controls, kind, hookpoint and k alone count."""

    def values(name: str) -> set[Any]:
        some = rows if name in _OF_CONTROLS else [row for row in rows if row["kind"] not in _CONTROLS]
        return {row[name] for row in some if row.get(name) is not None}

    return [name for name in TELLING if len(values(name)) > 1]


def looks(rows: Sequence[Row], dashed: str = "k") -> list[dict[str, Any]]:
    """Name (no two alike), colour and dashes of a line for each row: a hue for each kind, shades of it for what else
    differs, dashes for `dashed`.

    >>> [look["name"] for look in looks([{"kind": "sae", "k": 8, "seed": 0}, {"kind": "sae", "k": 16, "seed": 0}])]
    ['sae k=8', 'sae k=16']
    """
    differ = telling(rows)
    names = [_name(row, differ) for row in rows]
    again = Counter(names)
    steps = sorted({row.get(dashed) or 0 for row in rows})
    shades: dict[str, dict[tuple[Any, ...], None]] = {}
    apart = [tuple(row.get(name) for name in differ if name not in ("kind", dashed)) for row in rows]
    for row, key in zip(rows, apart, strict=True):
        shades.setdefault(row["kind"], {}).setdefault(key)
    found = []
    for row, key, name in zip(rows, apart, names, strict=True):
        hue, saturation = _HUES.get(row["kind"], (280, 30))
        of = list(shades[row["kind"]])
        light = 50 if len(of) == 1 else 38 + 32 * of.index(key) / (len(of) - 1)
        dash = _DASHES[steps.index(row.get(dashed) or 0) % len(_DASHES)]
        if again[name] > 1:
            name += f" ({Path(str(row.get('run') or row.get('configuration'))).name})"
        line = {"color": f"hsl({hue},{saturation}%,{light:.0f}%)", "dash": dash, "width": 1.6}
        found.append({"type": "scatter", "name": name, "line": line, "marker": {"size": 6}})
    return found


def _name(row: Row, differ: Sequence[str]) -> str:
    words = [str(row["kind"]).replace("_", " ")]
    for name in differ:
        if (
            name != "kind"
            and (row["kind"] not in _CONTROLS or name in _OF_CONTROLS)
            and (value := row.get(name)) is not None
        ):
            shown = f"{value:,}" if isinstance(value, int) else str(value)
            words.append(_BEFORE.get(name, "") + shown + (" tokens" if name == "train_tokens" else ""))
    return " ".join(words)


def _l0(row: Row) -> float:
    return float(row.get("l0") or row["k"])


def _with_bars(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """y and its intervals."""
    y = [row[key] for row in rows]
    ends = [interval_of(row, key) or (row[key], row[key]) for row in rows]
    above = [max(high - v, 0) for v, (_, high) in zip(y, ends, strict=True)]
    below = [max(v - low, 0) for v, (low, _) in zip(y, ends, strict=True)]
    return {"y": y, "error_y": {"array": above, "arrayminus": below, "thickness": 1, "width": 3}}


def _level(y: float, colour: str, name: str) -> dict[str, Any]:
    """A dotted line across."""
    line = {"color": colour, "dash": "dot", "width": 1.2}
    label = {"text": name, "textposition": "end", "font": {"size": 10, "color": colour}}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line, "label": label}
