"""report.html: one self-contained page about a set of evaluated runs."""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from skipcoder.evals.stats.law import TooFewError, groups, law_of
from skipcoder.evals.stats.pairs import clear_best
from skipcoder.evals.tables import figures, law_figure
from skipcoder.evals.tables.metrics import METRICS, Row, interval_of, why_no_intervals
from skipcoder.pipeline.capture.job import runs as capture_runs
from skipcoder.pipeline.store.attrs import compression_of
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import METRICS as METRICS_FILE

LATENTS = Path("features", "index.html")
"""Pages of a run's latents, if they have been made (features/pages.py)."""


def write(rows: list[Row], seeds: list[Row], pairs: list[Row], stores: list[ActivationStore], path: Path) -> Path:
    """Write the page for evaluated runs (rows as in the table), their means over seeds, their paired differences, and
    their stores."""
    here = Path(__file__)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    digits = _digits([*rows, *seeds])
    environment.filters["cell"] = lambda row, key: _cell(row, key, digits)
    environment.filters["name"] = lambda run: Path(run).name.rpartition(":")[2]  # controls are "STORE:HOOKPOINT:NAME"
    page = environment.from_string(here.with_name("report.html.j2").read_text()).render(
        rows=rows,
        seeds=seeds if len(seeds) < len(rows) else [],
        columns={"kind": "kind", "k": "k", "width": "width"}
        | {key: key for key in figures.telling(rows)}
        | {m.key: m.short for m in METRICS.values() if m.table and any(m.key in row for row in rows)},
        seed_columns={"kind": "kind", "k": "k", "width": "width"}
        | {key: key for key in figures.telling(seeds) if key != "seed"}
        | {m.key: m.short for m in METRICS.values() if m.table and m.unit != "s" and any(m.key in r for r in seeds)},
        best=clear_best(pairs),
        pages={
            row["run"]: Path(os.path.relpath(Path(row["run"]) / LATENTS, path.parent)).as_posix()
            for row in rows
            if (Path(row["run"]) / LATENTS).exists()
        },
        seconds=sum((row.get("seconds") or 0) / row.get("bank_coders", 1) for row in rows),
        why=why_no_intervals(rows[0]),
        figures=_finite(_figures(rows, seeds)),
        stores=[_describe(store) for store in stores],
        version=version("skipcoder"),
        plotly=get_plotlyjs(),
        script=here.with_name("report.js").read_text(),
    )
    path.write_text(page)
    return path


def _figures(rows: list[Row], seeds: list[Row]) -> list[tuple[str, str, figures.Figure | str]]:
    """Title, caption and figure (Plotly's, or an SVG element)."""
    found: list[tuple[str, str, figures.Figure | str]] = [
        (m.figure, m.caption, figures.against_l0(seeds, m.key, m.baseline))
        for m in METRICS.values()
        if m.figure and any(row.get(m.key) is not None for row in seeds)
    ]
    for scorer in ("detection", "fuzzing"):
        if judged := [row for row in rows if row.get(scorer) is not None]:
            usable = all(row["judge_usable"] for row in judged)
            caption = "Balanced accuracy of the judge with the explanations, against FVU. "
            caption += "" if usable else "The judge did not pass its calibration: no evidence."
            found.append((f"Interpretability: {scorer}", caption, figures.against_fvu(judged, scorer)))
    trained = [row for row in rows if (Path(row["run"]) / METRICS_FILE).exists()]
    for key, group in groups(trained).items():
        with suppress(TooFewError):
            law = law_of(group, "fvu")
            title = " ".join(("FVU by size:", *key[1:3])).replace("_", " ")
            caption = f"{law.formula} for k, n latents and T tokens, fitted to {len(group)} runs (evals/scaling.py)."
            found.append((title, caption, law_figure.as_svg(law, "fvu")))
    if shown := _one_seed(trained):
        density = f"Latents by the share of {rows[0]['n']:,} test tokens they fire on, silent ones left out."
        found += [
            ("Training curves", "Batch FVU against tokens seen; one seed.", figures.curves(shown)),
            ("How often latents fire", density, figures.densities(shown)),
        ]
    return found


def _finite(value: Any) -> Any:
    """None for numbers that JSON does not have, as a run that diverged leaves them."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(row: Row, key: str, digits: Mapping[str, int]) -> str:
    """A value with its interval or, without one, with as many decimals as its column has."""
    value, ends = row.get(key), interval_of(row, key)
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value).replace("_", " ")
    if not ends:
        return f"{value:.{digits[key]}f}"
    half = (ends[1] - ends[0]) / 2
    own = max(0, 1 - math.floor(math.log10(half))) if half > 0 else 4  # two of the half width
    return f"{value:.{own}f} \u00b1 {half:.{own}f}"


def _digits(rows: Sequence[Row]) -> dict[str, int]:
    """Decimals that show three digits of a column's largest value."""
    found = {}
    for key in {key for row in rows for key, value in row.items() if isinstance(value, float)}:
        largest = max(abs(row[key]) for row in rows if isinstance(row.get(key), float))
        found[key] = min(6, max(0, 2 - math.floor(math.log10(largest)))) if 0 < largest < math.inf else 1
    return found


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
