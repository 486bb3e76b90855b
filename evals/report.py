"""report.html: one self-contained page about a set of evaluated runs."""

import io
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from skipcoder.pipeline.job import runs as capture_runs
from skipcoder.pipeline.store import ActivationStore

matplotlib.use("svg")  # no display, and text stays text
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

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
COLUMNS = {
    "kind": "kind",
    "k": "k",
    "width": "width",
    "fvu": "FVU",
    "fvu_per_dim": "FVU per dim",
    "cosine": "cosine",
    "l0": "L0",
    "dead_fraction": "dead",
    "ce_spliced": "CE spliced",
    "ce_recovered_zero": "recovered (zero)",
    "ce_recovered_mean": "recovered (mean)",
    "ce_skip_only": "CE skip only",
    "probing_k1": "probing k=1",
    "probing_k5": "probing k=5",
    "absorption_full": "absorption",
    "absorption_fraction": "absorbed fraction",
    "split_latents": "split latents",
    "tpp_20": "TPP 20",
    "scr_20": "SCR 20",
    "ravel_disentangle": "RAVEL",
    "shared_latents": "shared by seeds",
    "detection": "detection",
    "fuzzing": "fuzzing",
    "seconds": "train s",
}
TELLING = ("hookpoint", "activation", "side")
"""What tells runs apart beside kind, width and k, where it differs."""
BEST = ("fvu", "fvu_per_dim", "ce_spliced")
FRONTS = {
    "fvu": ("FVU", "Lower is better; the mean predictor has 1.", None),
    "ce_spliced": (
        "Cross-entropy with the coder spliced in",
        "Nats; the dotted line is the untouched model.",
        "ce_clean",
    ),
    "ce_recovered_zero": (
        "Cross-entropy recovered",
        "Share of what zeroing the MLP costs; 1 is the untouched model.",
        None,
    ),
    "probing_k1": (
        "Sparse probing, one latent",
        "Accuracy on test texts; the dotted line is a dense probe on the MLP's output.",
        "probing_dense_y",
    ),
    "absorption_full": (
        "Feature absorption",
        "Share of words whose first letter is fully absorbed; lower is better.",
        None,
    ),
    "shared_latents": ("Latents that two seeds share", "Matched one to one; cosine of at least 0.7.", None),
}
"""What is drawn against k where it was measured: title, caption, the row's key of a common line."""


def write(
    rows: list[dict[str, Any]], seeds: list[dict[str, Any]], stores: dict[str, ActivationStore], path: Path
) -> Path:
    """Write the page for evaluated runs (rows as in the table), their means over seeds, and their stores."""
    template = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    environment.filters["with_interval"] = _with_interval
    with plt.rc_context(STYLE):
        figures = [
            (title, caption, _figure(lambda a, key=key, line=line: _against_k(a, seeds, key, line)))  # type: ignore[misc]
            for key, (title, caption, line) in FRONTS.items()
            if any(row.get(key) is not None for row in seeds)
        ]
        figures += [
            (
                f"Interpretability: {scorer}",
                "Balanced accuracy of the judge with the explanations, against FVU; 0.5 is chance. "
                + (
                    ""
                    if all(row["judge_usable"] for row in judged)
                    else "The judge did not pass its calibration: no evidence."
                ),
                _figure(lambda a, scorer=scorer: _against_fvu(a, judged, scorer)),  # type: ignore[misc]
            )
            for scorer in ("detection", "fuzzing")
            if (judged := [row for row in rows if row.get(scorer) is not None])
        ]
        trained = [row for row in rows if (Path(row["run"]) / "metrics.jsonl").exists()]
        shown = _one_seed(trained)
        if shown:
            figures += [
                ("Training curves", "Batch FVU against tokens seen; one seed.", _figure(lambda a: curves(a, shown))),
                (
                    "How often latents fire",
                    f"Latents by the share of {rows[0]['n']:,} held-out tokens they fire on, silent ones left out.",
                    _figure(lambda a: densities(a, shown)),
                ),
            ]
    page = environment.from_string(template).render(
        rows=rows,
        seeds=seeds if len(seeds) < len(rows) else [],
        columns={key: key for key in TELLING if len({row.get(key) for row in rows}) > 1}
        | {key: title for key, title in COLUMNS.items() if any(key in row for row in rows)},
        seed_columns={
            key: title for key, title in COLUMNS.items() if key != "seconds" and any(key in r for r in seeds)
        },
        best={key: min(r[key] for r in rows if r["kind"] not in ("neurons", "affine")) for key in BEST},
        figures=figures,
        stores=[_describe(store) for store in stores.values()],
        version=version("skipcoder"),
    )
    path.write_text(page)
    return path


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("_", " ")


def _with_interval(row: dict[str, Any], key: str) -> str:
    ends = row.get(f"{key}_ci")
    return _cell(row.get(key)) if not ends else f"{_cell(row[key])} \u00b1 {(ends[1] - ends[0]) / 2:.2g}"


