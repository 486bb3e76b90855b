"""Train a sweep as banks: group the jobs by stream, pack the groups by memory, and train one bank after another, or
all at once on Ray."""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.pipeline.model.hookpoints import matching
from skipcoder.trainer.bank.bank import Job, Outcome, refuse_shared_directories, train_bank
from skipcoder.trainer.bank.on_ray import train_on_ray
from skipcoder.trainer.bank.plan import Settings, plan
from skipcoder.trainer.config import RunConfig
from skipcoder.trainer.run.build import open_store


class Failure(NamedTuple):
    """A job that failed."""

    name: str
    error: Exception
    trace: str
    """Where an unforeseen error came from."""


def spread(job: Job, always: bool = False) -> list[Job]:
    """Return the jobs that one stands for: itself or, where its hookpoint is a glob (`layers.*.mlp`) or `always`, one
    for each hookpoint of the store that matches, in a folder of its name. A crosscoder or CLT is one over all of them.
    UserError if none does."""
    pattern = job.cfg.hookpoint
    if pattern is None or job.cfg.coder.over_hookpoints or not (always or set(pattern) & set("*?[{")):
        return [job]
    store = open_store(job.cfg)
    names = matching(pattern, store.hookpoints)
    if not names:
        raise UserError(f"hookpoint={pattern}: {store.place} holds {', '.join(store.hookpoints)}; none of them matches")
    folders = [job.directory / name for name in names]
    return [
        Job(replace(job.cfg, hookpoint=name, run=RunConfig(str(folder))), folder)
        for name, folder in zip(names, folders, strict=True)
    ]


def run_sweep(jobs: Sequence[Job], settings: Settings) -> list[Outcome]:
    """Train all jobs; return their outcomes in the same order."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1  # torchrun's processes share each coder
    several = (alone and torch.cuda.device_count() > 1) or settings.address is not None
    several = several or (alone and any(settings.processes(job) > 1 for job in jobs))
    for job in jobs:
        if settings.processes(job) % job.cfg.train.shards:
            facts = f"{settings.gpus_per_coder} must be a multiple of train.shards={job.cfg.train.shards}"
            raise UserError(f"hydra.launcher.gpus_per_coder={facts}")
    refuse_shared_directories(jobs)
    if settings.address is not None and settings.memory_gib is None:
        raise UserError("hydra.launcher.address needs hydra.launcher.memory_gib: the memory of one of its devices")
    if settings.ray if settings.ray is not None else several:
        found = train_on_ray(jobs, settings)
    else:
        banks, found = plan(jobs, settings, 1)
        found += [outcome for bank in banks for outcome in train_bank(bank)]
    by_directory = {outcome.directory: outcome for outcome in found}
    return [by_directory[directory] for _, directory in jobs]


def report(outcomes: Sequence[Outcome]) -> None:
    """Print the failures among the outcomes and exit with their code, if there are any."""
    report_failures([Failure(str(o.directory), o.error, o.trace) for o in outcomes if o.error is not None])


def report_failures(failures: Sequence[Failure]) -> None:
    """Print all failures and exit with their code, if there are any."""
    if not failures:
        return
    for failure in failures:
        print(failure.trace, file=sys.stderr, end="")
        print(f"error: {failure.name}: {failure.error}", file=sys.stderr)
    foreseen = all(isinstance(failure.error, UserError) for failure in failures)
    sys.exit(cli.BAD_INPUT if foreseen else cli.FAILED)
