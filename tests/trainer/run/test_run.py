"""Run directories: what is left there, resuming bit for bit, refusing other configurations, sweeps."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder import encoding
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind, LoopConfig, OptimConfig, StoreRef, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run import checkpoint
from skipcoder.trainer.run.device import on_device, pick_device
from skipcoder.trainer.step.learner import Learner
from tests.conftest import REPO
from tests.trainer.coders import ONE_BY_ONE

pytestmark = pytest.mark.slow

STEPS = 40


def config(store: ActivationStore, kind: Kind = Kind.skip_transcoder, **loop: Any) -> TrainConfig:
    return TrainConfig(
        store=StoreRef(str(store.path)),
        hookpoint="layers.1.mlp",
        coder=CoderConfig(kind=kind, k=4, width=64),
        optim=OptimConfig(lr=1e-2),
        train=LoopConfig(**{"tokens": STEPS * 128, "batch_tokens": 128, "save_every": 10, "log_every": 5, **loop}),
    )


def outcome(directory: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], checkpoint.State]:
    """Weights, metrics and optimiser state of a run, without the seconds."""
    metrics = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        del line["seconds"], line["ms"]
    state = checkpoint.load_state(directory)
    assert state is not None
    return SparseCoder.load(directory).state_dict(), metrics, state


def assert_same(a: Path, b: Path) -> None:
    (weights, metrics, state), (weights_b, metrics_b, state_b) = outcome(a), outcome(b)
    assert all(torch.equal(weights[n], weights_b[n]) for n in weights)
    assert metrics == metrics_b
    assert state["stream"] == state_b["stream"]
    moments, moments_b = (s["learner"]["optimiser"][0]["state"] for s in (state, state_b))
    for n in moments:
        assert all(torch.equal(moments[n][key], moments_b[n][key]) for key in moments[n])


class _Killed(BaseException):
    pass


def train_killed_after(cfg: TrainConfig, directory: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train until `step` steps are done, then die without any clean-up of ours."""
    real = Learner.step

    def dying(self: Learner, *args: Any) -> Any:
        if self.step_number == step:
            raise _Killed
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", dying)
        with pytest.raises(_Killed):
            bank.train(cfg, directory)


