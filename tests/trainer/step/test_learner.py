"""One training step against a dense float64 autograd reference written from the formulas."""

from typing import Any

import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import (
    CoderConfig,
    EncodeConfig,
    EncodeMode,
    Kind,
    LoopConfig,
    OptimConfig,
    Side,
    SkipInit,
    TrainConfig,
)
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run import build as assemble
from skipcoder.trainer.run.build import make_learner
from skipcoder.trainer.step import learner as learner_module
from skipcoder.trainer.step import skip_init
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.optimisers import learning_rate, schedule
from skipcoder.trainer.step.skip_init import cache_file, ridge, solve
from tests.trainer.coders import ONE_BY_ONE

HOOKPOINT = "layers.1.mlp"


def config(kind: Kind, **coder: Any) -> TrainConfig:
    return TrainConfig(
        coder=CoderConfig(kind=kind, k=4, width=64, **coder),
        optim=OptimConfig(lr=1e-2),
        train=LoopConfig(tokens=20_000, batch_tokens=256),
        encode=EncodeConfig(mode=EncodeMode.float32),
    )


def batches(store: ActivationStore, n: int) -> list[Any]:
    stream = iter(ActivationStream(store, HOOKPOINT, 256, pool_chunks=8))
    return [next(stream) for _ in range(n)]


