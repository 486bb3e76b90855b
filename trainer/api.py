"""`skipcoder.train`: trainer/train.py from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.settings import as_typed, refuse_unknown
from skipcoder.trainer.bank.bank import Job
from skipcoder.trainer.bank.sweep import Settings, run_sweep
from skipcoder.trainer.coder.coder import SparseCoder
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
    refuse_unknown("training", settings, TrainConfig, "store", "coder", "run")
    place = str(store.place if isinstance(store, ActivationStore) else store)
    many = [coder] if isinstance(coder, CoderConfig) else list(coder)
    folders = [Path(folder)] if isinstance(coder, CoderConfig) else [Path(folder, str(i)) for i in range(len(many))]
    jobs = [
        Job(as_typed(TrainConfig(store=StoreRef(place), coder=one, run=RunConfig(str(where)), **settings)), where)
        for one, where in zip(many, folders, strict=True)
    ]
    for outcome in run_sweep(jobs, Settings()):
        if outcome.error is not None:
            raise outcome.error
    trained = [SparseCoder.load(where) for where in folders]
    return trained[0] if isinstance(coder, CoderConfig) else trained
