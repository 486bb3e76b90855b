"""report.html: one self-contained page about a set of evaluated runs."""

import math
import os
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from matplotlib import pyplot as plt

from skipcoder.evals.stats.law import TooFewError, groups, law_of
from skipcoder.evals.stats.pairs import clear_best
from skipcoder.evals.tables import figures
from skipcoder.evals.tables.metrics import METRICS, Row, interval_of, why_no_intervals
from skipcoder.pipeline.capture.job import runs as capture_runs
from skipcoder.pipeline.store.attrs import compression_of
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import METRICS as METRICS_FILE

LATENTS = Path("features", "index.html")
"""Pages of a run's latents, if they have been made (features/pages.py)."""


def write(rows: list[Row], seeds: list[Row], pairs: list[Row], stores: dict[str, ActivationStore], path: Path) -> Path:
    """Write the page for evaluated runs (rows as in the table), their means over seeds, their paired differences, and
    their stores."""
    template = Path(__file__).with_name("report.html.j2").read_text()
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters["cell"] = _cell
    environment.filters["name"] = lambda run: Path(run).name
    environment.filters["with_interval"] = _with_interval
    with plt.rc_context(figures.STYLE):
        shown_figures = [
            (m.figure, m.caption, figures.figure(lambda a, m=m: figures.against_l0(a, seeds, m.key, m.baseline)))  # type: ignore[misc]
            for m in METRICS.values()
            if m.figure and any(row.get(m.key) is not None for row in seeds)
        ]
        shown_figures += [
            (
                f"Interpretability: {scorer}",
                "Balanced accuracy of the judge with the explanations, against FVU; 0.5 is chance. "
                + (
                    ""
                    if all(row["judge_usable"] for row in judged)
                    else "The judge did not pass its calibration: no evidence."
                ),
                figures.figure(lambda a, scorer=scorer: figures.against_fvu(a, judged, scorer)),  # type: ignore[misc]
            )
            for scorer in ("detection", "fuzzing")
            if (judged := [row for row in rows if row.get(scorer) is not None])
        ]
        trained = [row for row in rows if (Path(row["run"]) / METRICS_FILE).exists()]
        shown_figures += _scaling(trained)
        shown = _one_seed(trained)
        if shown:
            shown_figures += [
                (
                    "Training curves",
                    "Batch FVU against tokens seen; one seed.",
                    figures.figure(lambda a: figures.curves(a, shown)),
                ),
                (
                    "How often latents fire",
                    f"Latents by the share of {rows[0]['n']:,} test tokens they fire on, silent ones left out.",
                    figures.figure(lambda a: figures.densities(a, shown)),
                ),
            ]
    page = environment.from_string(template).render(
        rows=rows,
        seeds=seeds if len(seeds) < len(rows) else [],
        columns={key: key for key in figures.TELLING if len({row.get(key) for row in rows}) > 1}
        | {key: key for key in ("kind", "k", "width")}
        | {m.key: m.short for m in METRICS.values() if m.table and any(m.key in row for row in rows)},
        seed_columns={key: key for key in ("kind", "k", "width")}
        | {m.key: m.short for m in METRICS.values() if m.table and m.unit != "s" and any(m.key in r for r in seeds)},
        best=clear_best(pairs),
        pages={
            row["run"]: Path(os.path.relpath(Path(row["run"]) / LATENTS, path.parent)).as_posix()
            for row in rows
            if (Path(row["run"]) / LATENTS).exists()
        },
        seconds=sum((row.get("seconds") or 0) / row.get("bank_coders", 1) for row in rows),
        why=why_no_intervals(rows[0]),
        figures=shown_figures,
        stores=[_describe(store) for store in stores.values()],
        version=version("skipcoder"),
    )
    path.write_text(page)
    return path


def _scaling(rows: list[Row]) -> list[tuple[str, str, str]]:
    """A figure for each set of runs that a law can be fitted to."""
    found = []
    for key, group in groups(rows).items():
        with suppress(TooFewError):
            law = law_of(group, "fvu")
            title = " ".join(("FVU by size:", *key[1:3])).replace("_", " ")
            caption = f"{law.formula} for k, n latents and T tokens, fitted to {len(group)} runs (evals/scaling.py)."
            found.append((title, caption, figures.figure(lambda a, law=law: figures.against_width(a, law, "fvu"))))  # type: ignore[misc]
    return found


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("_", " ")


def _with_interval(row: Row, key: str) -> str:
    ends = interval_of(row, key)
    if not ends:
        return _cell(row.get(key))
    half = (ends[1] - ends[0]) / 2
    digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4  # two of the half width
    return f"{row[key]:.{digits}f} \u00b1 {half:.{digits}f}"


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
        "tokens": f"{tokens:,} in rows of {store.context}; "
        + ("no document is in two splits" if store.split_scheme else "documents cross from training to held-out text"),
        "disk": f"{size / 1e6:,.0f} MB, {size / tokens:,.0f} bytes per token "
        f"({identity['codec']}, {compression_of(store.attrs)})",
        "capture": f"{sum(c['seconds'] for c in captured):,.0f} s" if captured else "not recorded",
        "identity": store.attrs["identity_hash"],
    }


def _one_seed(rows: list[Row]) -> list[Row]:
    first = min((row["seed"] for row in rows), default=0)
    return [row for row in rows if row["seed"] == first]
