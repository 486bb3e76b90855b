"""`skipcoder.train`, `skipcoder.train_set`: trainer/train.py from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.settings import as_typed, refuse_unknown
from skipcoder.trainer.bank.bank import Job
from skipcoder.trainer.bank.plan import Settings
from skipcoder.trainer.bank.sweep import run_sweep, spread
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.coder_set import SparseCoderSet
from skipcoder.trainer.config import CoderConfig, RunConfig, StoreRef, TrainConfig


@overload
def train(
    store: str | Path | ActivationStore, coder: CoderConfig, folder: str | Path, **settings: Any
) -> SparseCoder: ...
@overload
def train(
    store: str | Path | ActivationStore, coder: Sequence[CoderConfig], folder: str | Path, **settings: Any
) -> list[SparseCoder]: ...
def train(
    store: str | Path | ActivationStore,
    coder: CoderConfig | Sequence[CoderConfig],
    folder: str | Path,
    **settings: Any,
) -> SparseCoder | list[SparseCoder]:
    """Train one coder, whose run directory is `folder`, or many in one pass over the store, in folder/0, folder/1, ...

    settings    the other fields of TrainConfig: hookpoint, train=LoopConfig(tokens=...), optim=OptimConfig(...), loss,
                encode, stream, seed

    A run that was interrupted goes on, one that is finished is loaded. `evaluate` takes the coders, or their folders.
    UserError for bad input, as on the command line.
    """
    many = [coder] if isinstance(coder, CoderConfig) else list(coder)
    folders = [Path(folder)] if isinstance(coder, CoderConfig) else [Path(folder, str(i)) for i in range(len(many))]
    _run([_job(store, one, where, settings) for one, where in zip(many, folders, strict=True)])
    trained = [SparseCoder.load(where) for where in folders]
    return trained[0] if isinstance(coder, CoderConfig) else trained


def train_set(
    store: str | Path | ActivationStore,
    coder: CoderConfig,
    folder: str | Path,
    hookpoints: str = "*",
    **settings: Any,
) -> SparseCoderSet:
    """Train one coder for each hookpoint of the store that the glob matches, in folder/HOOKPOINT; otherwise as
    `train`."""
    _run(spread(_job(store, coder, Path(folder), settings | {"hookpoint": hookpoints}), always=True))
    return SparseCoderSet.load(folder)


def _job(store: str | Path | ActivationStore, coder: CoderConfig, folder: Path, settings: dict[str, Any]) -> Job:
    refuse_unknown("training", settings, TrainConfig, "store", "coder", "run")
    place = StoreRef(str(store.place if isinstance(store, ActivationStore) else store))
    return Job(as_typed(TrainConfig(store=place, coder=coder, run=RunConfig(str(folder)), **settings)), folder)


def _run(jobs: Sequence[Job]) -> None:
    for outcome in run_sweep(jobs, Settings()):
        if outcome.error is not None:
            raise outcome.error
