"""The figures of the report, drawn with matplotlib. Rows are those of the table."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from skipcoder.evals.stats.law import Law, Size
from skipcoder.evals.tables.metrics import METRICS, Row, interval_of
from skipcoder.trainer.run.run import RunDirectory

matplotlib.use("svg")  # needs no display, and text stays text
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

_COLOURS = {
    "sae": "#8a6d3b",
    "transcoder": "#2f6db3",
    "skip_transcoder": "#c2452d",
    "neurons": "#6b6f76",
    "affine": "#3a8f5c",
}
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "skipcoder",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
TELLING = ("hookpoint", "activation", "side")
"""Keys that distinguish runs besides kind, width and k, where they differ."""


def figure(draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as an SVG element."""
    figure, axes = plt.subplots(figsize=(5.6, 3.5), layout="constrained")
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def against_l0(axes: Axes, seeds: list[Row], key: str, baseline: str | None = None) -> None:
    """A line for each kind and width, with 95 % intervals over seeds or, with one seed, over held-out rows. The L0 that
    was measured need not be the k that was asked for."""
    seeds = [row for row in seeds if row.get(key) is not None]
    widths = sorted({row["width"] for row in seeds if row["kind"] not in ("neurons", "affine")})
    lines: dict[tuple[str, int, str], list[Row]] = {}
    telling = [key for key in TELLING if len({row.get(key) for row in seeds}) > 1]
    for row in sorted(seeds, key=_l0):
        apart = ", ".join(str(row[key]) for key in telling if row.get(key) is not None)
        lines.setdefault((row["kind"], row["width"], apart), []).append(row)
    ks = sorted({row["k"] for row in seeds if row["k"]})
    for (kind, width, apart), group in lines.items():
        style: dict[str, Any] = {
            "color": _COLOURS.get(kind, "#444"),
            "label": " ".join(filter(None, (kind.replace("_", " "), apart))),
        }
        if kind == "affine":
            axes.axhline(group[0][key], linestyle="-.", **style)
            continue
        if len(widths) > 1 and width in widths:
            style |= {
                "linestyle": ("-", "--", ":", "-.")[widths.index(width) % 4],
                "label": f"{style['label']}, {width:,}",
            }
        x, y = [_l0(r) for r in group], [r[key] for r in group]
        ends = [interval_of(r, key) or (r[key], r[key]) for r in group]
        bars = [
            [max(v - low, 0) for v, (low, _) in zip(y, ends, strict=True)],
            [max(high - v, 0) for v, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.4, elinewidth=1, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.margins(y=0.2)
    axes.set_xlabel("L0: latents that fire, per token")
    axes.set_ylabel(METRICS[key].short)
    levels = {row[baseline] for row in seeds if baseline in row} if baseline else set()
    if len(levels) == 1:  # runs on different stores have no common line
        axes.axhline(levels.pop(), color="#777", linestyle=":")
    axes.legend(fontsize=8)


def _l0(row: Row) -> float:
    return float(row.get("l0") or row["k"])


def against_fvu(axes: Axes, rows: list[Row], key: str) -> None:
    """The paper's figure: a point for each coder, joined within a kind."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        group = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["fvu"])
        x, y = [row["fvu"] for row in group], [row[key] for row in group]
        ends = [interval_of(row, key) or (row[key], row[key]) for row in group]
        bars = [
            [v - low for v, (low, _) in zip(y, ends, strict=True)],
            [high - v for v, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(
            x,
            y,
            yerr=bars,
            fmt="o-",
            markersize=4,
            capsize=2,
            color=_COLOURS.get(kind, "#444"),
            label=kind.replace("_", " "),
        )
    axes.axhline(0.5, color="#777", linestyle=":")
    axes.set_xlabel("FVU")
    axes.set_ylabel(f"{key}, balanced accuracy")
    axes.legend(fontsize=8)


def _look(row: Row, rows: list[Row]) -> dict[str, Any]:
    """One colour per kind, one line style per k."""
    ks = sorted({r["k"] for r in rows})
    return {
        "color": _COLOURS.get(row["kind"], "#444"),
        "linestyle": ("-", "--", ":", "-.")[ks.index(row["k"]) % 4],
        "label": f"{row['kind'].replace('_', ' ')} k={row['k']}",
    }


def curves(axes: Axes, rows: list[Row]) -> None:
    """Training FVU of runs against tokens."""
    for row in rows:
        lines = RunDirectory(Path(row["run"])).metrics
        axes.plot(
            [line["tokens"] / 1e3 for line in lines],
            [line["fvu"] for line in lines],
            linewidth=1.4,
            **_look(row, rows),
        )
    axes.set_yscale("log")
    axes.set_xlabel("thousand tokens")
    axes.set_ylabel("FVU")
    axes.legend(fontsize=8)


def densities(axes: Axes, rows: list[Row]) -> None:
    """Histograms of firing densities, as ReconstructionMetrics gives them."""
    occupied: list[float] = []
    for row in rows:
        edges, counts = row["density_histogram"]["log10_edges"], row["density_histogram"]["latents"]
        axes.stairs(counts, edges, linewidth=1.2, **_look(row, rows))
        occupied += [edge for edge, count in zip(edges, counts, strict=False) if count]
    if occupied:
        axes.set_xlim(min(occupied) - 0.25, 0.1)
    axes.set_xlabel("log10 share of tokens")
    axes.set_ylabel("latents")
    axes.legend(fontsize=8)


def write_scaling(path: Path, drawn: Sequence[tuple[str, str, Law, Sequence[Row]]]) -> None:
    """A figure of laws side by side: (title, metric, law, what was predicted)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(drawn), figsize=(5.6 * len(drawn), 3.8), layout="constrained", squeeze=False)
        for one, (title, key, law, predicted) in zip(axes[0], drawn, strict=True):
            against_width(one, law, key, predicted)
            one.set_title(title, fontsize=10)
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def against_width(axes: Axes, law: Law, key: str, predicted: Sequence[Row] = ()) -> None:
    """Measured runs as points, and the law as lines: a colour for each k, paler for fewer tokens. Predictions that were
    asked for are hollow, with their intervals, and crosses where they were measured since."""
    ks, lengths = (
        sorted({size[i] for size in law.sizes} | {row[n] for row in predicted}) for i, n in ((0, "k"), (2, "tokens"))
    )
    widths = [size.width for size in law.sizes] + [row["width"] for row in predicted]
    along = np.geomspace(min(widths), max(widths), 50)
    colours = dict(zip(ks, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(ks))), strict=True))
    shade = {tokens: 1 - 0.6 * (len(lengths) - 1 - i) / max(1, len(lengths) - 1) for i, tokens in enumerate(lengths)}
    for k in ks:
        for tokens in lengths:
            runs = [
                (s.width, loss) for s, loss in zip(law.sizes, law.loss_R, strict=True) if (s.k, s.tokens) == (k, tokens)
            ]
            style: dict[str, Any] = {"color": colours[k], "alpha": shade[tokens]}
            if runs or any((row["k"], row["tokens"]) == (k, tokens) for row in predicted):
                axes.plot(along, [law(Size(k, n, tokens)) for n in along], linewidth=1, **style)
            axes.plot([width for width, _ in runs], [loss for _, loss in runs], "o", markersize=4, **style)
        axes.plot([], [], "o-", color=colours[k], label=f"k = {k:g}")
    for row in predicted:
        low, high = row["ci"]
        bar = [[row["value"] - low], [high - row["value"]]]
        axes.errorbar(row["width"], row["value"], yerr=bar, fmt="o", mfc="none", capsize=3, color=colours[row["k"]])
        if row.get("measured") is not None:
            axes.plot(row["width"], row["measured"], "x", color=colours[row["k"]])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())
        axis.set_minor_formatter(ScalarFormatter())
    axes.set_xticks(sorted(set(widths)), [f"{width:,.0f}" for width in sorted(set(widths))])
    axes.set_xlabel("width: latents")
    axes.set_ylabel(METRICS[key].short)
    axes.legend(
        fontsize=8, title=f"{lengths[0]:,.0f} (pale) to {lengths[-1]:,.0f} tokens" if len(lengths) > 1 else None
    )
