"""Coders that share a stream learn what they would learn alone."""

import errno
import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import member
from skipcoder.trainer.bank.bank import Outcome, train, train_bank
from skipcoder.trainer.bank.live_table import _render
from skipcoder.trainer.bank.member import Member
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import (
    CoderConfig,
    Kind,
    LoopConfig,
    LossConfig,
    OptimConfig,
    OptimName,
    SkipInit,
    StoreRef,
    StreamConfig,
    TrainConfig,
)
from skipcoder.trainer.data.batch import Assembly
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.step.learner import Learner
from tests.conftest import REPO
from tests.trainer.run.test_run import assert_same

pytestmark = pytest.mark.slow

STEPS = 24


def config(store: ActivationStore, kind: Kind = Kind.transcoder, steps: int = STEPS, **keys: Any) -> TrainConfig:
    coder = {"k": 4, "width": 64, **{k: v for k, v in keys.items() if k in CoderConfig.__dataclass_fields__}}
    optim = {"lr": 1e-2, **{k: v for k, v in keys.items() if k in OptimConfig.__dataclass_fields__}}
    return TrainConfig(
        store=StoreRef(str(store.path)),
        hookpoint="layers.1.mlp",
        coder=CoderConfig(kind=kind, **coder),
        optim=OptimConfig(**optim),
        train=LoopConfig(tokens=steps * 128, batch_tokens=128, save_every=10, log_every=5, dead_tokens=1000),
        seed=keys.get("seed", 0),
    )


def variants(store: ActivationStore) -> dict[str, TrainConfig]:
    """Kinds, k, width, rate, optimiser, seed and length differ."""
    return {
        "sae": config(store, Kind.sae),
        "transcoder": config(store, k=2, width=48),
        "skip": config(store, Kind.skip_transcoder, lr=3e-3, seed=1),
        "zero": config(store, Kind.skip_transcoder, skip_init=SkipInit.zero),
        "signum": config(store, Kind.sae, name=OptimName.signum, steps=17),
        "muon": config(store, name=OptimName.muon),
    }


def test_every_member_equals_the_same_run_alone(store: ActivationStore, tmp_path: Path) -> None:
    outcomes = train_bank([(cfg, tmp_path / "bank" / name) for name, cfg in variants(store).items()])
    assert [o.directory.name for o in outcomes] == list(variants(store)) and not any(o.error for o in outcomes)
    for name, cfg in variants(store).items():
        train(cfg, tmp_path / "alone" / name)
        assert_same(tmp_path / "bank" / name, tmp_path / "alone" / name)


