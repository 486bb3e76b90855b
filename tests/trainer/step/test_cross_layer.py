"""Cross-layer transcoders: each layer's latents also write to later layers."""

from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.bank.bank import train, train_bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.cross_layer import CrossLayerTranscoder
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    LossConfig,
    OptimConfig,
    StoreRef,
    StreamConfig,
    TrainConfig,
)
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.data.turns import in_turns
from skipcoder.trainer.run.build import any_learner, hookpoints
from skipcoder.trainer.step.cross_layer import CrossLayerLearner, Meeting
from skipcoder.trainer.step.optimisers import schedule
from tests.trainer.run.test_run import assert_same

NAMES = ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]


def config(
    store: ActivationStore,
    kind: str = Kind.clt,
    hookpoint: str = "layers.*.mlp",
    window: int | None = None,
    **keys: Any,
) -> TrainConfig:
    coder = {"k": 4, "width": 64, **{k: v for k, v in keys.items() if k in CoderConfig.__dataclass_fields__}}
    return TrainConfig(
        store=StoreRef(str(store.path)),
        hookpoint=hookpoint,
        coder=CoderConfig(kind=kind, window=window, **coder),
        optim=OptimConfig(lr=1e-2),
        loss=LossConfig(auxk=1 / 32),
        stream=StreamConfig(pool_chunks=8),
        train=LoopConfig(
            tokens=24 * 128, batch_tokens=128, save_every=10, log_every=5, dead_tokens=1000,
            micro_batches=keys.get("micro_batches", 1),
        ),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "alone", "activation"),
    [
        (Kind.clt, Kind.transcoder, "topk"),
        (Kind.clt, Kind.transcoder, "batchtopk"),
        (Kind.clt, Kind.transcoder, "jumprelu"),
        (Kind.skip_clt, Kind.skip_transcoder, "topk"),
    ],
)
def test_with_a_window_of_0_it_is_transcoders_to_the_bit(
    store: ActivationStore, kind: Kind, alone: Kind, activation: str, tmp_path: Path
) -> None:
    """In a bank beside one of them, too."""
    jobs = [(config(store, kind, window=0, activation=activation), tmp_path / "clt")]
    jobs.append((config(store, alone, NAMES[1], activation=activation), tmp_path / NAMES[1]))
    outcomes = train_bank(jobs)
    assert not any(outcome.error for outcome in outcomes)
    for name in (NAMES[0], NAMES[2]):
        train(config(store, alone, name, activation=activation), tmp_path / name)
    tensors = load_file(tmp_path / "clt" / "checkpoint" / "coder.safetensors")
    for layer, name in enumerate(NAMES):
        expected = load_file(tmp_path / name / "checkpoint" / "coder.safetensors")
        found = {key.removeprefix(f"layers.{layer}."): t for key, t in tensors.items() if f"layers.{layer}." in key}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), name


