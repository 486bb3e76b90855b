"""A scaling law as a picture, drawn with matplotlib for pages that stand by themselves."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from skipcoder.evals.stats.law import Law, Size
from skipcoder.evals.tables.metrics import METRICS, Row

matplotlib.use("svg")  # needs no display, and text stays text
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import ScalarFormatter

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


def as_svg(law: Law, key: str) -> str:
    """A law of a metric as an SVG element."""
    buffer = io.StringIO()
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.6, 3.5), layout="constrained")
        against_width(axes, law, key)
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def write(path: Path, drawn: Sequence[tuple[str, str, Law, Sequence[Row]]]) -> None:
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
