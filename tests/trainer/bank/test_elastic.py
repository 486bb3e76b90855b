"""A sweep on Ray loses machines and goes on elsewhere, from its last saves, to the same bits."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import Job
from skipcoder.trainer.bank.plan import Settings
from skipcoder.trainer.bank.sweep import run_sweep
from skipcoder.trainer.coder.coder import SparseCoder
from tests.trainer.bank.test_bank import config
from tests.trainer.bank.test_sweep import command
from tests.trainer.run.test_run import assert_same

pytestmark = [pytest.mark.slow, pytest.mark.ray]

LONG = ("coder=transcoder", "coder.k=2", "train.tokens=256000", "train.save_every=100", "train.log_every=100")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Three machines (Ray's, in processes of their own) with a core each, and a head without."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.cluster_utils import Cluster

    found: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    found.machines = [found.add_node(num_cpus=1) for _ in range(3)]
    found.wait_for_nodes()
    yield found
    found.shutdown()


def start(store: ActivationStore, cwd: Path, cluster: Any, *more: str) -> subprocess.Popen[str]:
    where = ("hydra.sweep.dir=s", f"hydra.launcher.address={cluster.address}", "hydra.launcher.memory_gib=4")
    asked = [word for word in command(store, "-m", *LONG, *where, *more) if word != "train.tokens=2560"]
    return subprocess.Popen(asked, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(job: subprocess.Popen[str], *files: Path) -> None:
    deadline = time.time() + 120
    while not all(file.exists() for file in files):
        assert job.poll() is None and time.time() < deadline, job.communicate()[0][-3000:]
        time.sleep(0.02)


def busy(cluster: Any) -> list[Any]:
    """The machines on which a bank is trained."""
    found = []
    for machine in cluster.machines:
        raylet = psutil.Process(machine.all_processes["raylet"][0].process.pid)
        if any("_bank_task" in " ".join(child.cmdline()) for child in raylet.children(recursive=True)):
            found.append(machine)
    return found


def alone(store: ActivationStore, cwd: Path, *more: str) -> None:
    asked = [word for word in command(store, *LONG, *more) if word != "train.tokens=2560"]
    subprocess.run(asked, cwd=cwd, check=True, capture_output=True)


def test_two_machines_of_three_are_lost(store: ActivationStore, tmp_path: Path, cluster: Any) -> None:
    """Two banks, each on a machine of its own; both go, one after the other, and the third machine takes all."""
    job = start(store, tmp_path, cluster, "stream.seed=0,1")
    saves = [tmp_path / "s" / name / "checkpoint" / "state" / "state.pt" for name in "01"]
    wait_for(job, *saves)
    first, second = busy(cluster)
    cluster.remove_node(first, allow_graceful=False)
    time.sleep(1)
    cluster.remove_node(second, allow_graceful=False)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said[-3000:]
    assert said.count("was lost; it goes on from its last save") == 2 and "going on from step" in said
    for name in "01":
        alone(store, tmp_path, f"stream.seed={name}", f"run.dir=alone/{name}")
        assert_same(tmp_path / "s" / name, tmp_path / "alone" / name)


def test_a_spread_coder_loses_a_machine(store: ActivationStore, tmp_path: Path, cluster: Any) -> None:
    """Two shards on two machines of three; one goes, and what was saved goes on with the other two."""
    job = start(store, tmp_path, cluster, "train.shards=2")
    wait_for(job, tmp_path / "s" / "0" / "checkpoint" / "state" / "state.json")
    machines = busy(cluster)
    assert len(machines) == 2
    cluster.remove_node(machines[-1], allow_graceful=False)
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said[-3000:]
    assert "was lost; it goes on from its last save" in said and "going on from step" in said
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    whole = [w for w in command(store, *LONG, "train.shards=2", "run.dir=whole")[1:] if w != "train.tokens=2560"]
    subprocess.run([*torchrun, *whole], cwd=tmp_path, check=True, capture_output=True)
    one, two = (SparseCoder.load(tmp_path / name).state_dict() for name in ("whole", "s/0"))
    assert all(bool((one[key] == two[key]).all()) for key in one)


def test_more_processes_than_there_are_cores_are_refused(store: ActivationStore, tmp_path: Path, cluster: Any) -> None:
    said = start(store, tmp_path, cluster, "train.shards=4").communicate(timeout=120)[0]
    assert "4 processes are to train a coder" in said and "and this Ray has 3; lower them" in said


def test_gpus_that_do_not_divide_into_shards_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store)
    cfg.train.shards = 4
    with pytest.raises(UserError, match=r"gpus_per_coder=6 must be a multiple of train.shards=4"):
        run_sweep([Job(cfg, tmp_path)], Settings(gpus_per_coder=6))
