"""Whatever dies, the same command run again ends with the bytes of an undisturbed capture. Real processes, a real Ray.

`make soak` runs the last test for five minutes.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from tests.conftest import CONTEXT, REPO
from tests.pipeline.store.test_writer import files

pytestmark = pytest.mark.ray

ROWS = 150
"""In units of one row: enough work to be killed in the middle of it."""


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, cache_config: Callable[..., CacheConfig], capture_here: Callable
) -> ActivationStore:
    """An undisturbed capture."""
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    return capture_here(cache_config(path, ("layers.*.mlp",), rows=ROWS, unit_rows=1))


@pytest.fixture
def run(tiny_model: Path, text_file: Path, tmp_path: Path) -> Callable[..., list[str]]:
    def command(*more: str, path: Path = tmp_path / "s.zarr") -> list[str]:
        return [
            *(sys.executable, str(REPO / "pipeline" / "cache.py"), "model=local", "model.name=tiny"),
            *(f"model.id={tiny_model}", "hookpoints=[layers.*.mlp]", "data=jsonl", f"data.path={text_file}"),
            *(f"data.tokens={ROWS * CONTEXT}", f"data.context={CONTEXT}", f"store.path={path}"),
            *("store.unit_rows=1", f"micro_batch_tokens={2 * CONTEXT}", *more),
        ]

    return command


@contextlib.contextmanager
def started(command: list[str], cwd: Path) -> Iterator[subprocess.Popen]:
    job = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield job
    finally:
        if job.poll() is None:
            job.kill()
            job.wait()


def wait_for_units(job: subprocess.Popen, path: Path, count: int) -> None:
    deadline = time.monotonic() + 300  # Ray's workers are niced: beside other work they crawl
    while len(commit.committed_units(place_at(path))) < count:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert len(commit.committed_units(place_at(path))) < ROWS  # else there is nothing left to disturb


def finish(command: list[str], cwd: Path, path: Path, whole: ActivationStore) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert files(path) == files(whole.path)
    return done.stdout


def workers_of(driver: int) -> list[psutil.Process]:
    """The processes that hold the model."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(driver).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if process.cmdline() and "ray::MapWorker" in process.cmdline()[0]:
                    found.append(process)
    return found


def test_the_driver_is_killed_before_and_in_the_middle_of_its_work(
    run: Callable, tmp_path: Path, whole: ActivationStore
) -> None:
    path = tmp_path / "s.zarr"
    with started(run(), tmp_path) as job:  # while tokens are written
        while job.poll() is None and not (path / "tokens").exists():
            time.sleep(0.001)
    for count in (1, 20):
        with started(run(), tmp_path) as job:
            wait_for_units(job, path, count)
        time.sleep(3)  # a killed driver's workers may write that long
    assert 20 <= len(commit.committed_units(place_at(path))) < ROWS
    finish(run(), tmp_path, path, whole)
    assert "complete, nothing to do" in finish(run(), tmp_path, path, whole)


def test_a_worker_is_killed(run: Callable, tmp_path: Path, whole: ActivationStore) -> None:
    path = tmp_path / "s.zarr"
    with started(run("ray.writers=2"), tmp_path) as job:  # both of its calls are lost
        wait_for_units(job, path, 10)
        (worker,) = workers_of(job.pid)
        worker.kill()
        said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert re.search(
        r"the first unit after [\d.]+ s: Ray [\d.]+, a worker and what it imports [\d.]+, the model [\d.]+", said
    )
    assert files(path) == files(whole.path)


def test_a_machine_is_lost(
    run: Callable, tmp_path: Path, whole: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three machines (Ray's, in processes of their own), a worker on each of two; one of these goes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1, resources={"capture": 1}) for _ in range(2)]
        cluster.wait_for_nodes()
        path = tmp_path / "s.zarr"
        more = (f"ray.address={cluster.address}", "ray.workers=2", "ray.cpus_per_worker=1", "+ray.resources.capture=1")
        with started(run(*more), tmp_path) as job:
            wait_for_units(job, path, 10)
            cluster.remove_node(nodes[1], allow_graceful=False)
            said = job.communicate(timeout=300)[0]
        assert job.returncode == 0, said
        assert files(path) == files(whole.path)
    finally:
        cluster.shutdown()


def test_the_disk_is_full(run: Callable, tmp_path: Path, whole: ActivationStore) -> None:
    """A disk of its own, too small; then larger."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets us mount no disk")
    try:
        path = disk / "s.zarr"
        done = subprocess.run(run(path=path), cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.count("error:") == 1 and "no space left on the disk" in done.stderr
        assert not list(path.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        finish(run(path=path), tmp_path, path, whole)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_torn_files_of_every_kind(run: Callable, tmp_path: Path, whole: ActivationStore) -> None:
    """As after a power cut on a file system that keeps no order: units without a record, half of their files torn."""
    path = tmp_path / "s.zarr"
    finish(run(), tmp_path, path, whole)
    chance = random.Random(0)
    for unit in chance.sample(range(ROWS), 20):
        (path / commit.record_file(unit)).unlink()
        for file in [*path.glob(f"*/*/c/{unit}/0"), *path.glob(f"statistics/*/{unit:08d}.*"), path / f"index/c/{unit}"]:
            kind = chance.choice(["whole", "torn", "empty", "gone", "other"])
            content = file.read_bytes()
            if kind == "gone":
                file.unlink()
            elif kind != "whole":
                file.write_bytes({"torn": content[: len(content) // 2], "empty": b"", "other": b"x" * 999}[kind])
    (path / "layers.0.mlp/input/c/7/.0.99-1.partial").write_bytes(b"half")
    finish(run(), tmp_path, path, whole)


@pytest.mark.skipif("SOAK_SECONDS" not in os.environ, reason="make soak")
def test_soak(run: Callable, tmp_path: Path, whole: ActivationStore) -> None:
    """Captures, one after the other, whose worker, or now and then driver, is killed every few seconds; a driver is
    given the time to start."""
    chance, end = random.Random(), time.monotonic() + float(os.environ["SOAK_SECONDS"])
    captures = drivers = workers = 0
    while time.monotonic() < end:
        path = tmp_path / f"{captures}" / "s.zarr"
        path.parent.mkdir()
        done = False
        while not done:
            with started(run(path=path), tmp_path) as job:
                while job.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.wait(chance.uniform(1, 5))
                        break
                    victims = workers_of(job.pid)
                    if not victims or time.monotonic() > end:
                        continue
                    if chance.random() < 0.6:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            victims[0].send_signal(signal.SIGKILL)
                            workers += 1
                    else:
                        job.kill()
                        drivers += 1
                        job.wait()
                done = job.returncode == 0
                assert done or job.returncode == -signal.SIGKILL, job.communicate()[0]
        assert files(path) == files(whole.path)
        captures += 1
    print(f"\n{captures} captures, all identical; killed: {drivers} drivers, {workers} workers")