def test_files_of_a_run(store: ActivationStore, tmp_path: Path) -> None:
    summary = bank.train(config(store), tmp_path / "run")
    left = sorted(str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert left == [
        "checkpoint/coder.json",
        "checkpoint/coder.safetensors",
        "checkpoint/state/state.pt",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
    ]
    assert summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["l0"] == pytest.approx(4)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == STEPS // 5
    coder = SparseCoder.load(tmp_path / "run")
    assert coder.meta["read"] == {"module": "layers.1.mlp", "side": "input"}
    assert coder.meta["write"] == {"module": "layers.1.mlp", "side": "output"}


@pytest.mark.parametrize("kind", ONE_BY_ONE)
@pytest.mark.parametrize("killed_at", [3, 10, 27])
def test_killed_and_resumed_equals_undisturbed(
    store: ActivationStore, tmp_path: Path, kind: Kind, killed_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.train(config(store, kind), tmp_path / "whole")
    train_killed_after(config(store, kind), tmp_path / "cut", killed_at, monkeypatch)
    bank.train(config(store, kind), tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("lost", ["learner", "stream"])
def test_the_resume_test_fails_without_resume(
    store: ActivationStore, tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proof that the test above tests something: drop one half of the saved state and it fails."""
    bank.train(config(store), tmp_path / "whole")
    train_killed_after(config(store), tmp_path / "cut", 27, monkeypatch)
    owner = Learner if lost == "learner" else ActivationStream
    if lost == "learner":
        monkeypatch.setattr(owner, "load_state_dict", lambda self, s: setattr(self, "step_number", s["step"]))
    else:
        monkeypatch.setattr(owner, "load_state_dict", lambda self, s: None)
    bank.train(config(store), tmp_path / "cut")
    with pytest.raises(AssertionError):
        assert_same(tmp_path / "whole", tmp_path / "cut")


def test_finished_run_takes_zero_steps(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = bank.train(config(store), tmp_path)
    monkeypatch.setattr(Learner, "step", None)
    assert bank.train(config(store), tmp_path) == summary


def test_other_configuration_in_the_directory_is_refused_naming_keys(store: ActivationStore, tmp_path: Path) -> None:
    bank.train(config(store), tmp_path)
    other = config(store, save_every=7)  # free to change
    bank.train(other, tmp_path)
    other.coder.k, other.optim.lr = 5, 0.1
    with pytest.raises(UserError, match=r"coder.k: 4 there, 5 asked; optim.lr: 0.01 there, 0.1 asked"):
        bank.train(other, tmp_path)


def test_a_run_begun_when_chunks_were_counted_in_elements_goes_on(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps the chunks that it began with, whatever the default is by now."""
    train_killed_after(config(store), tmp_path, 27, monkeypatch)
    file = tmp_path / "config.yaml"
    new = "chunk_bytes: null"
    assert new in file.read_text()
    file.write_text(file.read_text().replace(new, "chunk_elements: 16777216"))
    monkeypatch.setattr(encoding, "CHUNK_CPU", 2**20)
    assert bank.train(config(store), tmp_path)["chunk_bytes"] == 2**26
    file.write_text(file.read_text().replace(new, "chunk_elements: 4096"))
    with pytest.raises(UserError, match=r"encode.chunk_elements: 4096 there, None asked"):
        bank.train(config(store), tmp_path)


def test_diverging_loss_says_so(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store)
    cfg.optim.lr = 1e30
    with pytest.raises(UserError, match=r"the loss is nan at step \d+; lower optim.lr \(it is 1e\+30\)"):
        bank.train(cfg, tmp_path)


def test_gpu_that_is_not_there() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(UserError, match=r"torch sees no GPU here; use cpu"):
        pick_device("cuda")
    with pytest.raises(UserError, match=r"train\.device=gpux"):
        pick_device("gpux")


def sweep(store: ActivationStore, directory: Path) -> list[str]:
    return [
        *(sys.executable, str(REPO / "trainer" / "train.py"), "-m", f"store.path={store.path}"),
        *("hookpoint=layers.1.mlp", "coder=sae,skip_transcoder", "coder.k=2,4", "coder.width=64", "optim.lr=1e-2"),
        *(f"train.tokens={STEPS * 128}", "train.batch_tokens=128", "train.save_every=10", "train.threads=1"),
        f"hydra.sweep.dir={directory}",
    ]


@pytest.mark.cli
def test_sweep_killed_by_signal_9_and_run_again(store: ActivationStore, tmp_path: Path) -> None:
    subprocess.run(sweep(store, tmp_path / "whole"), cwd=tmp_path, check=True, capture_output=True)
    job = subprocess.Popen(
        sweep(store, tmp_path / "cut"), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while job.poll() is None and not (tmp_path / "cut" / "1" / "checkpoint" / "state" / "state.pt").exists():
        time.sleep(0.005)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    subprocess.run(sweep(store, tmp_path / "cut"), cwd=tmp_path, check=True, capture_output=True)
    for number in range(4):
        assert_same(tmp_path / "whole" / str(number), tmp_path / "cut" / str(number))
    summaries = [json.loads((tmp_path / "cut" / str(n) / "summary.json").read_text()) for n in range(4)]
    assert [(s["kind"], s["k"]) for s in summaries] == [
        ("sae", 2),
        ("sae", 4),
        ("skip_transcoder", 2),
        ("skip_transcoder", 4),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cut", "whole"]


def test_unfinished_store_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store.path, tmp_path / "copy.zarr"))
    (copy / "commits" / "00000003.json").unlink()
    cfg = config(store)
    cfg.store.path = str(copy)
    with pytest.raises(UserError, match="has only 32 of its units; finish it"):
        bank.train(cfg, tmp_path / "run")


def test_without_a_path_the_only_store_is_found_and_recorded(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stores").mkdir()
    (tmp_path / "stores" / "one.zarr").symlink_to(store.path)
    cfg = config(store)
    cfg.store.path = None
    bank.train(cfg, tmp_path / "run")
    assert "path: stores/one.zarr" in (tmp_path / "run" / "config.yaml").read_text()


def test_default_directory_bears_the_kinds_name() -> None:
    from hydra import compose, initialize_config_dir

    import skipcoder.trainer.train  # noqa: F401 (registers the schema)

    with initialize_config_dir(str(REPO / "conf"), version_base="1.3"):
        assert compose("train", ["coder=sae"]).run.dir == "runs/sae-k32-m4608-s0"


def test_coders_are_on_a_device_for_a_while() -> None:
    coder = SparseCoder(CoderConfig(kind=Kind.skip_transcoder, activation="jumprelu", k=4, width=64), 8, 8)
    tensors = {**dict(coder.named_parameters()), **dict(coder.named_buffers())}
    held = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    with pytest.raises(KeyError), on_device([coder], "meta"):
        assert {t.device.type for t in (*coder.parameters(), *coder.buffers())} == {"meta"}
        raise KeyError
    assert {name: tensor.data_ptr() for name, tensor in coder.state_dict().items()} == held
    assert coder(torch.randn(3, 8)).y_hat.isfinite().all()
