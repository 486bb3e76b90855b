"""Every optimiser learns, resumes bit for bit, and saves the weights that it should."""

from typing import Any

import pytest
import torch

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import ActivationName, CoderConfig, Kind, LoopConfig, OptimConfig, OptimName, TrainConfig
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import make_learner
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.optimisers import learning_rate
from skipcoder.trainer.step.skip_init import start_skip
from tests.trainer.coders import ONE_BY_ONE

HOOKPOINT = "layers.1.mlp"
RATE = {OptimName.adam: 1e-2, OptimName.signum: 1e-2, OptimName.muon: 5e-2}


def learner(store: ActivationStore, name: OptimName, kind: Kind = Kind.transcoder) -> Learner:
    cfg = TrainConfig(
        coder=CoderConfig(kind=kind, k=4, width=64),
        optim=OptimConfig(name=name, lr=RATE[name]),
        train=LoopConfig(tokens=20_000, batch_tokens=256),
    )
    return make_learner(cfg, store, HOOKPOINT, 60, "cpu")


def batches(store: ActivationStore, n: int) -> list[Any]:
    stream = iter(ActivationStream(store, HOOKPOINT, 256, pool_chunks=8))
    return [next(stream) for _ in range(n)]


@pytest.mark.parametrize("name", OptimName)
def test_lowers_the_loss(store: ActivationStore, name: OptimName) -> None:
    one = learner(store, name)
    losses = [float(one.step(b.x, b.y, b.tokens)["fvu"]) for b in batches(store, 60)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name", OptimName)
@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_resumed_is_undisturbed(store: ActivationStore, name: OptimName, kind: Kind) -> None:
    data = batches(store, 8)
    whole, first, second = (learner(store, name, kind) for _ in range(3))
    for batch in data:
        whole.step(batch.x, batch.y, batch.tokens)
    for batch in data[:5]:
        first.step(batch.x, batch.y, batch.tokens)
    second.load_state_dict(first.state_dict())
    for batch in data[5:]:
        second.step(batch.x, batch.y, batch.tokens)
    for a, b in zip(whole.coder.parameters(), second.coder.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.folded().parameters(), second.folded().parameters(), strict=True):
        assert torch.equal(a, b)


def test_schedule_free_saves_the_average(store: ActivationStore) -> None:
    """The mean of the z, which for the bias can be followed by hand; and training goes on from y."""
    one = learner(store, OptimName.signum)
    zs = []
    for batch in batches(store, 6):
        one.step(batch.x, batch.y, batch.tokens)
        zs.append(one.optimiser.copies(one.coder.b_dec)[1].clone())
    before = one.coder.b_dec.detach().clone()
    average = torch.stack(zs).mean(0)
    torch.testing.assert_close(one.folded().b_dec / one.writes.scale, average, rtol=1e-5, atol=1e-6)
    assert torch.equal(one.coder.b_dec, before) and not torch.allclose(before, average)


def test_schedule_free_keeps_what_was_initialised_before_the_first_step(store: ActivationStore) -> None:
    """The first step's weight in the average is 1: it must not bring back the weights from before."""
    batch = batches(store, 1)[0]
    one = learner(store, OptimName.signum, Kind.skip_transcoder)
    W = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    start_skip(one, W, torch.zeros(24))
    assert one.coder.W_skip is not None
    started = one.coder.W_skip.detach().clone()
    one.step(batch.x, batch.y, batch.tokens)
    assert (one.coder.W_skip - started).abs().max() <= RATE[OptimName.signum] * 1.01
    cfg = one.cfg
    cfg.coder.activation = ActivationName.jumprelu
    one = make_learner(cfg, store, HOOKPOINT, 60, "cpu")
    first = one.step(batch.x, batch.y, batch.tokens)
    assert float(first["l0"]) == pytest.approx(4, abs=0.1)
    assert one.coder.threshold is not None and (one.coder.threshold > 0).all()


def test_batchtopk_is_calibrated_for_the_averaged_weights(store: ActivationStore) -> None:
    cfg = learner(store, OptimName.signum).cfg
    cfg.coder.activation = ActivationName.batchtopk
    one = make_learner(cfg, store, HOOKPOINT, 60, "cpu")
    data = batches(store, 6)
    for batch in data:
        one.step(batch.x, batch.y, batch.tokens)
    one.calibrate(data[0].x, data[0].y)
    values = one.folded()(data[0].x).values
    assert float((values > 0).sum() / len(values)) == pytest.approx(4, abs=0.02)


def test_schedule_free_saes_have_unit_rows(store: ActivationStore) -> None:
    one = learner(store, OptimName.signum, Kind.sae)
    for batch in batches(store, 6):
        one.step(batch.x, batch.y, batch.tokens)
    norms = one.folded().W_dec.norm(dim=1) / one.writes.scale
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_rates() -> None:
    for name, rate in ((OptimName.adam, 1e-4), (OptimName.signum, 2.5e-3), (OptimName.muon, 2e-3)):
        assert learning_rate(OptimConfig(name=name), 2**16) == pytest.approx(rate)
