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

_COLOURS = {"sae": "#8a6d3b", "transcoder": "#2f6db3", "skip_transcoder": "#c2452d"}
_STYLE: Any = {
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
    "seconds": "train s",
}


def write(rows: list[dict[str, Any]], stores: dict[str, ActivationStore], path: Path) -> Path:
    """Write the page for evaluated runs (rows as in the table) and the stores they were trained on."""
    template = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    with plt.rc_context(_STYLE):
        figures = [
            (
                "FVU against k",
                "Lower is better; the mean predictor has 1.",
                _figure(lambda a: _against_k(a, rows, "fvu")),
            ),
            (
                "Cross-entropy with the coder spliced in",
                "Nats per token; the dotted line is the untouched model.",
                _figure(lambda a: _against_k(a, rows, "ce_spliced", "ce_clean")),
            ),
            ("Training curves", "Batch FVU against tokens seen.", _figure(lambda a: _curves(a, rows))),
            (
                "How often latents fire",
                f"Latents by the share of {rows[0]['n']:,} held-out tokens they fire on, silent ones left out.",
                _figure(lambda a: _densities(a, rows)),
            ),
        ]
    page = environment.from_string(template).render(
        rows=rows,
        columns=COLUMNS,
        best={key: min(r[key] for r in rows) for key in ("fvu", "fvu_per_dim", "ce_spliced")},
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


def _by_kind(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {kind: sorted((r for r in rows if r["kind"] == kind), key=lambda r: r["k"]) for kind in kinds}


def _against_k(axes: Axes, rows: list[dict[str, Any]], key: str, baseline: str | None = None) -> None:
    for kind, group in _by_kind(rows).items():
        label = kind.replace("_", " ")
        axes.plot([r["k"] for r in group], [r[key] for r in group], "o-", color=_COLOURS[kind], label=label)
    ks = sorted({row["k"] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ks, [str(k) for k in ks])
    axes.minorticks_off()
    axes.margins(y=0.2)
    axes.set_xlabel("k")
    axes.set_ylabel(COLUMNS[key])
    levels = {row[baseline] for row in rows} if baseline else set()
    if len(levels) == 1:  # runs on different stores have no common line
        axes.axhline(levels.pop(), color="#777", linestyle=":", label="model untouched")
    axes.legend()


def _look(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One colour a kind, one line style a k."""
    ks = sorted({r["k"] for r in rows})
    return {
        "color": _COLOURS[row["kind"]],
        "linestyle": ("-", "--", ":", "-.")[ks.index(row["k"]) % 4],
        "label": f"{row['kind'].replace('_', ' ')} k={row['k']}",
    }


def _curves(axes: Axes, rows: list[dict[str, Any]]) -> None:
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


def _densities(axes: Axes, rows: list[dict[str, Any]]) -> None:
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
