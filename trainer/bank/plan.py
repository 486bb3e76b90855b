"""Which coders of a sweep are trained together: grouped by stream, then by the hookpoints that they have in common,
packed by memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import memory
from skipcoder.trainer.bank.bank import Job, Outcome, stream_key
from skipcoder.trainer.run.build import hookpoints, open_store
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
    alike: dict[object, list[Job]] = {}
    stores: dict[object, ActivationStore] = {}
    for cfg, directory in jobs:
        try:
            if settings.address is None:
                pick_device(cfg.train.device)
            place = cfg.store.path, cfg.store.other
            if place not in stores:
                stores[place] = open_store(cfg)
            cfg.store.path = str(stores[place].place)
            key = stream_key(cfg, hookpoints(cfg, stores[place]))
        except UserError:  # the bank reports it
            banks.append([Job(cfg, directory)])
            continue
        stores[key] = stores[place]
        alike.setdefault(key, []).append(Job(cfg, directory))
    groups = [(some, stores[key]) for key, group in alike.items() for some in _overlapping(group, stores[key])]
    for group, store in groups:
        device = pick_device(group[0].cfg.train.device) if settings.address is None else "there"
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


def _overlapping(jobs: Sequence[Job], store: ActivationStore) -> list[list[Job]]:
    """Return the jobs in groups without a hookpoint in common: to read them together would save nothing."""
    groups: list[tuple[set[str], list[Job]]] = []
    for job in jobs:
        names, joined = set(hookpoints(job.cfg, store)), [job]
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, joined = names | group[0], [*group[1], *joined]
        groups.append((names, joined))
    return [group for _, group in groups]
