"""The evaluations by name, and how the chosen ones are applied to a set of runs."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig, TaskName
from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.results import Result
from skipcoder.evals.tasks.texts import TextReader
from skipcoder.registry import Registry
from skipcoder.trainer.run.device import on_device
from skipcoder.trainer.run.run import Run

BYTES_AT_ONCE = 8 * 2**30
"""Largest total size of coders on the device while texts are read."""


@dataclass(frozen=True)
class Context:
    """What an evaluation is given besides the runs, which are of one hookpoint except for `core`."""

    evaluator: Evaluator
    cfg: EvaluateConfig
    hookpoint: str = ""

    @cached_property
    def reader(self) -> TextReader:
        """Runs the model over texts, up to the hookpoint."""
        store = self.evaluator.store
        facts, special = store.hookpoints[self.hookpoint], store.attrs["special_tokens"]
        return TextReader(self.evaluator.model, self.evaluator.tokenizer, facts, special)


Task = Callable[[Context, Sequence[Run]], Iterable[Result]]
"""Results in the order of the runs, whose coders are on the evaluator's device."""


# Imported here: scikit-learn takes two seconds, and core does without.


def _probing(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.probing import probing

    return probing(context.reader, runs, context.cfg.probing)


def _absorption(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.first_letter import first_letter

    return first_letter(context.reader, runs, context.cfg.absorption)


def _tpp(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.tpp import tpp

    return tpp(context.reader, runs, context.cfg.erasure)


def _scr(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.scr import scr

    return scr(context.reader, runs, context.cfg.erasure)


def _ravel(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.ravel import ravel

    return ravel(context.evaluator.model, context.reader, runs, context.cfg.ravel)


def _contextfree(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.contextfree import contextfree

    return contextfree(context.evaluator.store, context.hookpoint, runs, context.cfg.contextfree)


def _diff(context: Context, runs: Sequence[Run]) -> Iterable[Result]:
    from skipcoder.evals.tasks.model_diff import model_diff

    return model_diff(context.evaluator.store, runs)


TASKS: Registry[Task] = Registry(
    "tasks",
    {
        TaskName.core: lambda context, runs: context.evaluator.evaluate(runs),
        TaskName.probing: _probing,
        TaskName.absorption: _absorption,
        TaskName.tpp: _tpp,
        TaskName.scr: _scr,
        TaskName.ravel: _ravel,
        TaskName.contextfree: _contextfree,
        TaskName.diff: _diff,
    },
)


def run_tasks(evaluator: Evaluator, runs: Sequence[Run], cfg: EvaluateConfig) -> Iterator[tuple[Run, Result]]:
    """Yield each run with the results of one task, or of part of one, as they come."""
    if TaskName.core in cfg.tasks:
        yield from zip(runs, TASKS[TaskName.core](Context(evaluator, cfg), runs), strict=True)
    tasks = [name for name in cfg.tasks if name != TaskName.core]
    for hookpoint, several in dict.fromkeys((run.summary["hookpoint"], run.several) for run in runs):
        context = Context(evaluator, cfg, hookpoint)
        alike = [run for run in runs if (run.summary["hookpoint"], run.several) == (hookpoint, several)]
        of_it = [run for run in alike if run.coder.cfg.k]  # not affine
        each = max(4 * sum(p.numel() for p in run.coder.state_dict().values()) for run in of_it) if of_it else 1
        at_once = max(1, BYTES_AT_ONCE // each)
        for some in (of_it[i : i + at_once] for i in range(0, len(of_it), at_once)):
            with on_device([run.coder for run in some], evaluator.device):
                for name in tasks:
                    begun = time.perf_counter()
                    try:
                        if name != TaskName.diff:
                            some[0].refuse_several(name)
                        results = list(TASKS[name](context, some))
                    except UserError as error:  # about this model or text; the other tasks still run
                        print(f"{name}: {error}")
                        results = [{f"{name}_problem": str(error)} for _ in some]
                    seconds = round((time.perf_counter() - begun) / len(some), 2)
                    for run, result in zip(some, results, strict=True):
                        yield run, result | {f"{name}_seconds": seconds}
