"""Start or join a Ray cluster, quietly. The order of the start-up calls matters."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from skipcoder.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@contextlib.contextmanager
def cluster(address: str | None, show_output: bool = False) -> Iterator[None]:
    """Run Ray quietly, on this machine unless an address is given, and shut it down on exit. `show_output`: print what
    the workers print."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    if address is None and "ray" not in sys.modules:
        # Ray reads this once, on import. Imported before, it goes by what it read; an existing cluster decides itself.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    import ray  # reads these variables on import

    options: dict[str, Any] = {"log_to_driver": show_output, "logging_level": logging.ERROR}
    if address is None:
        # Only unit numbers and short messages pass through Ray, so its object store may be small.
        options |= {"address": "local", "object_store_memory": 200 * 2**20, "include_dashboard": False}
    else:
        options |= {"address": address}
    try:
        with silent_stderr():
            ray.init(**options)
    except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        if address is None:
            raise
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"ray.address={address}: {fault}; leave it null to start a Ray here") from error
    try:
        yield
    finally:
        ray.shutdown()


def deal(function: Callable[[Sequence[T]], R], items: Sequence[T], address: str | None, tasks: int | None) -> list[R]:
    """Call `function` on equal runs of `items`, in order, in Ray tasks: `tasks` of them or, for None, one for each GPU;
    each has a GPU where there are any. A task whose worker or machine is lost is run again elsewhere."""
    with cluster(address, show_output=True):
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        count = min(tasks or max(gpus, 1), len(items))
        shares = [items[i * len(items) // count : (i + 1) * len(items) // count] for i in range(count)]
        cores = cores_of_each(count)
        task: Any = ray.remote(num_gpus=min(gpus, 1), num_cpus=cores, max_calls=1)(_dealt)
        waiting: list[Any] = [task.remote(function, share, os.getcwd(), cores) for share in shares]
        left = waiting
        try:
            while left:
                (done,), left = ray.wait(left, num_returns=1)
                ray.get(done)  # raises what it raised
            return list(ray.get(waiting))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from None
            raise
        finally:
            for one in left:
                ray.cancel(one)


def cores_of_each(tasks: int, together: int = 1) -> int:
    """Cores for each of so many tasks: those that come with a GPU, on the machine that has fewest for each; where there
    is none, an equal share, which some machine has. `together`: so many tasks must find room at once."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [int(m.get("CPU", 1) // m["GPU"]) for m in machines if m.get("GPU")]
    if with_gpu:
        return max(1, min(with_gpu))
    cpus = [int(m.get("CPU", 0)) for m in machines]
    cores = max(1, min(sum(cpus) // tasks, max(cpus)))
    while cores > 1 and sum(cpu // cores for cpu in cpus) < together:
        cores -= 1
    return cores


def _dealt(function: Callable[[Sequence[T]], R], share: Sequence[T], directory: str, threads: int) -> R:
    import torch

    os.chdir(directory)  # relative paths are relative to the driver's
    torch.set_num_threads(threads)
    return function(share)


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Silence file descriptor 2, where Ray's C++ code announces its log level whatever Python's logging says."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
