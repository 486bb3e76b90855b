"""Which evaluations are asked for, and every run's results of them."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from skipcoder.evals.config import EvaluateConfig, Task
from skipcoder.evals.erasure import scr, tpp
from skipcoder.evals.first_letter import first_letter
from skipcoder.evals.probing import probing
from skipcoder.evals.ravel import ravel
from skipcoder.evals.run import Evaluator, Run
from skipcoder.evals.texts import TextReader
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.place import write_atomically

BYTES_AT_ONCE = 8 * 2**30
"""Of coders on the device together while texts are read."""


def run_tasks(evaluator: Evaluator, runs: Sequence[Run], cfg: EvaluateConfig) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with the results of one task, or of part of one, as they come."""
    if Task.core in cfg.tasks:
        yield from evaluator.evaluate(runs)
    tasks = [task for task in cfg.tasks if task is not Task.core]
    for hookpoint in dict.fromkeys(run.summary["hookpoint"] for run in runs):
        of_it = [run for run in runs if run.summary["hookpoint"] == hookpoint and run.coder.cfg.k]  # not affine
        each = max(4 * sum(p.numel() for p in run.coder.state_dict().values()) for run in of_it) if of_it else 1
        at_once = max(1, BYTES_AT_ONCE // each)
        for some in (of_it[i : i + at_once] for i in range(0, len(of_it), at_once)):
            for run in some:
                run.coder.to(evaluator.device)
            for task in tasks:
                begun = time.perf_counter()
                try:
                    results = _function(task, evaluator, hookpoint, cfg)(some)
                except UserError as error:  # of this model or text; what else was asked is not lost
                    print(f"{task.value}: {error}")
                    results = [{f"{task.value}_problem": str(error)} for _ in some]
                seconds = round((time.perf_counter() - begun) / len(some), 2)
                for run, result in zip(some, results, strict=True):
                    yield run, result | {f"{task.value}_seconds": seconds}
            for run in some:
                run.coder.cpu()


def _function(task: Task, evaluator: Evaluator, hookpoint: str, cfg: EvaluateConfig) -> Callable[[Sequence[Run]], Any]:
    store = evaluator.store
    reader = TextReader(
        evaluator.model, evaluator.tokenizer, store.hookpoints[hookpoint], store.attrs["special_tokens"]
    )
    return {
        Task.probing: lambda runs: probing(reader, runs, cfg.probing),
        Task.absorption: lambda runs: first_letter(reader, runs, cfg.absorption),
        Task.tpp: lambda runs: tpp(reader, runs, cfg.erasure),
        Task.scr: lambda runs: scr(reader, runs, cfg.erasure),
        Task.ravel: lambda runs: ravel(evaluator.model, reader, runs, cfg.ravel),
    }[task]


def record(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    """Add results to the run's evaluation.json, which keeps what other tasks found of these weights."""
    file, weights = run.path / "evaluation.json", run.weights
    found: dict[str, Any] = {}
    if file.exists():
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = {}
    if found.get("weights") != weights:
        found = {}
    result = found | result | {"weights": weights}
    write_atomically(file, json.dumps(result, indent=2).encode())
    return result


def judged(run: Run) -> dict[str, Any]:
    """What interpret.py found of these weights: `detection` and `fuzzing` (balanced accuracy) with their intervals, and
    whether the judge could judge."""
    try:
        found = json.loads((run.path / "interpretation" / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    if found["weights"] != run.weights:
        return {}
    row: dict[str, Any] = {"judge": found["judge"], "judge_usable": found["calibration"]["usable"]}
    for scorer in ("detection", "fuzzing"):
        if scorer in found:
            row |= {scorer: found[scorer]["balanced_accuracy"], f"{scorer}_ci": found[scorer]["balanced_accuracy_ci"]}
    return row
