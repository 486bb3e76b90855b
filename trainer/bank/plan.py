"""Which coders of a sweep are trained together: grouped by stream, packed by memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skipcoder.errors import UserError
from skipcoder.trainer.bank import memory
from skipcoder.trainer.bank.bank import Job, Outcome, stream_key
from skipcoder.trainer.run.build import open_store
from skipcoder.trainer.run.device import pick_device


@dataclass(frozen=True)
class Settings:
    """The settings described in BankLauncherConf."""

    ray: bool | None = None
    address: str | None = None
    memory_gib: float | None = None
    gpus_per_coder: int | None = None

    def processes(self, job: Job) -> int:
        """Return how many processes train a job."""
        return self.gpus_per_coder or job.cfg.train.shards


class Plan(NamedTuple):
    """A sweep as banks."""

    banks: list[list[Job]]
    refused: list[Outcome]
    """The outcomes of jobs that fit in no bank."""


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
        places = max(1, devices // settings.processes(group[0]))
        banks += [[fitting[i] for i in bank] for bank in memory.pack(needs, budget, places)]
    for number, bank in enumerate(banks, 1):
        print(f"bank {number} of {len(banks)}: {len(bank)} coder{'s' if len(bank) > 1 else ''} on one stream")
    return Plan(banks, refused)
