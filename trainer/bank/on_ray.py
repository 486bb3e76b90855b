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

from skipcoder.cluster import cluster, cores_of_each
from skipcoder.errors import UserError
from skipcoder.trainer.bank.bank import Job, Outcome, train_bank
from skipcoder.trainer.bank.plan import Settings, plan
from skipcoder.trainer.coder.files import FOLDER
from skipcoder.trainer.data.ranks import TIMEOUT, OtherProcessError, backend

ATTEMPTS = 5
"""Times that a bank is started from the same save. Spot machines come and go; what fails by itself fails in vain."""
STOPPING_SECONDS = 120
"""Time that interrupted banks are given to finish a step and save."""


def train_on_ray(jobs: Sequence[Job], settings: Settings) -> list[Outcome]:
    """Train all jobs; each task has its own GPU or, where Ray has no GPU, an equal share of the cores."""
    with cluster(settings.address, show_output=True):
        import ray

        have = ray.cluster_resources()
        gpus, cpus = int(have.get("GPU", 0)), int(have.get("CPU", 1))
        most = max(map(settings.processes, jobs), default=1)
        if most > (gpus or cpus):
            raise UserError(
                f"{most} processes are to train a coder (train.shards, hydra.launcher.gpus_per_coder), each with a "
                f"{'GPU' if gpus else 'core'}, and this Ray has {gpus or cpus}; lower them"
            )
        banks, found = plan(jobs, settings, max(gpus, 1), together=not gpus)
        sizes = [settings.processes(bank[0]) for bank in banks]
        cores = cores_of_each(max(1, sum(sizes)), max(sizes, default=1))
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
        self.bank, self.size, self.gpu, self.cores = bank, size, gpu, cores
        self.attempt, self.saved = 0, self._saves()
        self.meeting: TCPStore | None = None
        self._start()

    def _start(self) -> None:
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        saved = self._saves()
        self.attempt, self.saved = (self.attempt if saved == self.saved else 0) + 1, saved
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
            self.running.append(task.remote(self.bank, self.cores, bool(self.gpu), os.getcwd(), meeting))

    def _saves(self) -> list[int]:
        """When each save of the bank's runs was made."""
        files = [file for _, directory in self.bank for file in sorted((directory / FOLDER / "state").glob("state*"))]
        return [file.stat().st_mtime_ns for file in files if file.exists()]

    def collect(self, task: Any) -> None:
        """Take what a task that has ended found; if it was lost, start all anew."""
        import ray

        self.running.remove(task)
        try:
            self.found.append(ray.get(task))
        except ray.exceptions.RayError as error:
            is_lost = not isinstance(error, ray.exceptions.RayTaskError)
            known = [o for share in self.found for o in share if isinstance(o.error, UserError)]
            if any(not isinstance(o.error, OtherProcessError) for o in known):  # the others ended after it
                is_lost = False
            for other in self.running:
                ray.cancel(other, force=True)  # it waits for the lost one
            ray.util.remove_placement_group(self.place)
            if is_lost and self.attempt < ATTEMPTS:
                print(f"a task of {self.bank[0].directory} was lost; it goes on from its last save")
                self._start()
                return
            self.running = []
            if not self.found:
                fault = RuntimeError(str(error))
                self.found = [[Outcome(directory, None, fault) for _, directory in self.bank]]
        if not self.running:
            ray.util.remove_placement_group(self.place)

    def outcomes(self) -> list[Outcome]:
        """Return one outcome of each run: of several errors the one that the others followed."""
        by_run = zip(*self.found, strict=True)
        return [min(each, key=lambda outcome: isinstance(outcome.error, OtherProcessError)) for each in by_run]


def _bank_task(
    bank: list[Job], cores: int, on_gpu: bool, directory: str, meeting: tuple[str, int, int, int] | None
) -> list[Outcome]:
    os.chdir(directory)  # relative paths are relative to the driver's
    os.environ["LOCAL_WORLD_SIZE"] = str(max(1, (os.cpu_count() or 1) // cores))  # how many may share this machine
    if not on_gpu:
        torch.set_num_threads(cores)
    if meeting is not None:
        host, port, rank, size = meeting
        os.environ["WORLD_SIZE"] = str(size)
        store = TCPStore(host, port, is_master=False, timeout=timedelta(minutes=5))
        dist.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    outcomes = train_bank(bank)
    if any(isinstance(o.error, torch.AcceleratorError) for o in outcomes):
        os._exit(1)  # the GPU is lost to this process
    # Exceptions of libraries may not survive the transfer to the driver.
    return [o if o.error is None else o._replace(error=_portable(o.error)) for o in outcomes]


def _portable(error: Exception) -> Exception:
    return error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
