"""Train the banks of a sweep as Ray tasks: one for each bank or, where a coder is spread over several GPUs, as many.

A bank that loses a task, because a worker, a GPU or a machine is lost, goes on from its last save, wherever there is
room.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from skipcoder.cluster import cluster
from skipcoder.errors import UserError
from skipcoder.trainer.bank.bank import Job, Outcome, train_bank
from skipcoder.trainer.bank.plan import Settings, plan
from skipcoder.trainer.data.ranks import TIMEOUT, OtherProcessError, backend

ATTEMPTS = 5
"""Times that a bank is started. Spot machines come and go; what fails by itself fails as often in vain."""
STOPPING_SECONDS = 120
"""Time that interrupted banks are given to finish a step and save."""


def train_on_ray(jobs: Sequence[Job], settings: Settings) -> list[Outcome]:
    """Train all jobs; each task has its own GPU or, where Ray has no GPU, an equal share of the cores."""
    with cluster(settings.address, show_output=True):
        import ray

        have = ray.cluster_resources()
        gpus = int(have.get("GPU", 0))
        banks, found = plan(jobs, settings, max(gpus, 1), together=not gpus)
        sizes = [settings.processes(bank[0]) for bank in banks]
        cores = max(1, int(have.get("CPU", 1)) // max(1, gpus or sum(sizes)))
        gangs = [_Gang(bank, size, min(gpus, 1), cores) for bank, size in zip(banks, sizes, strict=True)]
        waiting: list[Any] = []
        try:
            while waiting := [task for gang in gangs for task in gang.running]:
                (done,), _ = ray.wait(waiting, num_returns=1)
                for gang in gangs:
                    if done in gang.running:
                        gang.collect(done)
        except KeyboardInterrupt:
            for task in waiting:
                ray.cancel(task)  # acts as Ctrl-C in the task: the bank saves and ends
            ray.wait(waiting, num_returns=len(waiting), timeout=STOPPING_SECONDS)
            raise
        return found + [outcome for gang in gangs for outcome in gang.outcomes()]


class _Gang:
    """The tasks that train one bank together."""

    def __init__(self, bank: list[Job], size: int, gpu: int, cores: int) -> None:
        self.bank, self.size, self.gpu, self.cores, self.attempt = bank, size, gpu, cores, 0
        self.meeting: TCPStore | None = None
        self._start()

    def _start(self) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self.attempt += 1
        self.found: list[list[Outcome]] = []
        self.place = placement_group(
            [{"GPU": self.gpu, "CPU": self.cores} if self.gpu else {"CPU": self.cores}] * self.size
        )
        address = ray.util.get_node_ip_address()
        if self.size > 1:
            self.meeting = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.running: list[Any] = []
        for rank in range(self.size):
            task = ray.remote(num_gpus=self.gpu, num_cpus=self.cores, max_retries=0, max_calls=1)(_bank_task).options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.place, placement_group_bundle_index=rank)
            )
            meeting = (address, self.meeting.port, rank, self.size) if self.meeting else None
            self.running.append(task.remote(self.bank, None if self.gpu else self.cores, os.getcwd(), meeting))

    def collect(self, task: Any) -> None:
        """Take what a task that has ended found; if it was lost, start all anew."""
        import ray

        self.running.remove(task)
        try:
            self.found.append(ray.get(task))
        except ray.exceptions.RayError as error:
            is_lost = not isinstance(error, ray.exceptions.RayTaskError)
            for other in self.running:
                ray.cancel(other, force=True)  # it waits for the lost one
            ray.util.remove_placement_group(self.place)
            if is_lost and self.attempt < ATTEMPTS:
                print(f"a task of {self.bank[0].directory} was lost; it goes on from its last save")
                self._start()
                return
            self.running = []
            fault = RuntimeError(str(error))
            self.found = [[Outcome(directory, None, fault) for _, directory in self.bank]]
        if not self.running:
            ray.util.remove_placement_group(self.place)

    def outcomes(self) -> list[Outcome]:
        """Return one outcome of each run: of several errors the one that the others followed."""
        by_run = zip(*self.found, strict=True)
        return [min(each, key=lambda outcome: isinstance(outcome.error, OtherProcessError)) for each in by_run]


def _bank_task(
    bank: list[Job], threads: int | None, directory: str, meeting: tuple[str, int, int, int] | None
) -> list[Outcome]:
    os.chdir(directory)  # relative paths are relative to the driver's
    if threads:
        torch.set_num_threads(threads)
    if meeting is not None:
        host, port, rank, size = meeting
        os.environ["WORLD_SIZE"] = str(size)
        store = TCPStore(host, port, is_master=False, timeout=timedelta(minutes=5))
        dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    outcomes = train_bank(bank)
    # Exceptions of libraries may not survive the transfer to the driver.
    return [o if o.error is None else o._replace(error=_portable(o.error)) for o in outcomes]


def _portable(error: Exception) -> Exception:
    return error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