def _describe(store: ActivationStore) -> dict[str, Any]:
    identity = store.attrs["identity"]
    captured = capture_runs(store.place)
    size = sum(shard["bytes"] for record in store.commits.values() for shard in record.shards.values())
    tokens = store.rows * store.context
    return {
        "model": f"{store.attrs['model']['name']} ({identity['model']['id']}, {identity['model']['dtype']})",
        "hookpoints": ", ".join(
            f"{name}: {h['d_in']} in, {h['d_out']} out"
            + (f" (output of {h['write']})" if h["write"] != h["read"] else "")
            for name, h in store.hookpoints.items()
        ),
        "text": " ".join(filter(None, (identity["data"]["kind"], identity["data"]["place"]))),
        "tokens": f"{tokens:,} in rows of {store.context}; every sixteenth unit held out",
        "disk": f"{size / 1e6:,.0f} MB, {size / tokens:,.0f} bytes per token "
        f"({identity['codec']}, {identity['compression']})",
        "capture": f"{sum(c['seconds'] for c in captured):,.0f} s" if captured else "not recorded",
        "identity": store.attrs["identity_hash"],
    }


def _figure(draw: Callable[[Axes], None]) -> str:
    figure, axes = plt.subplots(figsize=(5.6, 3.5), layout="constrained")
    draw(axes)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    plt.close(figure)
    return buffer.getvalue()[buffer.getvalue().index("<svg") :]


def _one_seed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = min((row["seed"] for row in rows), default=0)
    return [row for row in rows if row["seed"] == first]


def _against_k(axes: Axes, seeds: list[dict[str, Any]], key: str, baseline: str | None = None) -> None:
    """A line for each kind and width, with 95 % intervals: over seeds, or with one seed over held-out rows."""
    seeds = [row for row in seeds if row.get(key) is not None]
    widths = sorted({row["width"] for row in seeds if row["kind"] not in ("neurons", "affine")})
    lines: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    telling = [key for key in TELLING if len({row.get(key) for row in seeds}) > 1]
    for row in sorted(seeds, key=lambda row: row["k"]):
        apart = ", ".join(str(row[key]) for key in telling if row.get(key) is not None)
        lines.setdefault((row["kind"], row["width"], apart), []).append(row)
    ks = sorted({row["k"] for row in seeds if row["k"]})
    for (kind, width, apart), group in lines.items():
        style: dict[str, Any] = {
            "color": _COLOURS[kind],
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
        x, y = [r["k"] for r in group], [r[key] for r in group]
        ends = [r.get(f"{key}_ci") or [r[key], r[key]] for r in group]
        bars = [
            [max(v - low, 0) for v, (low, _) in zip(y, ends, strict=True)],
            [max(high - v, 0) for v, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(x, y, yerr=bars, marker="o", markersize=4, capsize=2, linewidth=1.4, elinewidth=1, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.margins(y=0.2)
    axes.set_xlabel("k")
    axes.set_ylabel(COLUMNS[key])
    levels = {row[baseline] for row in seeds if baseline in row} if baseline else set()
    if len(levels) == 1:  # runs on different stores have no common line
        axes.axhline(levels.pop(), color="#777", linestyle=":")
    axes.legend(fontsize=8)


def _against_fvu(axes: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """The paper's figure: a point for each coder, joined by k."""
    for kind in dict.fromkeys(row["kind"] for row in rows):
        group = sorted((row for row in rows if row["kind"] == kind), key=lambda row: row["fvu"])
        x, y = [row["fvu"] for row in group], [row[key] for row in group]
        ends = [row.get(f"{key}_ci") or [row[key], row[key]] for row in group]
        bars = [
            [v - low for v, (low, _) in zip(y, ends, strict=True)],
            [high - v for v, (_, high) in zip(y, ends, strict=True)],
        ]
        axes.errorbar(
            x, y, yerr=bars, fmt="o-", markersize=4, capsize=2, color=_COLOURS[kind], label=kind.replace("_", " ")
        )
    axes.axhline(0.5, color="#777", linestyle=":")
    axes.set_xlabel("FVU")
    axes.set_ylabel(f"{key}, balanced accuracy")
    axes.legend(fontsize=8)


def _look(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One colour a kind, one line style a k."""
    ks = sorted({r["k"] for r in rows})
    return {
        "color": _COLOURS[row["kind"]],
        "linestyle": ("-", "--", ":", "-.")[ks.index(row["k"]) % 4],
        "label": f"{row['kind'].replace('_', ' ')} k={row['k']}",
    }


def curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """Training FVU of runs against tokens."""
    for row in rows:
        lines = [json.loads(line) for line in (Path(row["run"]) / "metrics.jsonl").read_text().splitlines()]
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


def densities(axes: Axes, rows: list[dict[str, Any]]) -> None:
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
