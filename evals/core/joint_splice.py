"""Splice the coders of several layers at once: how much of the model is left when many MLPs are replaced."""

from collections.abc import Mapping, Sequence
from itertools import combinations

from skipcoder.errors import UserError
from skipcoder.evals.core.ce_kl import summary
from skipcoder.evals.core.evaluator import Evaluator
from skipcoder.evals.core.passes import Part
from skipcoder.evals.core.results import BY_DOCUMENT, Result
from skipcoder.trainer.run.device import on_device
from skipcoder.trainer.run.run import Run

_SAME = ("kind", "k", "width", "activation", "side", "seed")


def spliced_together(evaluator: Evaluator, runs: Sequence[Run], fvu: Mapping[str, float | None]) -> list[Result]:
    """Cross-entropy and KL for each set of runs that differ only in their hookpoint: all spliced, all ablated, all
    reduced to their skips; and the FVU of each alone, from `fvu` by path."""
    rows = []
    for some in sets_of(runs):
        parts: dict[tuple[str], list[Part]] = {}
        with on_device([run.coder for run in some], evaluator.device):
            for run in some:
                for name, one in evaluator.replacements(run).items():
                    parts.setdefault((name,), []).extend(one.parts)
            losses = evaluator.losses(parts)
        row: Result = {key: value for key, value in some[0].summary.items() if key in _SAME}
        row["hookpoints"] = [run.summary["hookpoint"] for run in some]
        row["fvu_by_hookpoint"] = [fvu.get(str(run.path)) for run in some]
        found = {key[0]: of for key, of in losses.items() if key is not None}
        result = summary(losses[None], found, evaluator.predicted_BT)
        result.pop(BY_DOCUMENT, None)
        rows.append(row | result)
    return rows


def sets_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs that differ only in their hookpoint; UserError where two of a group replace the same MLP."""
    sets: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        run.refuse_several("together=true")
        sets.setdefault((run.store_path, *(str(run.summary.get(key)) for key in _SAME)), []).append(run)
    for some in sets.values():
        for a, b in combinations(some, 2):
            if a.summary["hookpoint"] == b.summary["hookpoint"]:
                raise UserError(f"together=true: {a.path} and {b.path} replace the same MLP; narrow runs=")
    return list(sets.values())
