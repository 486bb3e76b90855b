"""Evaluate trained coders: `python evals/evaluate.py run=DIR`, or `runs='GLOB' out=FILE` for a sweep."""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig

from skipcoder import cli
from skipcoder.cluster import deal
from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, TaskName
from skipcoder.files import refuse_unwritable
from skipcoder.settings import typed

if TYPE_CHECKING:
    from skipcoder.evals.core.evaluator import Evaluator
    from skipcoder.evals.tables.metrics import Row
    from skipcoder.pipeline.store.reader import ActivationStore
    from skipcoder.trainer.run.run import Run

ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)


def evaluate(cfg: EvaluateConfig, paths: Sequence[Path] | None = None) -> "list[Row]":
    """Evaluate every chosen run (those of `paths`, if given); with `out`, write the table and the report. Return the
    table."""
    cfg = as_set(cfg)
    # Imported here: torch and scikit-learn take seconds, and a wrong key should be refused at once.
    from skipcoder.evals.core import results
    from skipcoder.evals.core.controls import control_runs
    from skipcoder.evals.core.joint_splice import sets_of
    from skipcoder.evals.explain.records import judged
    from skipcoder.evals.tables import saebench
    from skipcoder.evals.tables.metrics import why_no_intervals
    from skipcoder.evals.tasks import labelled
    from skipcoder.evals.tasks.registry import TASKS
    from skipcoder.trainer.data.joined import open_stores
    from skipcoder.trainer.run.run import Run, find_runs

    for name in cfg.tasks:
        TASKS[name]  # UserError for an unknown name
    if paths is None:
        paths = [Path(cfg.run)] if cfg.run else find_runs(cfg.runs or "")
    if not cfg.run:
        paths = _finished(paths)
    for folder in [*filter(Path.is_dir, paths), *([Path(cfg.out).parent] if cfg.out else [])]:
        refuse_unwritable(folder)
    with ThreadPoolExecutor() as threads:
        runs = list(threads.map(Run.open, paths))
        list(threads.map(lambda run: run.weights, runs))  # a second for gigabytes
    stores = dict.fromkeys(run.stores for run in runs)
    here = replace(cfg, device=None) if cfg.ray.is_set else cfg  # where tasks measure, a GPU need not be here
    evaluators = {path: _evaluator(here, open_stores(*path)) for path in stores}
    for run in runs:
        run.check(evaluators[run.stores].store)
        results.read(run), judged(run)  # UserError for a damaged file, before anything is computed
    for evaluator in evaluators.values():
        if (cfg.together or cfg.controls) and not evaluator.predicts:
            raise UserError(
                f"together=, controls=: the model of {evaluator.store.place} predicts no next token; leave them out"
            )
    if cfg.together:
        sets_of(runs)
    if {TaskName.probing, TaskName.tpp, TaskName.scr} & set(cfg.tasks):
        labelled.bundled()
    apart = [run.path for run in runs] if cfg.ray.is_set else []
    found = deal(partial(_measure_apart, cfg), apart, cfg.ray.address, cfg.ray.tasks) if apart else []
    rows = {path: row for share, _ in found for path, row in share.items()}
    by_document = {path: of for _, share in found for path, of in share.items()}
    for path, evaluator in evaluators.items():
        of_it = [run for run in runs if run.stores == path]
        if cfg.controls:
            controls = control_runs(cfg.controls, of_it, evaluator.model, evaluator.store)
            of_it, runs = of_it + controls, runs + controls
        _measure(evaluator, [run for run in of_it if run.path not in apart], cfg, rows, by_document)
        if TaskName.core in cfg.tasks:
            for why in why_no_intervals(rows[of_it[0].path]):
                print(why, flush=True)
    if cfg.saebench is not None:
        for run in runs:
            if not run.is_control and not run.several and "ce_problem" not in rows[run.path]:
                saebench.write(run, rows[run.path], Path(cfg.saebench))
    runs = [run for run in runs if run.path in rows]  # the affine map takes part only in core
    table = [rows[run.path] for run in runs]
    if cfg.out is not None:
        from skipcoder.evals.tables.files import write_tables

        documents = [by_document[run.path] for run in runs]
        write_tables(Path(cfg.out), table, documents, runs, evaluators, cfg.together)
    return table


