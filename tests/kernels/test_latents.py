"""Sums over latents' tokens in Triton's interpreter (or on a GPU), and optimiser steps that form them themselves.

Tolerances as in test_gpu.py.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from skipcoder.kernels import backend
from skipcoder.kernels.rows import ByLatent, by_latent, gather_dot
from skipcoder.kernels.unsummed import RowSums
from skipcoder.kernels.update import adam_rows, sign_rows, sign_step
from tests.kernels.test_gpu import DEVICE, assert_close, problem

pytestmark = pytest.mark.slow

gpu = pytest.importorskip("skipcoder.kernels.gpu.latents")

SHAPES = [(5, 3, 7, 20), (1, 1, 1, 1), (3, 9, 33, 12), (4, 3, 300, 6)]  # N, K, D, M; 300 is wider than a tile


@pytest.fixture(autouse=True, params=[1, 3, 256])
def segments(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """So short that most latents are split, and so long that none is; some latents never fire."""
    monkeypatch.setattr(gpu, "SEGMENT", request.param)
    monkeypatch.setattr(backend, "ON_CPU", "cuda" not in os.environ.get("SKIPCODER_TEST_DEVICE", ""))


def exact_sums(indices: Tensor, weights: Tensor, rows: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The sums in float64, and the sums of their terms' sizes."""
    terms = weights.double()[:, :, None] * rows.double()[:, None]
    none = torch.zeros(m, rows.shape[1], dtype=torch.float64, device=DEVICE)
    exact, sizes = (none.index_add(0, indices.flatten(), t.flatten(0, 1)) for t in (terms, terms.abs()))
    return exact, sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d", "m"), SHAPES)
def test_sum_rows(n: int, k: int, d: int, m: int, dtype: torch.dtype) -> None:
    indices, weights, rows, _ = problem(n, k, d, m, dtype)
    latents = by_latent(indices, m)
    got = gpu.sum_rows(latents, weights, rows)
    assert got.dtype == torch.float32
    assert_close(got, *exact_sums(indices, weights, rows, m), n * k)


def test_one_latent_takes_every_token() -> None:
    rows = torch.randn(700, 4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    weights = torch.ones(700, 1, device=DEVICE)
    got = gpu.sum_rows(by_latent(torch.full((700, 1), 2, device=DEVICE), 4), weights, rows)
    assert not got[[0, 1, 3]].any()
    assert_close(got[2], rows.double().sum(0), rows.double().abs().sum(0), 700)


def test_a_batch_in_which_nothing_fires() -> None:
    none, W = torch.empty(0, 3, dtype=torch.long, device=DEVICE), torch.ones(5, 8, device=DEVICE)
    assert not gpu.sum_rows(by_latent(none, 5), none.float(), W[:0]).any()
    found = gpu.measure(by_latent(none, 5), none.float(), W[:0], None, W)
    assert not found.squares_M.any() and not found.weights_M.any() and not len(found.dots)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("n", "k", "d", "m"), SHAPES)
def test_measure(n: int, k: int, d: int, m: int, unit: bool, keep: bool) -> None:
    """Lengths, sums of weights and dot products, and if asked for the sums themselves."""
    indices, weights, rows, W = problem(n, k, d, m, torch.float32)
    scale = torch.tensor(-2.5, device=DEVICE)
    latents = by_latent(indices, m)
    found = gpu.measure(latents, weights, rows, scale, W, unit, keep)
    exact, _ = exact_sums(indices, weights, -2.5 * rows.double(), m)
    if unit:
        exact -= (exact * W).sum(1, keepdim=True) / W.double().square().sum(1, keepdim=True) * W
    # Errors of length n k 2^-23 in sums of length up to sqrt(d) times that of a weight and a row.
    torch.testing.assert_close(found.squares_M.double(), exact.square().sum(1), rtol=1e-4, atol=1e-4 * d)
    torch.testing.assert_close(found.dots.view(n, k), -2.5 * gather_dot(rows, W, indices), rtol=1e-5, atol=1e-4)
    total = torch.zeros(m, device=DEVICE).index_add(0, indices.flatten(), weights.flatten())
    torch.testing.assert_close(found.weights_M, total, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.sums_MD, gpu.sum_rows(latents, weights, rows)) if keep else found.sums_MD is None