def reference_steps(learner: Learner, data: list[Any]) -> dict[str, torch.Tensor]:
    """The same steps, dense, in float64, with torch's plain Adam."""
    coder, s_in, s_out = learner.coder, learner.reads.scale, learner.writes.scale
    is_sae = coder.cfg.reconstructs
    p = {n: q.detach().double().clone().requires_grad_() for n, q in coder.named_parameters()}
    cfg = learner.cfg.optim
    assert cfg.lr is not None
    adam = torch.optim.Adam(p.values(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    for step, batch in enumerate(data):
        adam.param_groups[0]["lr"] = cfg.lr * schedule(cfg, step, learner.steps)
        sides = {"input": batch.x.double() / s_in, "output": batch.y.double() / s_out}
        x, y = sides[learner.sides[0]], sides[learner.sides[1]]
        pre = (x - p["b_dec"] if is_sae else x) @ p["W_enc"].T + p["b_enc"]
        values, indices = pre.relu().topk(coder.cfg.k)
        y_hat = torch.zeros_like(pre).scatter(1, indices, values) @ p["W_dec"] + p["b_dec"]
        if "W_skip" in p:
            y_hat = y_hat + x @ p["W_skip"].T
        loss = (y - y_hat).square().sum() / (len(x) * learner.writes.variances[0])
        adam.zero_grad()
        loss.backward()
        if is_sae:
            w, g = p["W_dec"].detach(), p["W_dec"].grad
            assert g is not None
            g -= (g * w).sum(1, keepdim=True) / w.square().sum(1, keepdim=True) * w
        torch.nn.utils.clip_grad_norm_(p.values(), cfg.clip)
        adam.step()
        if is_sae:
            p["W_dec"].data /= p["W_dec"].data.norm(dim=1, keepdim=True)
    return {**{n: q.detach() for n, q in p.items()}, "loss": loss.detach()}


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_five_steps_equal_the_dense_reference(store: ActivationStore, kind: Kind) -> None:
    """Five Adam steps of 1e-2: float32 rounding enters the moments at 1e-7 relative; Adam's division by sqrt(v)
    magnifies it where gradients are tiny, so parameters are compared in norm."""
    data = batches(store, 5)
    learner = make_learner(config(kind), store, HOOKPOINT, 50, "cpu")
    expected = reference_steps(learner, data)
    for batch in data:
        result = learner.step(batch.x, batch.y, batch.tokens)
    torch.testing.assert_close(result["fvu"].double(), expected.pop("loss"), rtol=1e-4, atol=0)
    for name, value in learner.coder.named_parameters():
        assert (value.double() - expected[name]).norm() <= 1e-3 * expected[name].norm() + 1e-6, name


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_two_hundred_steps_reach_the_same_fvu(store: ActivationStore, kind: Kind) -> None:
    """Where a latent is a near-tie, float32 and float64 may part ways; the FVU they reach does not."""
    cfg = config(kind)
    cfg.optim.lr = 1e-3
    data = batches(store, 200)
    learner = make_learner(cfg, store, HOOKPOINT, 200, "cpu")
    expected = reference_steps(learner, data)
    for batch in data:
        result = learner.step(batch.x, batch.y, batch.tokens)
    assert float(result["fvu"]) == pytest.approx(float(expected["loss"]), rel=1e-3)
    assert float(result["fvu"]) < 0.95


def test_loss_is_the_fvu_of_the_mean_predictor_at_the_start(store: ActivationStore) -> None:
    """Transcoders start as the constant mean(y); over all training tokens that has FVU 1."""
    learner = make_learner(config(Kind.transcoder), store, HOOKPOINT, 50, "cpu")
    keep_all = ActivationStream(store, HOOKPOINT, 5000, epochs=1, filter=TokenFilter())
    (batch,) = list(keep_all)
    assert float(learner.step(batch.x, batch.y, batch.tokens)["fvu"]) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("kind", ONE_BY_ONE)
def test_training_lowers_the_loss_and_keeps_unit_norm(store: ActivationStore, kind: Kind) -> None:
    learner = make_learner(config(kind, skip_init=SkipInit.zero), store, HOOKPOINT, 80, "cpu")
    losses = [float(learner.step(b.x, b.y, b.tokens)["fvu"]) for b in batches(store, 80)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])
    norms = learner.coder.W_dec.norm(dim=1)
    if learner.coder.cfg.reconstructs:
        torch.testing.assert_close(norms, torch.ones_like(norms))
    else:
        assert not torch.allclose(norms, torch.ones_like(norms))


def test_folded_coder_takes_raw_activations(store: ActivationStore) -> None:
    (batch,) = batches(store, 1)
    learner = make_learner(config(Kind.skip_transcoder), store, HOOKPOINT, 50, "cpu")
    for _ in range(3):
        learner.step(batch.x, batch.y, batch.tokens)
    inside, outside = learner.coder(batch.x / learner.reads.scale), learner.folded()(batch.x)
    assert torch.equal(inside.indices, outside.indices)
    assert torch.equal(inside.y_hat * learner.writes.scale, outside.y_hat)


def test_dead_latents_are_counted_by_tokens(store: ActivationStore) -> None:
    cfg = config(Kind.transcoder)
    cfg.train.dead_tokens = 500
    learner = make_learner(cfg, store, HOOKPOINT, 50, "cpu")
    with torch.no_grad():
        learner.coder.b_enc[7] -= 1e6
    counts = []
    for batch in batches(store, 3):
        learner.step(batch.x, batch.y, batch.tokens)
        counts.append((int(learner.since_fired_M[7]), learner.dead))
    assert [c[0] for c in counts] == [256, 512, 768]
    assert counts[0][1] == 0 and counts[1][1] >= 1


def test_sae_of_the_input_side(store: ActivationStore) -> None:
    learner = make_learner(config(Kind.sae, side=Side.input), store, HOOKPOINT, 50, "cpu")
    moments = store.moments(HOOKPOINT, "input")
    assert learner.sides == ("input", "input")
    assert learner.writes.variances[0] * learner.writes.scales[0] ** 2 == pytest.approx(moments.variance.sum())


def test_ridge_is_the_least_squares_solution(store: ActivationStore) -> None:
    stream = ActivationStream(store, HOOKPOINT, 300, epochs=1)
    W, b = solve(stream, 24)
    data = list(ActivationStream(store, HOOKPOINT, 300, epochs=1))
    x, y = (torch.cat([getattr(batch, side) for batch in data]).double() for side in "xy")
    n = -(-64 * 24 // 300) * 300
    x, y = x[:n], y[:n]
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y).solution
    # lambda = 1e-6 of the mean eigenvalue moves the solution by about that much over the smallest one.
    torch.testing.assert_close(x @ W.T + b, x @ solution[:-1] + solution[-1], rtol=1e-3, atol=1e-3)
    learner = make_learner(config(Kind.skip_transcoder), store, HOOKPOINT, 50, "cpu")
    zero = make_learner(config(Kind.skip_transcoder, skip_init=SkipInit.zero), store, HOOKPOINT, 50, "cpu")
    (batch,) = batches(store, 1)
    losses = [float(one.step(batch.x, batch.y, batch.tokens)["fvu"]) for one in (learner, zero)]
    assert losses[0] < 0.9 * losses[1]


def test_ridge_solution_is_kept_beside_the_store(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TokenFilter()
    name = cache_file(store, ActivationStream(store, HOOKPOINT, 8192, filter=kept, epochs=1))
    file = store.path.with_name(f"{store.path.stem}.derived") / name
    file.unlink(missing_ok=True)
    solved = ridge(store, HOOKPOINT, kept)
    assert file.exists()
    with monkeypatch.context() as patch:
        patch.setattr(skip_init, "solve", None)
        assert all(torch.equal(a, b) for a, b in zip(solved, ridge(store, HOOKPOINT, kept), strict=True))
    other = ActivationStream(store, HOOKPOINT, 8192, filter=TokenFilter(2), epochs=1)
    assert cache_file(store, other) != name  # other tokens, other solution
    file.write_bytes(file.read_bytes()[:100])
    assert all(torch.equal(a, b) for a, b in zip(solved, ridge(store, HOOKPOINT, kept), strict=True))
    assert file.stat().st_size > 100  # mended


def test_ridge_of_every_token_fits_them_as_well_as_can_be(store: ActivationStore) -> None:
    W, b = ridge(store, HOOKPOINT, TokenFilter(), per_dimension=10**6)
    (whole,) = ActivationStream(store, HOOKPOINT, store.rows * store.context, epochs=1)
    x, y = whole.x.double(), whole.y.double()
    error, x = y - x @ W.T - b, x - x.mean(0)
    torch.testing.assert_close(error.mean(0), torch.zeros_like(b), rtol=0, atol=1e-9)
    # No direction of x tells anything about the error, but for lambda = 1e-6.
    assert (error.T @ x).abs().max() < 1e-4 * (y.T @ x).abs().max()


def test_skip_starts_from_ridge_where_the_text_suffices(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def skip(init: SkipInit | None) -> torch.Tensor:
        learner = make_learner(config(Kind.skip_transcoder, skip_init=init), store, HOOKPOINT, 50, "cpu")
        assert learner.coder.W_skip is not None
        return learner.coder.W_skip.detach()

    assert torch.equal(skip(None), skip(SkipInit.ridge)) and skip(None).any() and not skip(SkipInit.zero).any()
    monkeypatch.setattr(assemble, "TOKENS_PER_DIMENSION", 1000)
    monkeypatch.setattr(skip_init, "TOKENS_PER_DIMENSION", 1000)
    assert not skip(None).any()
    assert "the skip starts from zero: ridge would need 24,000 training tokens, not 1," in capsys.readouterr().out
    with pytest.raises(UserError, match=r"coder.skip_init=ridge needs 24,000 training tokens"):
        skip(SkipInit.ridge)


def test_density_is_the_mean_and_later_a_memory(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make_learner(config(Kind.transcoder), store, HOOKPOINT, 50, "cpu")
    data = batches(store, 4)
    rates = []
    for batch in data:
        before = learner.coder(batch.x / learner.reads.scale)
        rates.append(torch.bincount(before.indices[before.values > 0], minlength=64) / len(batch.x))
        learner.step(batch.x, batch.y, batch.tokens)
    torch.testing.assert_close(learner.density_M, torch.stack(rates).mean(0))
    monkeypatch.setattr(learner_module, "DENSITY_TOKENS", 512)
    remembered = learner.density_M.clone()
    now = learner.coder(data[0].x / learner.reads.scale)
    learner.step(data[0].x, data[0].y, data[0].tokens)
    rate = torch.bincount(now.indices[now.values > 0], minlength=64) / len(data[0].x)
    torch.testing.assert_close(learner.density_M, (remembered + rate) / 2)  # a batch is half of 512 tokens
    assert learner.density["median"] == float(learner.density_M.median())
    assert learner.density["dense"] == float((learner.density_M > 0.1).float().mean())


def test_papers_rate_and_schedule() -> None:
    assert learning_rate(OptimConfig(), 2**14) == pytest.approx(2e-4)
    assert learning_rate(OptimConfig(), 2**16) == pytest.approx(1e-4)
    factors = [schedule(OptimConfig(), s, 100_000) for s in range(100_000)]
    assert factors.index(max(factors)) in (999, 1000)
    assert factors[-1] == pytest.approx(1 / 99_000)
