"""A sweep as banks: group the jobs by stream, pack the groups by memory, train one bank after another, or all at once
on Ray."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from skipcoder.pipeline import cli
from skipcoder.pipeline.errors import UserError
from skipcoder.trainer import memory
from skipcoder.trainer.assemble import open_store, pick_device
from skipcoder.trainer.bank import Outcome, stream_key, train_bank
from skipcoder.trainer.config import TrainConfig

Job = tuple[TrainConfig, Path]


@dataclass(frozen=True)
class Settings:
    """See BankLauncherConf."""

    ray: bool | None = None
    address: str | None = None
    memory_gib: float | None = None


def run_sweep(jobs: Sequence[Job], settings: Settings) -> list[Outcome]:
    """Train all jobs; outcomes in their order."""
    gpus = torch.cuda.device_count()
    on_ray = settings.ray if settings.ray is not None else gpus > 1 or settings.address is not None
    banks = list(plan(jobs, settings, max(gpus, 1) if on_ray else 1))
    for number, bank in enumerate(banks, 1):
        print(f"bank {number} of {len(banks)}: {len(bank)} coder{'s' if len(bank) > 1 else ''} on one stream")
    found = _on_ray(banks, settings) if on_ray else [outcome for bank in banks for outcome in train_bank(bank)]
    by_directory = {outcome.directory: outcome for outcome in found}
    return [by_directory[directory] for _, directory in jobs]


def plan(jobs: Sequence[Job], settings: Settings, devices: int) -> Iterator[list[Job]]:
    """The banks, each a list of jobs."""
    groups: dict[object, list[Job]] = {}
    for cfg, directory in jobs:
        if cfg.store.path is None:
            open_store(cfg)  # finds it, and writes the path into cfg
        groups.setdefault(stream_key(cfg), []).append((cfg, directory))
    for group in groups.values():
        cfg = group[0][0]
        device = pick_device(cfg.train.device)
        try:
            store = open_store(cfg)
            facts = store.hookpoints[store.hookpoint(cfg.hookpoint)]
        except UserError:  # the bank reports it for each of its jobs
            yield group
            continue
        budget = settings.memory_gib * memory.GIB if settings.memory_gib else 0.9 * memory.free_bytes(device)
        needs = [memory.need(cfg, facts["d_in"], facts["d_out"]) for cfg, _ in group]
        for (cfg, _), one in zip(group, needs, strict=True):
            if memory.bank_bytes([one]) > budget:
                raise UserError(
                    f"coder.width={cfg.coder.width} takes about {memory.bank_bytes([one]) / memory.GIB:.1f} GiB to "
                    f"train, {device} has {budget / memory.GIB:.1f} GiB for it; lower the width"
                )
        for bank in memory.pack(needs, budget, devices):
            yield [group[i] for i in bank]


def _on_ray(banks: list[list[Job]], settings: Settings) -> list[Outcome]:
    """Every bank is a Ray task with a GPU of its own, or, where Ray has none, with an equal share of the cores."""
    from skipcoder.pipeline.cluster import cluster

    with cluster(settings.address):
        import ray

        have = ray.cluster_resources()
        gpu = 1 if have.get("GPU") else 0
        cores = max(1, int(have.get("CPU", 1)) // max(1, len(banks) if not gpu else int(have["GPU"])))
        task = ray.remote(num_gpus=gpu, num_cpus=cores, max_retries=2)(_bank_task)
        waiting = [task.remote(bank, None if gpu else cores) for bank in banks]
        return [outcome for part in ray.get(waiting) for outcome in part]


def _bank_task(bank: list[Job], threads: int | None) -> list[Outcome]:
    if threads:
        torch.set_num_threads(threads)
    outcomes = train_bank(bank)
    # Exceptions of libraries may not survive the way to the driver.
    return [o if o.error is None else o._replace(error=_portable(o.error)) for o in outcomes]


def _portable(error: Exception) -> Exception:
    return error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")


def report_failures(failures: Sequence[tuple[str, Exception]]) -> None:
    """Name every failure and leave with the exit code for them; return if there is none."""
    if not failures:
        return
    for name, error in failures:
        print(f"error: {name}: {error}", file=sys.stderr)
    sys.exit(cli.BAD_INPUT if all(isinstance(error, UserError) for _, error in failures) else cli.FAILED)