def sides_of(store: ActivationStore, steps: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    stream = ActivationStream(store, NAMES, 128)
    return [(b.side(NAMES, "input"), b.side(NAMES, "output")) for b, _ in zip(stream, range(steps), strict=False)]


def dense_fvus(learner: CrossLayerLearner, data: Sequence[tuple[list[torch.Tensor], ...]]) -> list[list[float]]:
    """The steps of all layers at once, from the formulas, dense, in float64 by autograd: of each step each layer's
    FVU."""
    layers = learner.learners
    p = [{n: q.detach().double().clone().requires_grad_() for n, q in one.coder.named_parameters()} for one in layers]
    adams = [torch.optim.Adam(mine.values(), lr=1e-2, eps=learner.cfg.optim.eps) for mine in p]
    losses = []
    for step, (inputs, outputs) in enumerate(data):
        y_hat = [torch.zeros_like(y, dtype=torch.float64) for y in outputs]
        for layer, one in enumerate(layers):
            x = inputs[layer].double() / one.reads.scales[0]
            values, indices = (x @ p[layer]["W_enc"].T + p[layer]["b_enc"]).relu().topk(one.coder.cfg.k)
            f = torch.zeros(len(x), 64, dtype=torch.float64).scatter(1, indices, values)
            for target, part in zip(learner.targets[layer], (f @ p[layer]["W_dec"]).split(24, 1), strict=True):
                y_hat[target] = y_hat[target] + part
            y_hat[layer] = y_hat[layer] + p[layer]["b_dec"]
            if "W_skip" in p[layer]:
                y_hat[layer] = y_hat[layer] + x @ p[layer]["W_skip"].T
        fvus = []
        for layer, one in enumerate(layers):
            y = outputs[layer].double() / one.writes.scales[0]
            fvus.append((y - y_hat[layer]).square().sum() / (len(y) * one.writes.variances[0]))
        losses.append([float(fvu) for fvu in fvus])
        for adam in adams:
            adam.param_groups[0]["lr"] = 1e-2 * schedule(learner.cfg.optim, step, learner.steps)
            adam.zero_grad()
        torch.stack(fvus).sum().backward()
        for mine, adam in zip(p, adams, strict=True):
            torch.nn.utils.clip_grad_norm_(mine.values(), 1.0)
            adam.step()
    return losses


@pytest.mark.parametrize("kind", [Kind.clt, Kind.skip_clt])
@pytest.mark.parametrize(("window", "micro_batches"), [(None, 1), (1, 1), (None, 3)])
def test_steps_equal_the_dense_reference(
    store: ActivationStore, kind: Kind, window: int | None, micro_batches: int
) -> None:
    cfg = config(store, kind, window=window, micro_batches=micro_batches)
    cfg.loss.auxk, cfg.encode.mode = 0.0, EncodeMode.float32
    data = sides_of(store, 6)
    learner, again = (any_learner(cfg, store, NAMES, 24, "cpu") for _ in range(2))
    assert isinstance(learner, CrossLayerLearner) and isinstance(again, CrossLayerLearner)
    found = [learner.step(*pair, 128) for pair in data]
    assert learner.clock.read().keys() == {"encode", "decode", "backward", "optimiser"}
    assert not learner.learners[2].clock.marks
    expected = dense_fvus(again, data)
    for mine, theirs in zip(found, expected, strict=True):
        assert [float(mine[f"fvu_side_{layer}"]) for layer in range(3)] == pytest.approx(theirs, rel=2e-4)
        assert float(mine["fvu"]) == pytest.approx(sum(theirs) / 3, rel=2e-4)


def test_layers_meet_once_for_each_micro_batch() -> None:
    """And leave nothing behind."""
    meeting = Meeting([[2, 3], [3]], [range(2), range(1, 2)])
    generator = torch.Generator().manual_seed(0)
    rounds = [(torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)) for _ in range(3)]

    def come(layer: int) -> list[torch.Tensor]:
        return [meeting.total(layer, both[layer]) for both in rounds]

    first, second = in_turns([partial(come, layer) for layer in range(2)], at_once=2)
    for (a, b), of_first, of_second in zip(rounds, first, second, strict=True):
        assert torch.equal(of_first, torch.cat([a[:, :2], a[:, 2:] + b], 1)) and torch.equal(of_second, a[:, 2:] + b)
    assert not meeting._written


