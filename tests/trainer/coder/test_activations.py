"""groupmax, batchtopk, jumprelu, Matryoshka prefixes and a k that falls: in training, saved, and loaded again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.testing import ActivationTests
from skipcoder.trainer.bank.bank import train, train_bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind, LoopConfig, LossConfig, Side, TrainConfig
from skipcoder.trainer.data.ranks import ALONE
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import check, make_learner
from skipcoder.trainer.step.losses import Written, losses
from tests.trainer.bank.test_bank import config
from tests.trainer.run.test_run import assert_same, train_killed_after

FLAT = (ActivationName.batchtopk, ActivationName.jumprelu)


def held_out(store: ActivationStore) -> torch.Tensor:
    return next(iter(ActivationStream(store, "layers.1.mlp", 4096, split="validation", epochs=1))).x


class TestTopK(ActivationTests):
    name = ActivationName.topk


class TestGroupMax(ActivationTests):
    name = ActivationName.groupmax


class TestBatchTopK(ActivationTests):
    name = ActivationName.batchtopk


class TestJumpReLU(ActivationTests):
    name = ActivationName.jumprelu


@pytest.mark.slow
@pytest.mark.parametrize("activation", ActivationName)
@pytest.mark.parametrize("kind", [Kind.transcoder, Kind.sae])
def test_learns_and_resumes(
    store: ActivationStore, tmp_path: Path, activation: ActivationName, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(store, kind, steps=60, activation=activation)
    summary = train(cfg, tmp_path / "whole")
    first = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["train_fvu"] < 0.8 * first["fvu"]
    train_killed_after(cfg, tmp_path / "cut", 27, monkeypatch)
    train(cfg, tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.parametrize("activation", FLAT)
def test_as_many_latents_fire_as_asked(store: ActivationStore, tmp_path: Path, activation: ActivationName) -> None:
    cfg = config(store, steps=150, activation=activation)
    cfg.train.batch_tokens, cfg.train.tokens = 512, 150 * 512  # thresholds learn from the few entries near them
    train(cfg, tmp_path)
    coder = SparseCoder.load(tmp_path)
    assert coder.threshold is not None and (coder.threshold > 0).all()
    (batch,) = ActivationStream(store, "layers.1.mlp", 2**14, epochs=1)
    out = coder(batch.x)
    l0 = (out.values > 0).sum(1).double()
    if activation == ActivationName.batchtopk:  # calibrated on these tokens
        assert float(l0.mean()) == pytest.approx(4, abs=0.01)
    else:  # held near k by a penalty
        assert float(l0.mean()) == pytest.approx(4, rel=0.35)
    assert l0.min() < l0.max()
    assert (out.values[out.values > 0] > coder.threshold.min()).all()


def test_a_batch_does_not_change_what_a_saved_batchtopk_coder_says(store: ActivationStore, tmp_path: Path) -> None:
    train(config(store, activation=ActivationName.batchtopk), tmp_path)
    coder, x = SparseCoder.load(tmp_path), held_out(store)
    torch.testing.assert_close(coder(x).y_hat[:7], coder(x[:7]).y_hat)
    assert json.loads((tmp_path / "checkpoint" / "coder.json").read_text())["activation"] == "batchtopk"


@pytest.mark.parametrize("activation", FLAT)
def test_in_a_bank_as_alone(store: ActivationStore, tmp_path: Path, activation: ActivationName) -> None:
    cfg = config(store, activation=activation)
    train_bank([(config(store, seed=3), tmp_path / "other"), (cfg, tmp_path / "bank")])
    train(cfg, tmp_path / "alone")
    assert_same(tmp_path / "bank", tmp_path / "alone")


def test_matryoshka_is_the_mean_over_prefixes_of_one_selection() -> None:
    coder = SparseCoder(CoderConfig(kind=Kind.skip_transcoder, k=3, width=40, prefixes=[5, 20]), 6, 6).double()
    g = torch.Generator().manual_seed(1)
    for p in coder.parameters():
        p.data += torch.randn(p.shape, generator=g)
    x, y = (torch.randn(30, 6, generator=g, dtype=torch.float64) for _ in range(2))
    found = losses(coder, LossConfig(), coder.activation.step(coder, 3, ALONE), x, y, Written([6], [7.0]))
    pre = torch.relu(x @ coder.W_enc.T + coder.b_enc)
    values, indices = pre.topk(3)
    f = torch.zeros_like(pre).scatter(1, indices, values)
    assert coder.W_skip is not None
    errors = [
        (y - f[:, :p] @ coder.W_dec[:p] - x @ coder.W_skip.T - coder.b_dec).square().sum() / 7 for p in (5, 20, 40)
    ]
    wanted: Any = sum(errors) / 3
    torch.testing.assert_close(found.total, wanted)
    torch.testing.assert_close(found.parts["fvu"], errors[2])
    torch.testing.assert_close(found.parts["fvu_5"], errors[0])
    mine = torch.autograd.grad(found.total, list(coder.parameters()))
    theirs = torch.autograd.grad(wanted, list(coder.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_prefixes_survive_saving(store: ActivationStore, tmp_path: Path) -> None:
    train(config(store, prefixes=[8, 32]), tmp_path)
    assert SparseCoder.load(tmp_path).cfg.prefixes == [8, 32]
    assert "fvu_8" in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])


def test_k_falls_to_its_value(store: ActivationStore) -> None:
    cfg = config(store, steps=40)
    cfg.train = LoopConfig(tokens=40 * 128, batch_tokens=128, k_start=20, k_anneal=0.5)
    learner = make_learner(cfg, store, "layers.1.mlp", 40, "cpu")
    l0 = []
    for batch, _ in zip(ActivationStream(store, "layers.1.mlp", 128), range(25), strict=False):
        l0.append(round(float(learner.step(batch.x, batch.y, batch.tokens)["l0"])))
    assert l0[0] == 20 and l0[10] == 12 and l0[20:] == [4] * 5 and l0 == sorted(l0, reverse=True)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"coder": {"prefixes": [32, 8]}}, r"coder.prefixes=\[32, 8\]: must rise"),
        ({"coder": {"prefixes": [64]}}, r"less than coder.width"),
        ({"coder": {"activation": ActivationName.groupmax, "k": 5}}, r"coder.width=64 to be a multiple of coder.k=5"),
        ({"train": {"k_start": 2}}, r"train.k_start=2: must be between coder.k and coder.width"),
        (
            {"coder": {"kind": Kind.transcoder, "side": Side.input}},
            "coder.side=input is for SAEs and crosscoders; a transcoder",
        ),
        ({"coder": {"activation": ActivationName.jumprelu}, "train": {"k_start": 8}}, r"train.k_start needs"),
        ({"train": {"k_anneal": 0.0}}, r"train.k_anneal=0.0"),
        ({"loss": {"l0": -1.0}}, r"loss.l0=-1.0"),
    ],
)
def test_bad_values(keys: dict[str, dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(
            TrainConfig(
                coder=CoderConfig(**{"k": 4, "width": 64, **keys.get("coder", {})}),
                train=LoopConfig(**keys.get("train", {})),
                loss=LossConfig(**keys.get("loss", {})),
            )
        )
