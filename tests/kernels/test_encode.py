"""Encode and decode against dense float64 autograd.

Tolerance in float32: a sum of n products of terms t rounds to at most about n * eps * sum|t|; inputs here are O(1) with
at most a few hundred terms, so 1e-4 absolute and relative leaves a factor of ten.
"""

import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipcoder.kernels.decode import sparse_decode, sparse_decode_reference
from skipcoder.kernels.encode import (
    encode_above,
    encode_batchtopk,
    encode_groupmax,
    encode_reference,
    encode_topk,
)
from skipcoder.kernels.jumprelu import fires, jumprelu
from skipcoder.kernels.preactivations import Search

ENCODERS = {"topk": encode_topk, "groupmax": encode_groupmax, "batchtopk": encode_batchtopk}
DEVICE = os.environ.get("SKIPCODER_TEST_DEVICE", "cpu")
ESTIMATES = ["bfloat16", "fp8"] + ["scout"] * (DEVICE == "cpu")


def problem(n: int, d: int, m: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W_enc, b_enc, b_pre, W_dec, b_dec that require gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (m, d), (m,), (d,), (m, d + 1), (d + 1,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for s in shapes]


def gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad


def ours(p: list[Tensor], k: int, activation: str = "topk", **search: Any) -> Tensor:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = p
    return sparse_decode(ENCODERS[activation](x, W_enc, b_enc, k, b_pre, Search(**search)), W_dec, b_dec)


def dense(p: list[Tensor], k: int, activation: str = "topk") -> Tensor:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = p
    return sparse_decode_reference(encode_reference(x, W_enc, b_enc, k, b_pre, activation), W_dec, b_dec)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.data(), st.integers(0, 999),
    st.sampled_from(sorted(ENCODERS)),
)  # fmt: skip
def test_forward_and_every_gradient_equal_dense_autograd(
    n: int, d: int, m: int, data: st.DataObject, seed: int, activation: str
) -> None:
    divisors = [k for k in range(1, m + 1) if m % k == 0]
    k = data.draw(st.sampled_from(divisors) if activation == "groupmax" else st.integers(1, m))
    mine, theirs = problem(n, d, m, seed), problem(n, d, m, seed)
    y, y_ref = ours(mine, k, activation=activation), dense(theirs, k, activation)
    torch.testing.assert_close(y, y_ref, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (y_ref * weight).sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


def test_float32() -> None:
    mine, theirs = problem(64, 48, 300, 1, torch.float32), problem(64, 48, 300, 1)
    y, y_ref = ours(mine, 8), dense(theirs, 8)
    y.square().sum().backward()
    y_ref.square().sum().backward()
    torch.testing.assert_close(y.double(), y_ref, rtol=1e-4, atol=1e-4)
    for a, b in zip(mine, theirs, strict=True):
        assert (gradient(a).double() - gradient(b)).norm() <= 1e-5 * gradient(b).norm()


def test_gradcheck() -> None:
    # Away from ties and from 0, where the choice of latents changes.
    p = problem(3, 4, 10, 5)
    assert torch.autograd.gradcheck(lambda *q: ours(list(q), 3), p, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("activation", ENCODERS)
def test_memory_bound_does_not_change_the_result(activation: str) -> None:
    p = problem(50, 6, 32, 2)
    few = ours(p, 4, activation=activation, chunk_bytes=8 * 96)  # 3 tokens at a time
    torch.testing.assert_close(few, ours(p, 4, activation=activation), rtol=1e-14, atol=1e-14)


def test_latents_at_zero_get_no_gradient() -> None:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = problem(7, 4, 12, 3)
    with torch.no_grad():
        b_enc -= 100  # every pre-activation negative
    codes = encode_topk(x, W_enc, b_enc, 5, b_pre)
    sparse_decode(codes, W_dec, b_dec).sum().backward()
    assert (codes.values == 0).all()
    for p in (x, W_enc, b_enc, b_pre, W_dec):
        assert not gradient(p).any()


@pytest.mark.parametrize("mode", ["float32", *ESTIMATES])
@pytest.mark.parametrize("activation", ENCODERS)
def test_empty_batch(activation: str, mode: str) -> None:
    p = problem(0, 4, 12, 3, torch.float32)
    y = ours(p, 3, activation=activation, mode=mode)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert not gradient(p[1]).any()


@pytest.mark.parametrize("mode", ESTIMATES)
@pytest.mark.parametrize("activation", ENCODERS)
def test_estimates_choose_and_float32_computes(mode: str, activation: str) -> None:
    """Two input dimensions are massive, as in language models: one far from 0, one with a large variance."""
    x, W_enc, b_enc, b_pre, *_ = (q.detach() for q in problem(400, 64, 512, 7, torch.float32))
    x[:, 3] += 300
    x[:, 5] *= 50
    centre, spread = x.mean(0), x.std(0).sqrt()
    search = Search(mode, centre_D=centre, spread_D=spread)
    codes = ENCODERS[activation](x, W_enc, b_enc, 16, b_pre, search)
    pre = (x - b_pre).double() @ W_enc.double().T + b_enc.double()
    token = torch.arange(400, device=DEVICE)[:, None].expand(-1, 16)
    if codes.offsets is not None:
        token = torch.searchsorted(codes.offsets, torch.arange(len(codes.values), device=DEVICE), right=True) - 1
    # Sums of 64 products of up to 300 * 4.
    torch.testing.assert_close(codes.values.double(), pre[token, codes.indices].relu(), rtol=1e-4, atol=1e-2)
    best = encode_reference(x.double(), W_enc.double(), b_enc.double(), 16, b_pre.double(), activation)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen[token, codes.indices] = True
    recall = (chosen & (best > 0)).sum() / (best > 0).sum()
    assert recall > 0.999  # near-ties that 8 bits misjudge are among the nominated


@pytest.mark.skipif("scout" not in ESTIMATES, reason="scout is for CPUs")
def test_scout_needs_centre_and_spread_where_dimensions_are_massive() -> None:
    """What the statistics are for: without them most of the 8 bits go to one dimension."""
    x, W_enc, b_enc, *_ = (q.detach() for q in problem(400, 64, 512, 7, torch.float32))
    x[:, 3] += 1000
    W_enc[:, 3] *= 1e-3
    exact = encode_topk(x, W_enc, b_enc, 16).indices

    def recall(**statistics: Any) -> float:
        found = encode_topk(x, W_enc, b_enc, 16, search=Search("scout", **statistics)).indices
        return float((exact[:, :, None] == found[:, None]).any(2).double().mean())

    assert recall() < 0.99 < 0.999 < recall(centre_D=x.mean(0))


@pytest.mark.parametrize("mode", ["float32", *ESTIMATES])
def test_widths_that_suit_no_hardware(mode: str) -> None:
    p = [q.detach() for q in problem(5, 13, 37, 8, torch.float32)]
    y, y_ref = ours(p, 37, mode=mode), dense([q.double() for q in p], 37)  # k = m: nothing to choose
    torch.testing.assert_close(y.double(), y_ref, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(0, 999), st.sampled_from([90, 10**6]))
def test_above_a_threshold(n: int, m: int, seed: int, chunk_bytes: int) -> None:
    """Also where no latent of a token, or none at all, fires."""
    mine, theirs = problem(n, 5, m, seed), problem(n, 5, m, seed)
    threshold = 6 * torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE) - 1
    x, W_enc, b_enc, b_pre, W_dec, b_dec = mine
    codes = encode_above(x, W_enc, b_enc, threshold, b_pre, Search(chunk_bytes=chunk_bytes))
    y = sparse_decode(codes, W_dec, b_dec)
    x, W_enc, b_enc, b_pre, W_dec, b_dec = theirs
    y_ref = sparse_decode_reference(encode_reference(x, W_enc, b_enc, 1, b_pre, threshold_M=threshold), W_dec, b_dec)
    torch.testing.assert_close(y, y_ref, rtol=1e-12, atol=1e-12)
    y.square().sum().backward()
    y_ref.square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("hint", [0.0, 0.5, 3.0, 1e9])
@pytest.mark.parametrize("mode", ["float32", *ESTIMATES])
def test_a_hint_does_not_change_batchtopk(hint: float, mode: str) -> None:
    """Too low, about right, too high and absurd."""
    x, W_enc, b_enc, *_ = (q.detach() for q in problem(60, 16, 256, 3, torch.float32))
    plain = encode_batchtopk(x, W_enc, b_enc, 4, search=Search(mode))
    hinted = encode_batchtopk(x, W_enc, b_enc, 4, search=Search(mode), hint=torch.tensor(hint).to(DEVICE))
    assert torch.equal(plain.indices, hinted.indices) and torch.equal(plain.values, hinted.values)


def test_jumprelus_thresholds_learn_in_their_window() -> None:
    pre = torch.tensor([0.10, 0.49, 0.51, 0.90], requires_grad=True)
    theta = torch.full((4,), 0.5, requires_grad=True)
    jumprelu(pre, theta, 0.1).backward(torch.tensor([1.0, 2, 3, 4]))
    assert pre.grad is not None and theta.grad is not None
    assert pre.grad.tolist() == [0, 0, 3, 4]
    assert theta.grad.tolist() == pytest.approx([0, -0.5 / 0.1 * 2, -0.5 / 0.1 * 3, 0])
    theta.grad = None
    assert fires(pre, theta, 0.1).tolist() == [0, 0, 1, 1]
    fires(pre, theta, 0.1).sum().backward()
    assert gradient(theta).tolist() == pytest.approx([0, -10, -10, 0])


def test_torch_compile_takes_the_step_whole() -> None:
    def step(*p: Tensor) -> Tensor:
        return ours(list(p), 3).square().sum()

    mine, theirs = problem(6, 5, 40, 3, torch.float32), problem(6, 5, 40, 3, torch.float32)
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    loss.backward()
    step(*theirs).backward()
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(gradient(a), gradient(b))


@pytest.mark.parametrize("k", [0, 13])
def test_k_out_of_range(k: int) -> None:
    x, W_enc, b_enc, *_ = problem(2, 4, 12, 0)
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and the number of latents, 12"):
        encode_topk(x, W_enc, b_enc, k)


def test_unknown_names_and_groups_that_do_not_divide() -> None:
    x, W_enc, b_enc, *_ = problem(2, 4, 12, 0)
    with pytest.raises(ValueError, match="mode='fp4': choose from float32, bfloat16, fp8, scout"):
        encode_topk(x, W_enc, b_enc, 3, search=Search("fp4"))
    with pytest.raises(ValueError, match="12 latents do not divide by k=5"):
        encode_groupmax(x, W_enc, b_enc, 5)