def unsummed(latents: ByLatent, weights: Tensor, rows: Tensor, W: Tensor, unit: bool, keep: bool = False) -> RowSums:
    scale = torch.tensor(0.3, device=DEVICE)
    found = gpu.measure(latents, weights, rows, scale, W, unit, keep)
    return RowSums(latents, weights, rows, scale, found.squares_M, found.partial_PD, found.sums_MD)


def across(grad: Tensor, W: Tensor) -> Tensor:
    return grad - (grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True) * W


def steps(n: int, k: int, d: int, m: int) -> Iterator[tuple[ByLatent, Tensor, Tensor]]:
    """Two batches of entries and rows."""
    g = torch.Generator().manual_seed(d)
    for _ in range(2):
        indices = torch.stack([torch.randperm(m, generator=g)[:k] for _ in range(n)]).to(DEVICE)
        yield (
            by_latent(indices, m),
            torch.randn(n, k, generator=g).to(DEVICE),
            torch.randn(n, d, generator=g).to(DEVICE),
        )


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(("n", "k", "d", "m"), SHAPES)
def test_adam_on_unsummed_gradients_is_torchs(n: int, k: int, d: int, m: int, unit: bool) -> None:
    """Moments and weights agree with torch's own to float32 rounding, also of rows that never fire."""
    g = torch.Generator().manual_seed(1)
    p = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1).to(DEVICE)
    theirs = torch.nn.Parameter(p.double())
    adam = torch.optim.Adam([theirs], lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    first, second, step = torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=DEVICE)
    for latents, weights, rows in steps(n, k, d, m):
        sums = unsummed(latents, weights, rows, p, unit)
        grad = sums.dense().double()
        theirs.grad = across(grad, theirs.detach()) if unit else grad
        adam.step()
        if unit:
            theirs.data /= theirs.data.norm(dim=1, keepdim=True)
        step += 1
        p_kept, first_kept, second_kept = (t.clone() for t in (p, first, second))
        kept = unsummed(latents, weights, rows, p, unit, keep=True)
        adam_rows(
            p_kept, first_kept, second_kept, kept, step, torch.tensor(1e-2, device=DEVICE), (0.9, 0.999), 1e-8, unit
        )
        adam_rows(p, first, second, sums, step, torch.tensor(1e-2, device=DEVICE), (0.9, 0.999), 1e-8, unit)
        assert torch.equal(p_kept, p) and torch.equal(first_kept, first) and torch.equal(second_kept, second)
        state = adam.state[theirs]
        # A gradient of 0 across a row is one of rounding alone here, which Adam scales up to a whole step.
        rounding = 1e-2 if unit and d == 1 else 1e-5
        for mine, exact in ((first, state["exp_avg"]), (second, state["exp_avg_sq"]), (p, theirs.detach())):
            torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("unit", [False, True])
def test_sign_steps_on_unsummed_gradients_are_those_on_dense_ones(unit: bool) -> None:
    n, k, d, m = 9, 5, 40, 12
    y = torch.nn.functional.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(1)), dim=1).to(DEVICE)
    z = y.clone()
    y_dense, z_dense = y.clone(), z.clone()
    rate, step = torch.tensor(0.01, device=DEVICE), torch.zeros((), device=DEVICE)
    for latents, weights, rows in steps(n, k, d, m):
        step += 1
        sums = unsummed(latents, weights, rows, y, unit, keep=bool(step % 2))
        grad = across(sums.dense(), y_dense) if unit else sums.dense()
        sign_step(y_dense, z_dense, grad, rate, 0.9, step)
        sign_rows(y, z, sums, rate, 0.9, step, unit)
        if unit:
            y_dense, z_dense = (torch.nn.functional.normalize(t, dim=1) for t in (y_dense, z_dense))
        torch.testing.assert_close(y, y_dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(z, z_dense, rtol=1e-5, atol=1e-6)
