"""Train a sweep as banks: group the jobs by stream, pack the groups by memory, and train one bank after another, or
all at once on Ray."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import filter as matching
from typing import NamedTuple

import torch

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.trainer.bank import memory
from skipcoder.trainer.bank.bank import Job, Outcome, refuse_shared_directories, stream_key, train_bank
from skipcoder.trainer.config import RunConfig
from skipcoder.trainer.run.build import open_store
from skipcoder.trainer.run.device import pick_device

STOPPING_SECONDS = 120
"""Time that interrupted banks are given to finish a step and save."""


@dataclass(frozen=True)
class Settings:
    """The settings described in BankLauncherConf."""

    ray: bool | None = None
    address: str | None = None
    memory_gib: float | None = None


class Plan(NamedTuple):
    """A sweep as banks."""

    banks: list[list[Job]]
    refused: list[Outcome]
    """The outcomes of jobs that fit in no bank."""


class Failure(NamedTuple):
    """A job that failed."""

    name: str
    error: Exception
    trace: str
    """Where an unforeseen error came from."""


def spread(job: Job, always: bool = False) -> list[Job]:
    """Return the jobs that one stands for: itself or, where its hookpoint is a glob (`layers.*.mlp`) or `always`, one
    for each hookpoint of the store that matches, in a folder of its name. UserError if none does."""
    pattern = job.cfg.hookpoint
    if pattern is None or not (always or set(pattern) & set("*?[")):
        return [job]
    store = open_store(job.cfg)
    names = matching(store.hookpoints, pattern)
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
    refuse_shared_directories(jobs)
    if settings.address is not None and settings.memory_gib is None:
        raise UserError("hydra.launcher.address needs hydra.launcher.memory_gib: the memory of one of its devices")
    if settings.ray if settings.ray is not None else several:
        found = _on_ray(jobs, settings)
    else:
        banks, found = plan(jobs, settings, 1)
        found += [outcome for bank in banks for outcome in train_bank(bank)]
    by_directory = {outcome.directory: outcome for outcome in found}
    return [by_directory[directory] for _, directory in jobs]


def plan(jobs: Sequence[Job], settings: Settings, devices: int, together: bool = False) -> Plan:
    """Print and return the banks. `together`: all banks share one memory at the same time."""
    banks: list[list[Job]] = []
    refused: list[Outcome] = []
    groups: dict[object, list[Job]] = {}
    for cfg, directory in jobs:
        if cfg.store.path is None:
            open_store(cfg)  # finds the store and writes its path into cfg
        groups.setdefault(stream_key(cfg), []).append(Job(cfg, directory))
    for group in groups.values():
        cfg = group[0].cfg
        try:
            device = pick_device(cfg.train.device) if settings.address is None else "there"
            store = open_store(cfg)
            store.hookpoint(cfg.hookpoint)
        except UserError:  # the bank reports it for each of its jobs
            banks.append(group)
            continue
        budget = settings.memory_gib * memory.GIB if settings.memory_gib else 0.9 * memory.free_bytes(device)
        budget /= len(groups) if together else 1
        needs, fitting = [], []
        for job in group:
            try:
                needs.append(memory.refuse_too_large(job.cfg, store, budget, device))
                fitting.append(job)
            except UserError as error:
                refused.append(Outcome(job.directory, None, error))
        banks += [[fitting[i] for i in bank] for bank in memory.pack(needs, budget, devices)]
    for number, bank in enumerate(banks, 1):
        print(f"bank {number} of {len(banks)}: {len(bank)} coder{'s' if len(bank) > 1 else ''} on one stream")
    return Plan(banks, refused)


def _on_ray(jobs: Sequence[Job], settings: Settings) -> list[Outcome]:
    """Run every bank as a Ray task with its own GPU or, where Ray has no GPU, with an equal share of the cores."""
    from skipcoder.cluster import cluster

    with cluster(settings.address, show_output=True):
        import ray

        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        banks, found = plan(jobs, settings, max(gpus, 1), together=not gpus)
        gpu = min(gpus, 1)
        cores = max(1, int(have.get("CPU", 1)) // max(1, gpus or len(banks)))
        task = ray.remote(num_gpus=gpu, num_cpus=cores, max_retries=2)(_bank_task)
        waiting = [task.remote(bank, None if gpu else cores, os.getcwd()) for bank in banks]
        try:
            for bank, one in zip(banks, waiting, strict=True):
                try:
                    found += ray.get(one)  # type: ignore[arg-type]
                except ray.exceptions.RayError as error:  # a worker died repeatedly
                    found += [Outcome(directory, None, RuntimeError(str(error))) for _, directory in bank]
        except KeyboardInterrupt:
            for one in waiting:
                ray.cancel(one)  # acts as Ctrl-C in the task: the bank saves and ends
            ray.wait(waiting, num_returns=len(waiting), timeout=STOPPING_SECONDS)
            raise
        return found


def _bank_task(bank: list[Job], threads: int | None, directory: str) -> list[Outcome]:
    os.chdir(directory)  # relative paths are relative to the driver's
    if threads:
        torch.set_num_threads(threads)
    outcomes = train_bank(bank)
    # Exceptions of libraries may not survive the transfer to the driver.
    return [o if o.error is None else o._replace(error=_portable(o.error)) for o in outcomes]


def _portable(error: Exception) -> Exception:
    return error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")


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
