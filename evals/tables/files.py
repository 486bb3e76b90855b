"""The tables of an evaluation: JSON, Parquet, means over seeds, paired differences, coders spliced together, the
report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.joint_splice import spliced_together
from skipcoder.evals.stats.pairs import ByDocument, pairs
from skipcoder.evals.stats.seeds import over_seeds, seed_pairs
from skipcoder.evals.tables import report
from skipcoder.evals.tables.metrics import METRICS, Row, printed
from skipcoder.trainer.run.run import Run


def write_tables(
    out: Path,
    table: list[Row],
    by_document: Sequence[Mapping[str, ByDocument]],
    runs: Sequence[Run],
    evaluators: Mapping[tuple[str, str | None], Evaluator],
    together: bool,
) -> None:
    """Write `out` (NAME.json) and the files beside it, and print their names. `table` has one row per run, and
    `by_document` its numbers by document."""
    out.parent.mkdir(parents=True, exist_ok=True)
    wrote = [out, out.with_suffix(".parquet"), out.with_suffix(".seeds.json")]
    _write_json(table, out)
    _write_parquet(table, wrote[1])
    seeds = over_seeds(table, [None if run.is_control else run for run in runs])
    _write_json(seeds, wrote[2])
    alike = [(run.stores, run.summary["hookpoint"], run.filter, run.writes) for run in runs]
    differences = pairs(table, by_document, alike)
    told = list(dict.fromkeys(key for found in by_document for key in found))
    differences += seed_pairs(table, [run.seeds for run in runs], alike, told)
    if differences:
        wrote.append(out.with_suffix(".pairs.json"))
        _write_json(differences, wrote[-1])
    page = out.with_name("report.html")
    if all("fvu" in row for row in table):
        report.write(table, seeds, differences, [evaluator.store for evaluator in evaluators.values()], page)
        wrote.append(page)
    else:
        print("no report: it shows reconstruction first, and not all of these runs have been evaluated with task core")
    if together:
        fvu = {row["run"]: row.get("fvu") for row in table}
        rows = [
            row
            for stores, evaluator in evaluators.items()
            for row in spliced_together(evaluator, [r for r in runs if r.stores == stores and not r.is_control], fvu)
        ]
        wrote.append(out.with_suffix(".together.json"))
        _write_json(rows, wrote[-1])
        for row in rows:
            print(f"{len(row['hookpoints'])} MLPs spliced at once: {printed(row)}")
    print(f"wrote {', '.join(map(str, wrote))}")


def _write_json(table: list[Row], path: Path) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n")


def _write_parquet(table: list[Row], path: Path) -> None:
    """Columns that are metrics carry their title, unit and direction as metadata."""
    columns = dict.fromkeys(key for row in table for key in row)  # not every kind has every key
    found = pa.table({key: [row.get(key) for row in table] for key in columns})
    for place, field in enumerate(found.schema):
        if (metric := METRICS.get(field.name)) is not None:
            facts = {"title": metric.title, "unit": metric.unit, "better": metric.better}
            found = found.set_column(place, field.with_metadata(facts), found.column(place))
    pq.write_table(found, path)
