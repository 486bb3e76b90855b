"""`train.py -m` through Hydra's launcher: every job as if run alone, one pass over the store."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.settings import typed
from skipcoder.trainer.bank import memory
from skipcoder.trainer.bank.bank import Job
from skipcoder.trainer.bank.memory import MARGIN, Need, bank_bytes, need, pack
from skipcoder.trainer.bank.plan import Settings, plan
from skipcoder.trainer.bank.sweep import run_sweep
from skipcoder.trainer.config import Kind, StreamConfig, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream
from tests.conftest import REPO
from tests.trainer.bank.test_bank import config
from tests.trainer.coders import ONE_BY_ONE
from tests.trainer.run.test_run import assert_same

pytestmark = pytest.mark.slow


def command(store: ActivationStore, *overrides: str) -> list[str]:
    return [
        *(sys.executable, str(REPO / "trainer" / "train.py"), *(["-m"] if "-m" in overrides else [])),
        *(f"store.path={store.path}", "hookpoint=layers.1.mlp"),
        *("coder.width=64", "optim.lr=1e-2", "train.tokens=2560", "train.batch_tokens=128", "train.threads=1"),
        *(override for override in overrides if override != "-m"),
    ]


def call(store: ActivationStore, cwd: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(store, *overrides), cwd=cwd, capture_output=True, text=True)


@pytest.mark.cli
def test_a_sweep_is_one_bank_of_jobs_as_if_run_alone(store: ActivationStore, tmp_path: Path) -> None:
    swept = call(store, tmp_path, "-m", "coder=sae,transcoder", "coder.k=2,4", "hydra.sweep.dir=sweep")
    assert swept.returncode == 0, swept.stderr
    assert "bank 1 of 1: 4 coders on one stream" in swept.stdout
    # Hydra's sweeper leaves multirun.yaml.
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "1", "2", "3", "multirun.yaml"]
    alone = call(store, tmp_path, "coder=transcoder", "coder.k=2", "run.dir=alone")
    assert alone.returncode == 0, alone.stderr
    assert_same(tmp_path / "sweep" / "2", tmp_path / "alone")
    again = call(store, tmp_path, "-m", "coder=sae,transcoder", "coder.k=2,4", "hydra.sweep.dir=sweep")
    assert again.returncode == 0 and again.stdout.count("finished before") == 4


@pytest.mark.cli
def test_every_failure_is_named_and_the_others_are_finished(store: ActivationStore, tmp_path: Path) -> None:
    done = call(store, tmp_path, "-m", "optim.lr=1e-2,1e18,1e19", "coder=transcoder", "coder.k=2", "hydra.sweep.dir=s")
    assert done.returncode == 2
    assert done.stderr.count("lower optim.lr") == 2 and "Traceback" not in done.stderr
    assert "Error executing job" not in done.stderr
    assert (tmp_path / "s" / "0" / "summary.json").exists() and not (tmp_path / "s" / "1" / "summary.json").exists()


@pytest.mark.cli
def test_other_configuration_in_a_jobs_folder_is_refused_before_anything_is_written(
    store: ActivationStore, tmp_path: Path
) -> None:
    call(store, tmp_path, "-m", "coder=transcoder", "coder.k=2,4", "hydra.sweep.dir=s")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*/*") if p.is_file()}
    done = call(store, tmp_path, "-m", "coder=transcoder", "coder.k=3,4", "hydra.sweep.dir=s")
    assert done.returncode == 2 and "coder.k: 2 there, 3 asked" in done.stderr
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "s").rglob("*/*") if p.is_file()} == before


@pytest.mark.cli
def test_bad_values_name_their_job_before_anything_is_trained(store: ActivationStore, tmp_path: Path) -> None:
    done = call(store, tmp_path, "-m", "coder=transcoder", "coder.k=2,400", "hydra.sweep.dir=s")
    assert done.returncode == 2 and "coder.k=400" in done.stderr and "Traceback" not in done.stderr
    assert not list((tmp_path / "s").rglob("summary.json"))


@pytest.mark.ray
def test_on_ray(store: ActivationStore, tmp_path: Path) -> None:
    """Two streams, so two banks, as tasks of a real Ray."""
    where = ("-m", "coder=transcoder", "coder.k=2", "stream.seed=0,1", "hydra.sweep.dir=s", "hydra.launcher.ray=true")
    done = call(store, tmp_path, *where)
    assert done.returncode == 0, done.stderr
    assert "bank 2 of 2" in done.stdout
    assert call(store, tmp_path, "coder=transcoder", "coder.k=2", "stream.seed=1", "run.dir=alone").returncode == 0
    assert_same(tmp_path / "s" / "1", tmp_path / "alone")


@pytest.mark.ray
def test_a_cluster_elsewhere_gets_a_bank_for_each_of_its_gpus(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that say they have a GPU; this one has none, and the banks do without."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 1, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, num_gpus=1)
        cluster.wait_for_nodes()
        where = ("coder=transcoder", "coder.k=2,3,4", "train.device=cpu", "hydra.sweep.dir=s")
        done = call(
            store, tmp_path, "-m", *where, f"hydra.launcher.address={cluster.address}", "hydra.launcher.memory_gib=4"
        )
        assert done.returncode == 0, done.stderr
        assert "bank 1 of 2: 2 coders" in done.stdout and "bank 2 of 2: 1 coder" in done.stdout
    finally:
        cluster.shutdown()


@pytest.mark.ray
def test_ctrl_c_on_ray_leaves_every_variant_resumable(store: ActivationStore, tmp_path: Path) -> None:
    where = ("-m", "coder=transcoder", "coder.k=2", "stream.seed=0,1", "hydra.sweep.dir=s", "hydra.launcher.ray=true")
    long = ("train.tokens=3000000", "train.save_every=1000000")
    job = subprocess.Popen(
        [a for a in command(store, *where) if not a.startswith("train.tokens")] + list(long), cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )  # fmt: skip
    while job.poll() is None and len(list((tmp_path / "s").glob("*/metrics.jsonl"))) < 2:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=100)
    assert job.returncode == 3, said
    assert len(list((tmp_path / "s").glob("*/checkpoint/state/state.pt"))) == 2


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPO / "conf" / "experiment").glob("*.yaml")))
def test_every_experiment_composes_with_the_first_values_of_its_sweep(name: str) -> None:
    import skipcoder.trainer.train  # noqa: F401  registers the schema

    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        whole = compose("train", [f"+experiment={name}"], return_hydra_config=True)
        swept = [f"{key}={str(values).split(',')[0]}" for key, values in (whole.hydra.sweeper.params or {}).items()]
        cfg = compose("train", [f"+experiment={name}", *swept, "run.dir=x"])
    config = typed(cfg, TrainConfig)
    assert config.coder.kind == (Kind.skip_transcoder if name.startswith("set-") else Kind.sae)
    assert config.train.tokens >= 300_000


# ---- planning -----------------------------------------------------------------------------------------


def test_jobs_with_different_streams_make_different_banks(store: ActivationStore, tmp_path: Path) -> None:
    jobs = [Job(config(store, kind), tmp_path / kind.value) for kind in ONE_BY_ONE]
    jobs[1].cfg.stream = StreamConfig(seed=5)
    banks, refused = plan(jobs, Settings(), 1)
    assert not refused
    assert [[job.directory.name for job in bank] for bank in banks] == [
        ["sae", "skip_transcoder", "crosscoder"],
        ["transcoder"],
    ]


def test_a_stream_that_cannot_be_fails_alone(store: ActivationStore, tmp_path: Path) -> None:
    jobs = [Job(config(store, seed=seed), tmp_path / str(seed)) for seed in range(3)]
    jobs[1].cfg.train.batch_tokens = 10**6
    outcomes = run_sweep(jobs, Settings())
    assert [o.error is None for o in outcomes] == [True, False, True]
    assert "train.batch_tokens=1000000 is more than" in str(outcomes[1].error)


def test_looks_at_held_out_tokens_are_each_runs_own(store: ActivationStore, tmp_path: Path) -> None:
    jobs = [Job(config(store, seed=seed), tmp_path / str(seed)) for seed in range(2)]
    jobs[0].cfg.train.eval_tokens = 0
    none, some = run_sweep(jobs, Settings())
    assert none.summary is not None and none.summary["validation_fvu"] is None
    assert some.summary is not None and (some.summary["validation_fvu"] or 0) > 0


def test_a_cluster_elsewhere_needs_its_memory(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"hydra.launcher.address needs hydra.launcher.memory_gib"):
        run_sweep([Job(config(store), tmp_path)], Settings(address="auto"))


def test_packing_holds_the_budget_and_loses_nobody() -> None:
    needs = [Need(size, size // 3) for size in (5, 1, 7, 3, 3, 2, 8)]
    for budget in (12, 15, 20, 40):
        banks = pack(needs, MARGIN + budget)
        assert sorted(i for bank in banks for i in bank) == list(range(7))
        assert all(bank_bytes([needs[i] for i in bank]) <= MARGIN + budget for bank in banks)
    assert len(pack(needs, MARGIN + 40)) == 1 and len(pack(needs, MARGIN + 40, devices=3)) == 3


def test_a_coder_too_large_for_the_device_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    big = config(store, width=2**20)
    jobs = [Job(big, tmp_path / "big"), Job(config(store), tmp_path / "small")]
    one, other = run_sweep(jobs, Settings(memory_gib=0.6))
    assert isinstance(one.error, UserError)
    assert "coder.width=1048576: takes about" in str(one.error) and other.summary is not None


def test_needed_memory_covers_what_training_holds(store: ActivationStore, tmp_path: Path) -> None:
    from skipcoder.trainer.run.build import make_learner

    cfg: TrainConfig = config(store, Kind.skip_transcoder, width=512)
    learner = make_learner(cfg, store, "layers.1.mlp", 20, "cpu")
    batch = next(iter(ActivationStream(store, "layers.1.mlp", 128)))
    learner.step(batch.x, batch.y, batch.tokens)
    tensors = [*learner.coder.parameters(), learner.since_fired_M]
    for part in learner.optimiser.parts:
        tensors += [t for s in part.state.values() for t in s.values() if t.numel() > 1]
    held = sum(t.numel() * t.element_size() for t in tensors)
    assert need(cfg, 24, 24, "cpu").resident == held
    assert memory.free_bytes("cpu") > 0