@pytest.mark.slow
def test_a_run_its_files_and_what_it_computes(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = train(config(store, Kind.skip_clt, window=1), tmp_path)
    assert "skip_clt: 5 decoder matrices, 0.00 GiB; to train, about 0.5 GiB" in capsys.readouterr().out
    coder: Any = SparseCoder.load(tmp_path)
    assert isinstance(coder, CrossLayerTranscoder) and summary["kind"] == "skip_clt"
    assert [side["hookpoint"] for side in coder.meta["sides"]] == NAMES == [s["hookpoint"] for s in summary["sides"]]
    assert [side["side"] for side in coder.meta["read_sides"]] == ["input"] * 3
    assert [tuple(one.W_dec.shape) for one in coder] == [(64, 48), (64, 48), (64, 24)]
    (batch,) = ActivationStream(store, NAMES, 4096, split="validation", epochs=1)
    x, y = (torch.cat(batch.side(NAMES, side), 1) for side in ("input", "output"))
    out = coder(x)
    parts = [one(part).y_hat for one, part in zip(coder, x.split(24, 1), strict=True)]
    expected = [parts[0][:, :24], parts[0][:, 24:] + parts[1][:, :24], parts[1][:, 24:] + parts[2]]
    torch.testing.assert_close(out.y_hat, torch.cat(expected, 1), rtol=1e-5, atol=1e-5)
    assert int(out.indices.max()) >= 128 and out.values.shape[1] == 12
    for layer, facts in enumerate(summary["sides"]):
        error, target = ((z.double().split(24, 1)[layer]) for z in (y - out.y_hat, y))
        fvu = float(error.square().sum() / (target - target.mean(0)).square().sum())
        assert facts["validation_fvu"] == pytest.approx(fvu, rel=1e-4)
    assert coder.W_dec.shape == (192, 24) and coder.side_norms().shape == (192, 3)
    assert not coder.side_norms()[128:, :2].any()
    again = tmp_path / "again"
    coder.save(again)
    assert (again / "coder.safetensors").read_bytes() == (tmp_path / "checkpoint" / "coder.safetensors").read_bytes()


@pytest.mark.slow
def test_resumes_to_the_bit(store: ActivationStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config(store), tmp_path / "whole")
    real, steps = CrossLayerLearner.step, []

    class KilledError(BaseException):
        pass

    def dying(self: CrossLayerLearner, *args: Any) -> Any:
        steps.append(1)
        if len(steps) == 18:
            raise KilledError
        return real(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(CrossLayerLearner, "step", dying)
        train(config(store), tmp_path / "cut")
    train(config(store), tmp_path / "cut")
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_what_cannot_be_is_refused(
    store: ActivationStore, cache_config: Any, capture_here: Any, tmp_path: Path
) -> None:
    mixed = capture_here(cache_config(tmp_path / "mixed.zarr", ("layers.1.mlp", "layers.1.self_attn")))
    for keys, message in (
        ({"window": 3}, r"coder.window=3: of 3 layers none is so far on; at most 2"),
        ({"prefixes": [8]}, r"coder.prefixes is not for a clt"),
    ):
        with pytest.raises(UserError, match=message):
            train(config(store, **keys), tmp_path)
    assert hookpoints(config(store, hookpoint="layers.1.mlp"), mixed) == ["layers.1.mlp"]
    with pytest.raises(UserError, match=r"a clt needs one of each layer, not layers.1.mlp, layers.1.self_attn"):
        hookpoints(config(store, hookpoint="layers.1.*"), mixed)
    with pytest.raises(UserError, match=r"coder.window=1: at least 0, and for cross-layer transcoders alone"):
        config(store, Kind.transcoder, window=1)
    with pytest.raises(UserError, match=r"coder.window=-1"):
        config(store, window=-1)


def two_hops() -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A toy of two steps (LessWrong 6CS2NDmoLCFcEJMor): layer 0 computes the halves of two exclusive ors of its four
    inputs, layer 1 whether both ors hold."""
    inputs = torch.tensor(list(product([-1.0, 1.0], repeat=4)))
    a, b, c, d = (inputs > 0).T
    halves = torch.stack([a & ~b, ~a & b, c & ~d, ~c & d], 1).float()
    both = 2 * ((a ^ b) & (c ^ d)).float()[:, None]
    one, gap = torch.ones(16, 1), torch.zeros(16, 4)
    return [torch.cat([inputs, gap, one], 1), torch.cat([gap, halves, 0 * one], 1)], [
        torch.cat([inputs, halves, one], 1),
        torch.cat([gap, gap, both], 1),
    ]


@pytest.mark.slow
def test_a_low_fvu_does_not_show_two_steps() -> None:
    """Where the truth takes two steps, layer 0 of a CLT writes part of the second one's result at once; transcoders
    cannot. `from_earlier` tells."""
    inputs, outputs = two_hops()
    moments_x, moments_y = ([Moments.of(z) for z in sides] for sides in (inputs, outputs))
    shares = {}
    for window in (0, None):
        cfg = TrainConfig(
            coder=CoderConfig(kind=Kind.clt, k=3, width=32, window=window), optim=OptimConfig(lr=2e-3),
            train=LoopConfig(tokens=16 * 800, batch_tokens=16),
        )  # fmt: skip
        learner = CrossLayerLearner(cfg, moments_x, moments_y, 800, "cpu")
        for _ in range(800):
            last = learner.step(inputs, outputs, 16)
        assert float(last["fvu_side_1"]) < 0.02
        shares[window] = learner.folded().earlier_shares(torch.cat(inputs, 1))
    assert shares[0] == [0, 0] and shares[None][0] == 0 and shares[None][1] > 0.1