def test_each_batch_is_read_once(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    real = Assembly.done

    def done(self: Assembly) -> Any:
        read.append(1)
        return real(self)

    monkeypatch.setattr(Assembly, "done", done)
    train_bank([(config(store, seed=seed), tmp_path / str(seed)) for seed in range(3)])
    # The held-out tokens are a batch, too; and the reader is up to two batches ahead when training ends.
    assert STEPS + 1 <= len(read) <= STEPS + 3


def test_a_failing_member_is_dropped_and_the_others_go_on(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging, broken = config(store, lr=1e18), config(store, k=3)
    real = Learner.step

    def step(self: Learner, *args: Any) -> Any:
        if self.cfg.coder.k == 3 and self.step_number == 7:
            raise RuntimeError("out of luck")
        return real(self, *args)

    monkeypatch.setattr(Learner, "step", step)
    outcomes = train_bank([(diverging, tmp_path / "a"), (broken, tmp_path / "b"), (config(store), tmp_path / "c")])
    assert isinstance(outcomes[0].error, UserError) and "lower optim.lr" in str(outcomes[0].error)
    assert str(outcomes[1].error) == "out of luck"
    train(config(store), tmp_path / "alone")
    assert_same(tmp_path / "c", tmp_path / "alone")


def test_members_at_different_steps_meet(store: ActivationStore, tmp_path: Path) -> None:
    """One finished, one stopped at its second save, one never begun: each ends as if alone."""
    train(config(store), tmp_path / "0")
    whole = train(config(store, seed=1), tmp_path / "whole")
    train(config(store, seed=1), tmp_path / "1")
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        _train_until(13, [(config(store, seed=1), cut)])
    assert json.loads((cut / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 10
    outcomes = train_bank(
        [(config(store), tmp_path / "0"), (config(store, seed=1), cut), (config(store, seed=2), tmp_path / "2")]
    )
    assert outcomes[1].summary is not None and outcomes[1].summary["train_fvu"] == whole["train_fvu"]
    assert_same(cut, tmp_path / "whole")
    train(config(store, seed=2), tmp_path / "alone")
    assert_same(tmp_path / "2", tmp_path / "alone")


def _train_until(step: int, jobs: list[tuple[TrainConfig, Path]]) -> None:
    """Train; the process gets a Ctrl-C in the middle of a step."""
    real = Learner.step
    sent: list[int] = []

    def interrupting(self: Learner, *args: Any) -> Any:
        if self.step_number == step and not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", interrupting)
        train_bank(jobs)


def test_a_signal_during_the_second_members_step_saves_the_first(store: ActivationStore, tmp_path: Path) -> None:
    jobs = [(config(store, seed=seed), tmp_path / str(seed)) for seed in range(3)]
    real = Learner.step

    def interrupting(self: Learner, *args: Any) -> Any:
        if self.step_number == 6 and self.cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            train_bank(jobs)
    assert [torch.load(d / "checkpoint" / "state" / "state.pt")["learner"]["step"] for _, d in jobs] == [7, 7, 7]


def test_two_jobs_in_one_directory_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 jobs would write to .*same"):
        train_bank([(config(store, k=2), tmp_path / "same"), (config(store), tmp_path / "x" / ".." / "same")])
    assert not (tmp_path / "same").exists()


def test_a_full_disk_says_so_and_a_failed_learner_is_let_go(
    store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "state.pt")

    alive: weakref.WeakSet[Learner] = weakref.WeakSet()
    real = Learner.__init__

    def noted(self: Learner, *args: Any, **options: Any) -> None:
        alive.add(self)
        real(self, *args, **options)

    monkeypatch.setattr(Learner, "__init__", noted)
    monkeypatch.setattr(member, "save_state", full)
    outcomes = train_bank([(config(store, seed=seed), tmp_path / str(seed)) for seed in range(2)])
    assert all("no space left on the disk (state.pt)" in str(o.error) and not o.trace for o in outcomes)
    gc.collect()
    assert not alive


def test_auxk_is_reported_whether_or_not_a_latent_is_dead(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store, steps=40)
    cfg.loss, cfg.train.dead_tokens = LossConfig(auxk=1 / 32), 129
    train(cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert all("auxk" in line for line in lines) and any(line["auxk"] > 0 for line in lines)


def test_the_table_calls_only_failures_failed(store: ActivationStore, tmp_path: Path) -> None:
    members = [Member(config(store, seed=seed), tmp_path / str(seed)) for seed in range(2)]
    outcomes = {
        members[0].directory: Outcome(members[0].directory, {}),  # type: ignore[arg-type]
        members[1].directory: Outcome(members[1].directory, None, UserError("no")),
    }
    console = Console(width=100, file=io.StringIO())
    console.print(_render(members, outcomes))
    text = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert "failed" not in text[1] and "failed" in text[2]


def test_interrupted_at_any_step_every_member_goes_on(store: ActivationStore, tmp_path: Path) -> None:
    """The step that was under way is finished and saved, between the regular saves."""
    jobs = [(config(store, seed=seed), tmp_path / str(seed)) for seed in range(2)]
    with pytest.raises(KeyboardInterrupt):
        _train_until(7, jobs)
    states = [torch.load(d / "checkpoint" / "state" / "state.pt") for _, d in jobs]
    assert [s["learner"]["step"] for s in states] == [8, 8]
    train_bank(jobs)
    for seed in range(2):
        train(config(store, seed=seed), tmp_path / f"alone{seed}")
        assert_same(tmp_path / str(seed), tmp_path / f"alone{seed}")


def test_metrics_say_where_the_time_went_and_what_held_out_tokens_show(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store, Kind.skip_transcoder)
    summary = train(cfg, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]["ms"]) == {"read", "encode", "decode", "backward", "optimiser"}
    assert all(ms > 0 for ms in lines[0]["ms"].values())
    held = next(iter(ActivationStream(store, "layers.1.mlp", 4096, split="validation", epochs=1)))
    y = held.y.double()
    error = (y - SparseCoder.load(tmp_path)(held.x).y_hat.double()).square().sum()
    assert summary["validation_fvu"] == pytest.approx(float(error / (y - y.mean(0)).square().sum()), rel=1e-5)


def test_jobs_of_different_streams_do_not_make_a_bank(store: ActivationStore, tmp_path: Path) -> None:
    other = config(store)
    other.stream = StreamConfig(seed=1)
    with pytest.raises(AssertionError):
        train_bank([(config(store), tmp_path / "a"), (other, tmp_path / "b")])


@pytest.mark.cli
def test_sigterm_leaves_a_resumable_run_and_exit_code_3(store: ActivationStore, tmp_path: Path) -> None:
    command = [
        *(sys.executable, str(REPO / "trainer" / "train.py"), f"store.path={store.path}", "hookpoint=layers.1.mlp"),
        *("coder=sae", "coder.k=4", "coder.width=64", "train.tokens=2000000", "train.batch_tokens=128"),
        *("train.save_every=100000", f"run.dir={tmp_path / 'run'}"),
    ]
    job = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while job.poll() is None and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    _, said = job.communicate()
    assert job.returncode == 3, said
    assert "run the same command again" in said
    assert (tmp_path / "run" / "checkpoint" / "state" / "state.pt").exists()