def _measure_apart(cfg: EvaluateConfig, paths: "Sequence[Path]") -> "tuple[dict[Path, Row], dict[Path, Any]]":
    """Measure some of the runs in a task of their own."""
    from skipcoder.trainer.data.joined import open_stores
    from skipcoder.trainer.run.run import Run

    runs = [Run.open(path) for path in paths]
    rows: dict[Path, Row] = {}
    by_document: dict[Path, Any] = {}
    for path in dict.fromkeys(run.stores for run in runs):
        evaluator = _evaluator(cfg, open_stores(*path))
        _measure(evaluator, [run for run in runs if run.stores == path], cfg, rows, by_document)
    return rows, by_document


def _evaluator(cfg: EvaluateConfig, store: "ActivationStore") -> "Evaluator":
    from skipcoder.evals.core.evaluator import Evaluator
    from skipcoder.trainer.run.device import pick_device

    device = pick_device(cfg.device, "device")
    intervals = cfg.intervals and TaskName.core in cfg.tasks
    return Evaluator(store, cfg.ce_tokens, cfg.batch_rows, device, intervals, cfg.every_position)


def _measure(
    evaluator: "Evaluator",
    runs: "Sequence[Run]",
    cfg: EvaluateConfig,
    rows: "dict[Path, Row]",
    by_document: "dict[Path, Any]",
) -> None:
    """Add each run's row and what it is by document, print it and write it into the run's directory."""
    from skipcoder.evals.core import results
    from skipcoder.evals.explain.records import judged
    from skipcoder.evals.tables.metrics import printed
    from skipcoder.evals.tasks.registry import run_tasks

    for run, result in run_tasks(evaluator, runs, cfg):
        by_document.setdefault(run.path, {}).update(result.pop(results.BY_DOCUMENT, {}))
        if not run.is_control:
            result = {**results.record(run, result), **judged(run)}
        names = {"run": str(run.path), "configuration": run.configuration}
        rows[run.path] = {**run.summary, **rows.get(run.path, {}), **result, **names}
        print(printed(rows[run.path]), flush=True)


def as_set(cfg: EvaluateConfig) -> EvaluateConfig:
    """Where `run` is a folder of runs, a set of coders: all of them, alone and together, with the table in that
    folder. Else `cfg`."""
    from skipcoder.trainer.coder.coder_set import coder_folders
    from skipcoder.trainer.run.run import CONFIG

    if cfg.run is None or not Path(cfg.run).is_dir() or (Path(cfg.run) / CONFIG).exists():
        return cfg
    coder_folders(Path(cfg.run))  # UserError if it holds none
    return replace(cfg, run=None, runs=f"{escape(cfg.run)}/*", out=str(Path(cfg.run) / "set.json"), together=True)


def _finished(paths: Sequence[Path]) -> list[Path]:
    """Those of the run directories that hold a finished run; the others are named. UserError if there is none."""
    from skipcoder.trainer.run.run import RunDirectory

    finished = [path for path in paths if RunDirectory(path).summary is not None]
    for path in paths:
        if path not in finished:
            print(f"{path} is no finished run and is left out", flush=True)
    if not finished:
        raise UserError(f"no finished run among {', '.join(map(str, paths))}; train one to its end")
    return finished


@hydra.main(version_base="1.3", config_path=cli.CONF, config_name="evaluate")
@cli.task
def main(cfg: DictConfig) -> None:
    """Hydra's entry point."""
    config = typed(cfg, EvaluateConfig)
    evaluate(config)


def cli_main() -> None:
    """Console script `skipcoder-evaluate`."""
    sys.exit(cli.run(main, "evaluate"))


if __name__ == "__main__":
    cli_main()
