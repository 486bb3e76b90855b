"""Drive a capture with Ray Data: a dataset of unit numbers, a pool of actors that hold the model.

The comments tell what was tried; the order of the start-up calls matters.
"""

import json
import logging
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from typing_extensions import TypedDict

from skipcoder.cluster import cluster
from skipcoder.errors import UserError
from skipcoder.pipeline.config import ModelConfig, RayConfig
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.attrs import Attributes, widths_of
from skipcoder.pipeline.store.place import Place
from skipcoder.progress import progress
from skipcoder.records import checked


def run(store: Place, attrs: Attributes, units: list[int], model: ModelConfig, cfg: RayConfig) -> None:
    """Capture `units` of the laid-out store. Every unit is committed before it is counted."""
    begun, captured, ended = time.perf_counter(), 0, 0.0
    first_at, first_tokens = 0.0, 0  # the rate leaves out the start of Ray and the loading of the model
    tokens_of = {
        u: len(layout.unit_token_rows(u, attrs["rows"], attrs["identity"]["unit_rows"])) * attrs["identity"]["context"]
        for u in units
    }
    bytes_per_token = sum(2 * sum(widths_of(facts).values()) for facts in attrs["hookpoints"].values())

    def rate() -> float:
        return (captured - first_tokens) / max(time.perf_counter() - first_at, 1e-9)

    try:
        with cluster(cfg.address), progress("capture", sum(tokens_of.values())) as advance:
            ray_up = time.perf_counter() - begun
            for unit, loading, seconds in _results(store, units, model, cfg):
                captured += tokens_of[unit]
                if not first_at:
                    first_at, first_tokens = time.perf_counter(), captured
                    after = first_at - begun
                    print(
                        f"the first unit after {after:.1f} s: Ray {ray_up:.1f}, a worker and what it imports "
                        f"{after - ray_up - loading - seconds:.1f}, the model {loading:.1f}, the unit {seconds:.1f}"
                    )
                ended = rate()
                speed = {"tokens/s": f"{ended:,.0f}", "MB/s": f"{ended * bytes_per_token / 1e6:.1f}"}
                advance(tokens_of[unit], **speed)
    finally:
        if captured:
            with suppress(OSError, UserError):  # the folder may not be writable
                _log(store, captured, time.perf_counter() - begun, ended)


class CaptureRun(TypedDict):
    """One line of NAME.capture.jsonl: a capture that was run."""

    ended: str
    tokens: int
    seconds: float
    tokens_per_second: int
    """From the end of the first unit on."""


def runs(store: Place) -> list[CaptureRun]:
    """The captures that were run on a store; lines that are damaged are left out."""
    try:
        lines = store.parent.read(_log_file(store)).splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):  # UserError is one
            found.append(checked(CaptureRun, json.loads(line), _log_file(store), ""))
    return found


def _log_file(store: Place) -> str:
    """Name of the log beside the store, whose own bytes hold no times."""
    return f"{store.stem}.capture.jsonl"


def _log(store: Place, tokens: int, seconds: float, rate: float) -> None:
    entry: CaptureRun = {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(rate),
    }
    lines = "".join(json.dumps(line) + "\n" for line in [*runs(store), entry])
    store.parent.write(_log_file(store), lines.encode())


def _results(store: Place, units: list[int], model: ModelConfig, cfg: RayConfig) -> Iterator[tuple[int, float, float]]:
    """Unit numbers as they are committed, in any order; the seconds in which the worker loaded the model, and the
    unit's."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    from skipcoder.pipeline.capture.worker import Worker

    cpus, gpus = _share(cfg)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    calls = cfg.writers or (4 if gpus else 1)
    # from_items, not range: range's read operator needs a core of its own and hangs beside an actor
    # that takes the whole machine.
    results = ray.data.from_items(units).map_batches(
        Worker,
        fn_constructor_args=(store.address, model, cpus, "cuda" if gpus else "cpu"),
        batch_size=1,
        compute=ActorPoolStrategy(
            min_size=1,  # begin when the first is up
            max_size=cfg.workers,
            initial_size=cfg.workers,
            max_tasks_in_flight_per_actor=calls + 1,  # the next unit's number arrives before it is needed
            max_concurrent_calls_per_actor=calls,
            enable_true_multi_threading=calls > 1,
        ),
        num_cpus=cpus,
        num_gpus=gpus,
        resources=dict(cfg.resources),
    )
    for batch in _explained(results.iter_batches(batch_size=None, prefetch_batches=0)):
        columns = (batch[name] for name in ("unit", "error", "loading", "seconds"))
        for unit, error, loading, seconds in zip(*columns, strict=True):
            if error:
                raise UserError(str(error))
            yield int(unit), float(loading), float(seconds)


def _explained(batches: Iterable[Any]) -> Iterator[Any]:
    """Re-raise a UserError from a worker (its model cannot be loaded, its tokens are damaged) as itself."""
    import ray

    try:
        yield from batches
    except ray.exceptions.RayError as error:
        found = re.search(r"UserError: (.+)", str(error))
        if found is None:
            raise
        raise UserError(found.group(1)) from None


def _share(cfg: RayConfig) -> tuple[int, float]:
    """(CPUs, GPUs) for one worker."""
    import ray

    have = ray.cluster_resources()
    largest = max(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])
    cpus = cfg.cpus_per_worker or max(1, min(int(have.get("CPU", 1)) // cfg.workers, largest))
    if cpus > largest:
        raise UserError(f"ray.cpus_per_worker={cpus}, but Ray's largest machine has {largest} cores; lower it")
    gpus = cfg.gpus_per_worker if cfg.gpus_per_worker is not None else min(1.0, have.get("GPU", 0.0))
    if gpus > 1 and gpus != int(gpus):
        raise UserError(f"ray.gpus_per_worker={gpus:g}: must be a whole number above 1, or a part of one GPU")
    if gpus > have.get("GPU", 0.0):
        raise UserError(f"ray.gpus_per_worker={gpus:g}, but this Ray has {have.get('GPU', 0.0):g} GPUs; set it to 0")
    most = max(float(node["Resources"].get("GPU", 0.0)) for node in ray.nodes() if node["Alive"])
    if gpus > most:
        raise UserError(f"ray.gpus_per_worker={gpus:g}, but Ray's largest machine has {most:g} GPUs; lower it")
    return cpus, gpus
