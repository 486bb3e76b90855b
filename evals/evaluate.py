"""Evaluate trained coders: `python evals/evaluate.py run=DIR`, or `runs='GLOB' out=FILE` for a sweep."""

import json
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig
from skipcoder.evals.config import EvaluateConfig, Task
from skipcoder.pipeline import cli

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def evaluate(cfg: EvaluateConfig) -> None:
    """Evaluate every chosen run; with `out`, write the table and the report."""
    from skipcoder.evals import labelled, saebench
    from skipcoder.evals.run import Evaluator, Run
    from skipcoder.evals.tasks import judged, record, run_tasks
    from skipcoder.evals.together import sets_of
    from skipcoder.pipeline.store import ActivationStore
    from skipcoder.trainer.assemble import pick_device
    from skipcoder.trainer.checkpoint import find_runs

    paths = [Path(cfg.run)] if cfg.run else find_runs(cfg.runs or "")
    runs = [Run.open(path) for path in paths]
    device = pick_device(cfg.device, "device")
    evaluators: dict[str, Evaluator] = {}
    for path in dict.fromkeys(run.store_path for run in runs):
        store = ActivationStore.open(path)
        evaluators[path] = Evaluator(
            store, cfg.ce_tokens, cfg.batch_rows, device, cfg.intervals and Task.core in cfg.tasks
        )
    for run in runs:
        evaluators[run.store_path].check(run)
    if cfg.together:
        sets_of(runs)
    if {Task.probing, Task.tpp, Task.scr} & set(cfg.tasks):
        labelled.bundled()
    rows: dict[Path, dict[str, Any]] = {}
    for path, evaluator in evaluators.items():
        of_it = [run for run in runs if run.store_path == path]
        if cfg.controls:
            from skipcoder.evals.controls import control_runs

            controls = control_runs(cfg.controls, of_it, evaluator.model, evaluator.store)
            of_it, runs = of_it + controls, runs + controls
        for run, result in run_tasks(evaluator, of_it, cfg):
            if not run.is_control:
                result = record(run, result) | judged(run)
            names = {"run": str(run.path), "configuration": run.configuration}
            rows[run.path] = {**run.summary, **rows.get(run.path, {}), **result, **names}
            print(_line(rows[run.path]), flush=True)
    if cfg.saebench is not None:
        for run in runs:
            if not run.is_control:
                saebench.write(run, rows[run.path], Path(cfg.saebench))
    if cfg.out is not None:
        runs = [run for run in runs if run.path in rows]  # the affine map takes part in core alone
        table = [rows[run.path] for run in runs]
        _write_tables(cfg, Path(cfg.out), table, runs, evaluators)


def _write_tables(
    cfg: EvaluateConfig, out: Path, table: list[dict[str, Any]], runs: list[Any], evaluators: dict[str, Any]
) -> None:
    from skipcoder.evals import report
    from skipcoder.evals.seeds import over_seeds
    from skipcoder.evals.together import spliced_together

    out.parent.mkdir(parents=True, exist_ok=True)
    wrote = [out, out.with_suffix(".parquet"), out.with_suffix(".seeds.json"), out.with_name("report.html")]
    _write_json(table, out)
    _write_parquet(table, wrote[1])
    seeds = over_seeds(table, [None if run.is_control else run for run in runs])
    _write_json(seeds, wrote[2])
    if cfg.together:
        rows = [
            row
            for path, evaluator in evaluators.items()
            for row in spliced_together(evaluator, [r for r in runs if r.store_path == path and not r.is_control])
        ]
        wrote.append(out.with_suffix(".together.json"))
        _write_json(rows, wrote[-1])
        for row in rows:
            print(f"{len(row['hookpoints'])} MLPs spliced at once: {_line(row)}")
    if all("fvu" in row for row in table):
        report.write(table, seeds, {path: evaluator.store for path, evaluator in evaluators.items()}, wrote[3])
    else:
        wrote.remove(out.with_name("report.html"))
        print("no report: it shows reconstruction first, and not all of these runs have been evaluated with task core")
    print(f"wrote {', '.join(map(str, wrote))}")


def _write_json(table: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n")


def _write_parquet(table: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = dict.fromkeys(key for row in table for key in row)  # not all kinds have all
    pq.write_table(pa.table({key: [row.get(key) for row in table] for key in columns}), path)


_SHOWN = {
    "fvu": "FVU", "dead_fraction": "dead", "ce_clean": "CE", "ce_spliced": "spliced", "ce_recovered_zero": "recovered",
    "probing_k1": "probing k=1", "absorption_full": "absorption", "tpp_20": "TPP 20", "scr_20": "SCR 20",
    "ravel_disentangle": "RAVEL",
}  # fmt: skip


def _line(row: dict[str, Any]) -> str:
    facts = [f"{label} {_share(row[key])}" for key, label in _SHOWN.items() if key in row]
    return f"{row.get('run', '')} {row['kind']} k={row['k']}  {'  '.join(facts)}".strip()


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="evaluate")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry."""
    config = cli.typed(cfg, EvaluateConfig)
    evaluate(config)


def cli_main() -> None:
    """Console script `skipcoder-evaluate`."""
    sys.exit(cli.run(main))


if __name__ == "__main__":
    cli_main()
