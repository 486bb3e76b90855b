"""`skipcoder.evaluate`: evals/evaluate.py from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipcoder.errors import UserError
from skipcoder.evals import evaluate as program
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.tables.metrics import Row
from skipcoder.settings import as_typed, refuse_unknown
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.coder_set import SparseCoderSet, coder_folders
from skipcoder.trainer.run.run import CONFIG, find_runs

One = str | Path | SparseCoder | SparseCoderSet
"""A run's folder, a folder or glob of several, or a coder or set that was trained or loaded from one."""


def evaluate(runs: One | Sequence[One], **settings: Any) -> list[Row]:
    """Evaluate coders on the test text of their stores. Returns a row for each, and for each control, as in the table
    that `out=FILE` writes: `pandas.DataFrame(rows)` shows them.

    settings    the other fields of EvaluateConfig: tasks, ce_tokens, controls, out, ...

    UserError for bad input, as on the command line.
    """
    refuse_unknown("an evaluation", settings, EvaluateConfig, "run", "runs")
    one_or_many = [runs] if isinstance(runs, str | Path | SparseCoder | SparseCoderSet) else list(runs)
    paths = [path for one in one_or_many for path in _folders(one)]
    # What `runs` says is not read where paths are given; `out` asks for it.
    return program.evaluate(as_typed(EvaluateConfig(runs=", ".join(map(str, paths)), **settings)), paths)


def _folders(one: One) -> list[Path]:
    if isinstance(one, SparseCoderSet):
        return [folder for coder in one.values() for folder in _folders(coder)]
    if not isinstance(one, SparseCoder):
        if not Path(one).is_dir():
            return find_runs(str(one))
        return [Path(one)] if (Path(one) / CONFIG).exists() else coder_folders(Path(one))
    if one.folder is None:
        raise UserError(f"{one!r} comes from no run's folder: only runs, which know their store, can be evaluated")
    return [one.folder]
