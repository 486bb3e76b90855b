"""Codes and their sums over rows: by token, by latent, flat and padded; the operations as torch knows them."""

import pytest
import torch

from skipcoder.kernels.encode import Codes, encode_topk
from skipcoder.kernels.preactivations import Search
from skipcoder.kernels.rows import by_latent, gather_dot, gather_sum
from tests.kernels.test_encode import DEVICE, dense, gradient, ours, problem


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
    assert gradient(mine[4])[3].any() and not gradient(mine[4])[6].any()


def test_same_bits_every_time() -> None:
    grads = []
    for _ in range(3):
        p = problem(500, 16, 64, 6, torch.float32)
        ours(p, 8).square().sum().backward()
        grads.append([gradient(q) for q in p])
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))


def test_padded_codes() -> None:
    indices, offsets = torch.tensor([1, 2, 0]), torch.tensor([0, 0, 2])
    codes = Codes(torch.tensor([1.0, 2, 3]), indices, offsets, by_latent(indices, 3, offsets))
    values, padded = codes.padded()
    assert values.tolist() == [[0, 0], [1, 2], [3, 0]] and padded.tolist() == [[0, 0], [1, 2], [0, 0]]


@pytest.mark.parametrize("k", [1, 512])
def test_few_and_many(k: int) -> None:
    mine, theirs = problem(6, 12, 1500, 9), problem(6, 12, 1500, 9)
    ours(mine, k).square().sum().backward()
    dense(theirs, k).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


def test_operations_are_registered_as_they_behave() -> None:
    """torch's own check: schemas, no aliasing, shapes without data."""
    x, W_enc, b_enc, *_ = (q.detach() for q in problem(6, 5, 40, 3, torch.float32))
    codes = encode_topk(x, W_enc, b_enc, 3)
    latents, ops = codes.by_latent, torch.ops.skipcoder
    checks = ("test_schema", "test_faketensor")
    for select in (ops.topk, ops.groupmax):
        torch.library.opcheck(select.default, (x, W_enc, b_enc, 4, *Search()), test_utils=checks)
    torch.library.opcheck(ops.batchtopk.default, (x, W_enc, b_enc, 3, None, *Search()), test_utils=checks)
    torch.library.opcheck(ops.above.default, (x, W_enc, b_enc, b_enc, *Search()), test_utils=checks)
    torch.library.opcheck(ops.gather_sum.default, (codes.indices, codes.values, W_enc), test_utils=checks)
    torch.library.opcheck(ops.gather_dot.default, (x, W_enc, codes.indices), test_utils=checks)
    torch.library.opcheck(ops.sum_rows.default, (*latents, codes.values, x), test_utils=checks)


def test_sums_by_latent() -> None:
    indices = torch.tensor([[0, 2], [2, 1], [2, 0]], device=DEVICE)
    weights = torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=DEVICE)
    rows = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=DEVICE)
    latents = by_latent(indices, 4)
    assert latents.sum_rows(weights, rows).tolist() == [[7, 6], [0, 4], [7, 8], [0, 0]]
    assert latents.sum_weights(weights).tolist() == [7, 4, 10, 0]
    assert latents.counts(weights > 2).tolist() == [1, 1, 2, 0]
    assert gather_dot(rows, torch.eye(4, 2, device=DEVICE), indices).tolist() == [[1, 0], [0, 1], [0, 1]]
    biased = gather_dot(rows, torch.eye(4, 2, device=DEVICE), indices, None, torch.arange(4.0, device=DEVICE))
    assert biased.tolist() == [[1, 2], [2, 2], [2, 1]]


def test_flat_codes_of_tokens_with_none_and_many() -> None:
    indices, offsets = torch.tensor([1, 2, 0], device=DEVICE), torch.tensor([0, 0, 2], device=DEVICE)
    W = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=DEVICE)
    weights, bias = torch.tensor([1.0, 2, 3], device=DEVICE), torch.tensor([10.0, 20], device=DEVICE)
    assert gather_sum(indices, weights, W, offsets, bias).tolist() == [[10, 20], [12, 23], [13, 20]]
    assert gather_dot(W, W, indices, offsets).tolist() == [1, 1, 1]
    codes = Codes(weights, indices, offsets, by_latent(indices, 3, offsets))
    assert codes.by_latent.token_L.tolist() == [2, 1, 1]
