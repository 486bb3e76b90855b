"""Encode and decode against dense float64 autograd.

Tolerance in float32: a sum of n products of terms t rounds to at most about n * eps * sum|t|; inputs here are O(1) with
at most a few hundred terms, so 1e-4 absolute and relative leaves a factor of ten.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skipcoder.kernels import encode
from skipcoder.kernels.decode import sparse_decode, sparse_decode_reference
from skipcoder.kernels.encode import encode_topk, encode_topk_reference
from skipcoder.kernels.token_list import TokenList, gather_dot
from torch import Tensor

DEVICE = os.environ.get("SKIPCODER_TEST_DEVICE", "cpu")


def problem(n: int, d: int, m: int, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W_enc, b_enc, b_pre, W_dec, b_dec that require gradients."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, d), (m, d), (m,), (d,), (m, d + 1), (d + 1,)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for s in shapes]


def ours(p: list[Tensor], k: int, **options: object) -> Tensor:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = p
    values, indices, tokens = encode_topk(x, W_enc, b_enc, k, b_pre, **options)
    return sparse_decode(values, indices, W_dec, b_dec, tokens)


def dense(p: list[Tensor], k: int) -> Tensor:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = p
    return sparse_decode_reference(*encode_topk_reference(x, W_enc, b_enc, k, b_pre), W_dec, b_dec)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 20), st.integers(1, 9), st.integers(1, 40), st.data(), st.integers(0, 999))
def test_forward_and_every_gradient_equal_dense_autograd(
    n: int, d: int, m: int, data: st.DataObject, seed: int
) -> None:
    k = data.draw(st.integers(1, m))
    mine, theirs = problem(n, d, m, seed), problem(n, d, m, seed)
    y, y_ref = ours(mine, k), dense(theirs, k)
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
        assert (a.grad.double() - b.grad).norm() <= 1e-5 * b.grad.norm()


def test_gradcheck() -> None:
    # Away from ties and from 0, where the choice of latents changes.
    p = problem(3, 4, 10, 5)
    assert torch.autograd.gradcheck(lambda *q: ours(list(q), 3), p, eps=1e-7, atol=1e-5)


def test_memory_bound_does_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(50, 6, 30, 2)
    whole = ours(p, 4)
    monkeypatch.setattr(encode, "CHUNK_ELEMENTS", 90)  # 3 tokens at a time
    torch.testing.assert_close(ours(p, 4), whole, rtol=1e-14, atol=1e-14)


def test_latents_at_zero_get_no_gradient() -> None:
    x, W_enc, b_enc, b_pre, W_dec, b_dec = problem(7, 4, 12, 3)
    with torch.no_grad():
        b_enc -= 100  # every pre-activation negative
    values, indices, tokens = encode_topk(x, W_enc, b_enc, 5, b_pre)
    sparse_decode(values, indices, W_dec, b_dec, tokens).sum().backward()
    assert (values == 0).all()
    for p in (x, W_enc, b_enc, b_pre, W_dec):
        assert not p.grad.any()


def test_empty_batch() -> None:
    p = problem(0, 4, 12, 3)
    y = ours(p, 5)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert not p[1].grad.any()


def test_one_latent_on_every_token_and_one_on_none() -> None:
    mine, theirs = problem(40, 5, 9, 4), problem(40, 5, 9, 4)
    for p in (mine, theirs):
        with torch.no_grad():
            p[2][3] += 100
            p[2][6] -= 100
    ours(mine, 2).square().sum().backward()
    dense(theirs, 2).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)
    assert mine[4].grad[3].any() and not mine[4].grad[6].any()


def test_same_bits_every_time() -> None:
    grads = []
    for _ in range(3):
        p = problem(500, 16, 64, 6, torch.float32)
        ours(p, 8).square().sum().backward()
        grads.append([q.grad for q in p])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_bfloat16_chooses_and_float32_computes() -> None:
    p = [q.detach() for q in problem(400, 64, 512, 7, torch.float32)]
    x, W_enc, b_enc, b_pre, *_ = p
    values, indices, _ = encode_topk(x, W_enc, b_enc, 16, b_pre, torch.bfloat16)
    pre = (x - b_pre).double() @ W_enc.double().T + b_enc.double()
    exact = pre.gather(1, indices).relu()
    torch.testing.assert_close(values.double(), exact, rtol=1e-4, atol=1e-4)
    assert (values.diff(dim=1) <= 0).all()
    best = torch.topk(pre, 16).indices
    recall = (indices[:, :, None] == best[:, None]).any(2).double().mean()
    assert recall > 0.999  # near-ties that 8 bits misjudge are among the nominated


def test_token_list_sums() -> None:
    indices = torch.tensor([[0, 2], [2, 1], [2, 0]], device=DEVICE)
    weights = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=DEVICE)
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=DEVICE)
    tokens = TokenList(indices, 4)
    assert tokens.sum_rows(weights, rows).tolist() == [[7, 6], [0, 4], [7, 8], [0, 0]]
    assert tokens.sum_weights(weights).tolist() == [7, 4, 10, 0]
    assert gather_dot(rows, torch.eye(4, 2, device=DEVICE), indices).tolist() == [[1, 0], [0, 1], [0, 1]]


@pytest.mark.parametrize("k", [0, 13])
def test_k_out_of_range(k: int) -> None:
    x, W_enc, b_enc, *_ = problem(2, 4, 12, 0)
    with pytest.raises(ValueError, match=f"k={k} must be between 1 and the number of latents, 12"):
        encode_topk(x, W_enc, b_enc, k)
