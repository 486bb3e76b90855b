"""Several processes, and several micro-batches, learn what one learns in one go."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind, LoopConfig, LossConfig
from skipcoder.trainer.data.ranks import Ranks
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import check, make_learner
from tests.conftest import REPO
from tests.trainer.bank.test_bank import config
from tests.trainer.coders import ONE_BY_ONE

pytestmark = pytest.mark.slow

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


@pytest.mark.cli
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("sae", ["loss.auxk=0.03125", "train.dead_tokens=500"]),
        ("skip_transcoder", ["loss.auxk=0.03125", "train.dead_tokens=500"]),
        ("transcoder", ["coder.activation=batchtopk"]),
        ("transcoder", ["coder.activation=jumprelu"]),
    ],
)
def test_two_processes_equal_one(store: ActivationStore, tmp_path: Path, kind: str, more: list[str]) -> None:
    """The same sums in another order: float32 rounding, magnified a little by Adam where gradients are tiny. batchtopk
    and jumprelu look at the whole batch, of both processes."""
    overrides = (f"coder={kind}", *more)
    for processes in (1, 2):
        torchrun(store, tmp_path / str(processes), processes, *overrides)
    (one, weights), (two, weights_2) = outcome(tmp_path / "1"), outcome(tmp_path / "2")
    assert [line["step"] for line in two] == list(range(1, STEPS + 1))  # one process writes
    for a, b in zip(one, two, strict=True):
        assert b["fvu"] == pytest.approx(a["fvu"], rel=1e-4)
        assert (b["l0"], b["dead"], b["tokens"]) == (a["l0"], a["dead"], a["tokens"])
    for name in weights:
        assert (weights[name] - weights_2[name]).norm() <= 1e-3 * weights[name].norm(), name


@pytest.mark.parametrize(
    ("kind", "activation"), [*((kind, ActivationName.topk) for kind in ONE_BY_ONE), (Kind.sae, ActivationName.jumprelu)]
)
def test_four_micro_batches_equal_one(store: ActivationStore, kind: Kind, activation: ActivationName) -> None:
    """jumprelu of an SAE: a transcoder's decoder is zero at first and its L0 may be k, so that the thresholds' gradient
    is rounding, of which Adam makes whole steps."""
    learners = []
    for pieces in (1, 4):
        cfg = config(store, kind, lr=1e-3, activation=activation)
        cfg.train = LoopConfig(tokens=STEPS * 130, batch_tokens=130, micro_batches=pieces, dead_tokens=500)
        cfg.loss = LossConfig(auxk=1 / 32, multi_topk=activation == ActivationName.topk)
        learners.append(make_learner(cfg, store, "layers.1.mlp", STEPS, "cpu"))
    for batch, _ in zip(ActivationStream(store, "layers.1.mlp", 130), range(STEPS), strict=False):
        one, four = (learner.step(batch.x, batch.y, batch.tokens) for learner in learners)
        for name in one:
            assert float(four[name]) == pytest.approx(float(one[name]), rel=1e-3), name
    assert torch.equal(learners[0].since_fired_M, learners[1].since_fired_M)


def test_batchtopk_of_several_processes_takes_no_micro_batches(store: ActivationStore) -> None:
    cfg = config(store, activation=ActivationName.batchtopk)
    cfg.train.micro_batches = 2
    with pytest.raises(UserError, match=r"with 2 processes, train.micro_batches=2 must be 1"):
        check(cfg, ranks=2)
    check(cfg)


class OneOfTwo(Ranks):
    """A process whose other half is given."""

    theirs: torch.Tensor
    tokens: int

    def __init__(self, theirs: torch.Tensor, tokens: int) -> None:
        super().__init__(0, 2)
        self.__dict__.update(theirs=theirs, tokens=tokens)

    def total(self, n: int) -> int:
        return n + self.tokens

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows, self.theirs])

    def any(self, flag: bool) -> bool:
        return flag


@pytest.mark.parametrize("most", [0.5, 5.0])
def test_batchtopk_takes_the_largest_of_all_processes(most: float) -> None:
    """Also where nearly all of them are in one process, more than it offers at first."""
    torch.manual_seed(0)
    coder = SparseCoder(CoderConfig(kind=Kind.transcoder, k=2, width=16, activation=ActivationName.batchtopk), 8, 8)
    x, theirs = torch.randn(10, 8), torch.rand(20) * most
    codes = coder.activation.step(coder, 2, OneOfTwo(theirs, 10)).encode(x)
    mine = torch.relu(x @ coder.W_enc.T).detach()
    least = torch.cat([mine.flatten(), theirs]).sort(descending=True).values[39]
    wanted = torch.where(mine >= least, mine, 0)
    assert (codes.values > 0).all()
    found = torch.zeros_like(wanted).index_put((codes.token, codes.indices), codes.values.detach())
    torch.testing.assert_close(found, wanted)
    assert len(codes.values) == (wanted > 0).sum()
    codes.values.sum().backward()
    torch.testing.assert_close(coder.b_enc.grad, (wanted > 0).float().sum(0))
