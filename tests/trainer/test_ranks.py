"""Several processes, and several micro-batches, learn what one learns in one go."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.assemble import make_learner
from skipcoder.trainer.coder import SparseCoder
from skipcoder.trainer.config import Activation, Kind, LoopConfig, LossConfig
from skipcoder.trainer.ranks import Ranks
from skipcoder.trainer.stream import ActivationStream

from tests.conftest import REPO
from tests.trainer.test_bank import config

STEPS = 20


def torchrun(store: ActivationStore, directory: Path, processes: int, *overrides: str) -> None:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
        *(str(REPO / "trainer" / "train.py"), f"store.path={store.path}", "hookpoint=layers.1.mlp"),
        *("coder.k=4", "coder.width=64", "optim.lr=1e-3", f"train.tokens={STEPS * 128}", "train.batch_tokens=128"),
        *("train.threads=1", "train.log_every=1", "encode.mode=float32", f"run.dir={directory}", *overrides),
    ]
    done = subprocess.run(command, cwd=directory.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def outcome(directory: Path) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return lines, SparseCoder.load(directory).state_dict()


@pytest.mark.parametrize("kind", ["sae", "skip_transcoder"])
def test_two_processes_equal_one(store: ActivationStore, tmp_path: Path, kind: str) -> None:
    """The same sums in another order: float32 rounding, magnified a little by Adam where gradients are tiny."""
    overrides = (f"coder={kind}", "loss.auxk=0.03125", "train.dead_tokens=500")
    for processes in (1, 2):
        torchrun(store, tmp_path / str(processes), processes, *overrides)
    (one, weights), (two, weights_2) = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))  # one process writes
    for a, b in zip(one, two, strict=True):
        assert b["fvu"] == pytest.approx(a["fvu"], rel=1e-4)
        assert (b["l0"], b["dead"], b["tokens"]) == (a["l0"], a["dead"], a["tokens"])
    for name in weights:
        assert (weights[name] - weights_2[name]).norm() <= 1e-3 * weights[name].norm(), name


@pytest.mark.parametrize("kind", Kind)
def test_four_micro_batches_equal_one(store: ActivationStore, kind: Kind) -> None:
    learners = []
    for pieces in (1, 4):
        cfg = config(store, kind, lr=1e-3)
        cfg.train = LoopConfig(tokens=STEPS * 130, batch_tokens=130, micro_batches=pieces, dead_tokens=500)
        cfg.loss = LossConfig(auxk=1 / 32, multi_topk=True)
        learners.append(make_learner(cfg, store, "layers.1.mlp", STEPS, "cpu"))
    for batch, _ in zip(ActivationStream(store, "layers.1.mlp", 130), range(STEPS), strict=False):
        one, four = (learner.step(batch.x, batch.y, batch.tokens) for learner in learners)
        for name in one:
            assert float(four[name]) == pytest.approx(float(one[name]), rel=1e-3), name
    assert torch.equal(learners[0].since_fired_M, learners[1].since_fired_M)


@pytest.mark.parametrize("activation", [Activation.batchtopk, Activation.jumprelu])
def test_what_looks_at_the_whole_batch_is_refused(store: ActivationStore, activation: Activation) -> None:
    with pytest.raises(UserError, match=f"coder.activation={activation.value} looks at the whole batch"):
        Ranks(0, 2).check(config(store, activation=activation))
    Ranks().check(config(store, activation=activation))
