"""Crosscoders: one code for several sides of a token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.evals.core.by_side import norm_shares
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.bank.bank import train, train_bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    LossConfig,
    OptimConfig,
    Side,
    StoreRef,
    StreamConfig,
    TrainConfig,
)
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import hookpoints, make_learner
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.optimisers import schedule
from tests.trainer.planted import Planted
from tests.trainer.run.test_run import assert_same, train_killed_after

LAYERS = "layers.{0,2}.mlp"
NAMES = ["layers.0.mlp", "layers.2.mlp"]


def config(store: ActivationStore, hookpoint: str = LAYERS, kind: Kind = Kind.crosscoder, **keys: Any) -> TrainConfig:
    coder = {"k": 4, "width": 64, **{k: v for k, v in keys.items() if k in CoderConfig.__dataclass_fields__}}
    return TrainConfig(
        store=StoreRef(str(store.path), keys.get("other")),
        hookpoint=hookpoint,
        coder=CoderConfig(kind=kind, **coder),
        optim=OptimConfig(lr=1e-2),
        loss=LossConfig(auxk=1 / 32),
        stream=StreamConfig(pool_chunks=keys.get("pool_chunks")),
        train=LoopConfig(tokens=24 * 128, batch_tokens=128, save_every=10, log_every=5, dead_tokens=1000),
    )


@pytest.mark.slow
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_over_one_side_it_is_an_sae_to_the_bit(
    store: ActivationStore, side: Side, activation: str, tmp_path: Path
) -> None:
    for kind in (Kind.sae, Kind.crosscoder):
        train(config(store, NAMES[0], kind, side=side, activation=activation), tmp_path / kind)
    assert_same(tmp_path / "sae", tmp_path / "crosscoder")


def dense_losses(learner: Learner, data: Sequence[tuple[list[torch.Tensor], ...]]) -> list[float]:
    """The steps of `learner`, dense, in float64 by autograd and torch's Adam, from the formula: one code, the mean of
    the sides' FVUs."""
    p = {n: q.detach().double().clone().requires_grad_() for n, q in learner.coder.named_parameters()}
    adam = torch.optim.Adam(p.values(), lr=1e-2, eps=learner.cfg.optim.eps)
    widths, losses = list(learner.writes.widths), []
    for step, (_, outputs) in enumerate(data):
        adam.param_groups[0]["lr"] = 1e-2 * schedule(learner.cfg.optim, step, learner.steps)
        x = torch.cat([y.double() / s for y, s in zip(outputs, learner.writes.scales, strict=True)], 1)
        pre = (x - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
        values, indices = pre.relu().topk(learner.coder.cfg.k)
        error = x - torch.zeros_like(pre).scatter(1, indices, values) @ p["W_dec"] - p["b_dec"]
        fvus = [
            e.square().sum() / (len(x) * variance)
            for e, variance in zip(error.split(widths, 1), learner.writes.variances, strict=True)
        ]
        loss = torch.stack(fvus).mean()
        losses.append(float(loss))
        adam.zero_grad()
        loss.backward()
        w, g = p["W_dec"].detach(), p["W_dec"].grad
        assert g is not None
        g -= (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
        adam.step()
        p["W_dec"].data /= p["W_dec"].data.norm(dim=1, keepdim=True)
    return losses


def sides_of(store: ActivationStore, steps: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    stream = ActivationStream(store, NAMES, 128)
    return [(b.side(NAMES, "input"), b.side(NAMES, "output")) for b, _ in zip(stream, range(steps), strict=False)]


def test_steps_equal_the_dense_reference(store: ActivationStore) -> None:
    cfg = config(store)
    cfg.loss.auxk = 0.0
    cfg.optim.warmup_steps = 0
    empty: list[torch.Tensor] = []
    data = [(empty, [a, 20 * b]) for _, (a, b) in sides_of(store, 6)]  # of different size and scale
    of_sides = [Moments.of(torch.cat(side)) for side in zip(*(outputs for _, outputs in data), strict=True)]
    learner, again = (Learner(cfg, of_sides, of_sides, 24, "cpu") for _ in range(2))
    assert len(set(learner.writes.scales)) == 2
    found = [learner.step(*pair, 128) for pair in data]
    assert [float(f["fvu"]) for f in found] == pytest.approx(dense_losses(again, data), rel=1e-4)
    for of_step in found:
        each = [float(of_step[f"fvu_side_{s}"]) for s in range(2)]
        assert float(of_step["fvu"]) == pytest.approx(sum(each) / 2, rel=1e-5) and each[0] != each[1]


def test_folded_and_saved_it_takes_raw_sides(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store)
    cfg.encode.mode = EncodeMode.float32
    learner = make_learner(cfg, store, NAMES, 24, "cpu")
    data = sides_of(store, 3)
    for pair in data:
        learner.step(*pair, 128)
    raw = torch.cat(data[0][1], 1)
    scale = torch.as_tensor(learner.writes.scale)
    inside = learner.coder(raw / scale)
    learner.folded().save(tmp_path)
    outside = SparseCoder.load(tmp_path)(raw)
    assert torch.equal(inside.indices, outside.indices) and torch.equal(inside.values, outside.values)
    assert torch.equal(inside.y_hat * scale, outside.y_hat)


@pytest.mark.slow
def test_a_run_writes_what_it_is_of(store: ActivationStore, tmp_path: Path) -> None:
    summary = train(config(store), tmp_path)
    coder = SparseCoder.load(tmp_path)
    assert summary["hookpoint"] == coder.meta["hookpoint"] == "layers.0.mlp + layers.2.mlp"
    assert [(s["hookpoint"], s["side"], s["module"], s["width"]) for s in coder.meta["sides"]] == [
        (name, "output", name, store.hookpoints[name]["d_out"]) for name in NAMES
    ]
    assert "read" not in coder.meta
    of_sides = summary["sides"]
    assert summary["train_fvu"] == pytest.approx(sum(s["train_fvu"] for s in of_sides) / 2, rel=1e-5)
    for facts, name in zip(of_sides, NAMES, strict=True):
        (batch,) = ActivationStream(store, name, 4096, split="validation", epochs=1)
        assert facts["hookpoint"] == name and facts["validation_fvu"] is not None
        assert len(batch.position) > 100 and 0 < facts["validation_fvu"] < 1.1


@pytest.mark.slow
def test_in_a_bank_beside_coders_of_fewer_sides_each_is_what_it_is_alone(
    store: ActivationStore, tmp_path: Path
) -> None:
    jobs = {
        "cross": config(store, pool_chunks=8),
        "sae": config(store, NAMES[0], Kind.sae, pool_chunks=8),
        "transcoder": config(store, NAMES[1], Kind.transcoder, pool_chunks=8, activation="batchtopk"),
    }
    for outcome in train_bank([(cfg, tmp_path / "bank" / name) for name, cfg in jobs.items()]):
        assert outcome.error is None and outcome.summary is not None and outcome.summary["bank_coders"] == 3
    for name, cfg in jobs.items():
        train(cfg, tmp_path / "alone" / name)
        assert_same(tmp_path / "bank" / name, tmp_path / "alone" / name)


@pytest.mark.slow
def test_resumes_to_the_bit(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(store), tmp_path / "whole")
    train_killed_after(config(store), tmp_path / "cut", 17, monkeypatch)
    train(config(store), tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_what_cannot_be_is_refused(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"hookpoint 'layers.7\*' matches none: .* holds layers.0.mlp, .*; name some with a glob"
    ):
        hookpoints(config(store, "layers.7*"), store)
    cfg = config(store)
    cfg.hookpoint = None
    with pytest.raises(UserError, match=r"hookpoint is not set: .* holds layers.0.mlp, .*; name some with a glob"):
        hookpoints(cfg, store)
    with pytest.raises(UserError, match=r"store.other is for coder.kind=crosscoder, not sae"):
        train(config(store, NAMES[0], Kind.sae, other=str(store.path)), tmp_path)
    cfg = config(store)
    cfg.stream.max_norm = 10
    with pytest.raises(UserError, match=r"stream.max_norm is for coders of one hookpoint"):
        train(cfg, tmp_path)


@pytest.mark.slow
def test_directions_on_two_of_three_layers_are_found() -> None:
    """95 % of them with a cosine above 0.9, and almost nothing on the third layer."""
    on = torch.ones(60, 3, dtype=torch.bool)
    on[torch.arange(60), torch.arange(60) % 3] = False
    world = Planted(on)
    coder = world.crosscoder(80, 800, ["a", "b", "c"])
    direction, cosine = world.nearest(coder)
    shares = norm_shares(coder)
    found = cosine > 0.9
    assert len(direction[found].unique()) >= 57
    assert shares[found, direction[found] % 3].max() < 0.1
