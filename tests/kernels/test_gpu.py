"""The Triton kernels in Triton's interpreter (or on a GPU), against float64.

Tolerance: float32 accumulation of n terms of size t errs by at most n * 2^-24 * sum|t|; bfloat16 inputs are exact in
float32. A bfloat16 result is rounded to 2^-8 of its own size on a GPU; the interpreter cuts it off, which loses
twice that.
"""

import os

import pytest
import torch
from torch import Tensor

from skipcoder.kernels import backend
from skipcoder.kernels.preactivations import Search, _in_8_bits
from skipcoder.kernels.rows import token_of_entry
from skipcoder.kernels.select import above

pytestmark = pytest.mark.slow

gpu = pytest.importorskip("skipcoder.kernels.gpu.rows")
gpu_candidates = pytest.importorskip("skipcoder.kernels.gpu.candidates")
gpu_batch = pytest.importorskip("skipcoder.kernels.gpu.batch")
gpu_select = pytest.importorskip("skipcoder.kernels.gpu.candidates")
DEVICE = os.environ.get("SKIPCODER_TEST_DEVICE", "cpu")
SHAPES = [(5, 3, 7, 20), (1, 1, 1, 1), (4, 8, 576, 30), (9, 5, 600, 9), (3, 20, 33, 20)]  # n, k, d, m


def problem(n: int, k: int, d: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices without repeats in a row, weights, rows of tokens, rows of latents."""
    g = torch.Generator().manual_seed(n * k + d)
    indices = torch.stack([torch.randperm(m, generator=g)[:k] for _ in range(n)])
    weights, rows, W = (torch.randn(s, generator=g) for s in ((n, k), (n, d), (m, d)))
    return indices.to(DEVICE), weights.to(DEVICE), rows.to(DEVICE, dtype), W.to(DEVICE, dtype)


def assert_close(got: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    rounding = 2.0**-7 if got.dtype == torch.bfloat16 else 2.0**-23
    bound = terms * 2.0**-23 * magnitude + rounding * exact.abs() + 1e-12
    assert ((got.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d", "m"), SHAPES)
def test_gather_sum(n: int, k: int, d: int, m: int, dtype: torch.dtype) -> None:
    indices, weights, _, W = problem(n, k, d, m, dtype)
    terms = weights.double()[:, :, None] * W.double()[indices]
    assert_close(gpu.gather_sum(indices, weights, W), terms.sum(1), terms.abs().sum(1), k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n", "k", "d", "m"), SHAPES)
def test_gather_dot(n: int, k: int, d: int, m: int, dtype: torch.dtype) -> None:
    """By token and as flat entries: the same bits."""
    indices, bias, rows, W = problem(n, k, d, m, dtype)
    bias = bias.new_zeros(m) + torch.arange(m, device=DEVICE) / m
    terms = torch.cat([rows.double()[:, None] * W.double()[indices], bias.double()[indices][:, :, None]], 2)
    got = gpu.gather_dot(rows, W, indices, None, bias)
    assert_close(got, terms.sum(2), terms.abs().sum(2), d + 1)
    assert torch.equal(gpu.gather_dot(rows, W, indices.flatten(), token_of_entry(indices), bias), got.flatten())
    assert_close(gpu.gather_dot(rows, W, indices), terms[:, :, :d].sum(2), terms.abs().sum(2), d)


def test_empty_batch() -> None:
    none = torch.empty(0, 3, dtype=torch.long, device=DEVICE)
    W = torch.ones(5, 8, device=DEVICE)
    assert gpu.gather_sum(none, none.float(), W).shape == (0, 8)
    assert gpu.gather_dot(W[:0], W, none).shape == (0, 3)


def test_flat_entries_on_top_of_a_base() -> None:
    indices, offsets = torch.tensor([1, 2, 0], device=DEVICE), torch.tensor([0, 0, 2], device=DEVICE)
    W = torch.tensor([[1.0, 0], [0, 1], [1, 1]], device=DEVICE)
    weights = torch.tensor([1.0, 2, 3], device=DEVICE)
    bias, base = torch.tensor([10.0, 20], device=DEVICE), torch.tensor([[1.0, 2], [3, 4], [5, 6]], device=DEVICE)
    assert gpu.gather_sum(indices, weights, W, offsets, bias).tolist() == [[10, 20], [12, 23], [13, 20]]
    assert gpu.gather_sum(indices, weights, W, offsets, base).tolist() == [[1, 2], [5, 7], [8, 6]]
    assert gpu.gather_dot(W, W, indices, token_of_entry(indices, offsets)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "c", "levels"),
    [
        (3, 50, 5, 0),
        (4, 256, 4, 0),
        (2, 700, 40, 10**6),
        (2, 2000, 300, 3),
        (2, 300, 300, 5),
        (1, 1, 1, 1),
        (2, 1500, 200, 10**6),
    ],
)
def test_candidates_and_their_ranks(n: int, m: int, c: int, levels: int, dtype: torch.dtype) -> None:
    """The c first of a stable sort, even where all values are equal (levels 0); nothing is written outside the rows."""
    g = torch.Generator().manual_seed(m + c)
    pre = (torch.randint(-levels, levels + 1, (n, m), generator=g) / max(levels, 1)).to(DEVICE, dtype)
    pre[0, 0] = -0.0
    if levels == 0:  # many duplicates of negative numbers
        pre[1], pre[2] = -1.0, -torch.inf
    wanted = pre.sort(dim=1, descending=True, stable=True)
    columns = gpu_select.candidates(pre, c)
    assert torch.equal(columns, wanted.indices[:, :c].sort(1).values)
    for k in {1, c // 2 + 1, c}:
        values, ranked = gpu_select.rank(pre.gather(1, columns), columns, k)
        assert torch.equal(ranked, wanted.indices[:, :k]) and torch.equal(values, wanted.values[:, :k])
    assert gpu_select.candidates(pre[:0], c).shape == (0, c)


@pytest.mark.parametrize("centred", [False, True])
def test_rows_in_8_bits(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch makes them; but the interpreter loses the carry of a number that is rounded up to a power of two."""
    g = torch.Generator().manual_seed(0)
    rows, bias, centre = (torch.randn(size, generator=g).to(DEVICE) for size in ((30, 44), (30,), (44,)))
    for b in (None, bias):
        made = []
        for on_gpu in (False, True):
            monkeypatch.setattr(backend, "ON_CPU", on_gpu)
            made.append(_in_8_bits(rows, 32, 48, torch.float8_e4m3fn, centre if centred else None, b))
        (q, scale, bias_q), (q_gpu, scale_gpu, bias_gpu) = made
        assert torch.equal(scale, scale_gpu)
        torch.testing.assert_close(bias_gpu.float(), bias_q.float(), rtol=2**-7, atol=1e-6)
        rounded_up = torch.frexp(q.float()).mantissa.abs() == 0.5
        assert torch.equal(q.float()[~rounded_up], q_gpu.float()[~rounded_up]) and not q_gpu.float()[30:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "m", "c", "levels"), [(3, 50, 7, 2), (4, 256, 200, 0), (5, 700, 40, 10**6), (2, 30, 60, 3)]
)
def test_largest_of_a_batch(
    n: int, m: int, c: int, levels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The c first of a stable sort of everything, even where all values are equal."""
    monkeypatch.setattr(gpu_batch, "BLOCK", 64)
    monkeypatch.setattr(gpu_batch, "PROGRAMS", 3)
    g = torch.Generator().manual_seed(m + c)
    pre = (torch.randint(-levels, levels + 1, (n, m), generator=g) / max(levels, 1)).to(DEVICE, dtype)
    wanted = pre.flatten().sort(descending=True, stable=True).indices[:c].sort().values
    assert torch.equal(gpu_batch.largest_of_batch(pre, c), wanted)


def test_largest_of_floats() -> None:
    g = torch.Generator().manual_seed(0)
    for values in (torch.randn(300, generator=g), torch.zeros(300), torch.randint(-2, 2, (300,), generator=g) / 4):
        for dtype in (torch.float32, torch.bfloat16):
            wanted = values.to(dtype).sort(descending=True, stable=True).indices[:70].sort().values
            assert torch.equal(gpu_batch.largest(values.to(DEVICE, dtype), 70).cpu(), wanted)


@pytest.mark.parametrize(("m", "k"), [(6, 3), (40, 8), (96, 3), (7, 1)])
def test_two_largest_of_runs(m: int, k: int) -> None:
    """Of equals the lowest columns."""
    g = torch.Generator().manual_seed(m)
    for levels in (0, 2, 1000):
        pre = torch.randint(-levels, levels + 1, (5, m), generator=g).to(DEVICE, torch.bfloat16)
        two = pre.view(5, k, -1).sort(dim=2, descending=True, stable=True).indices[:, :, :2].sort(dim=2).values
        wanted = two + torch.arange(k, device=DEVICE)[:, None] * (m // k)
        assert torch.equal(gpu_candidates.two_of_groups(pre, k), wanted.flatten(1))


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "fp8"])
def test_what_exceeds_thresholds_is_found_by_estimates(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(size, generator=g).to(DEVICE) for size in ((40, 64), (200, 64), (200,)))
    threshold = 8 * torch.rand(200, generator=g).to(DEVICE) + 10
    exact = above(x.double(), W.double(), b.double(), threshold.double())
    monkeypatch.setattr(backend, "ON_CPU", True)
    found = above(x, W, b, threshold, Search(mode, chunk_bytes=200 * 4 * 7))
    assert found.offsets is not None and exact.offsets is not None
    assert torch.equal(found.indices, exact.indices) and torch.equal(found.offsets, exact.offsets)
    torch.testing.assert_close(found.values.double(), exact.values, rtol=1e-5, atol=1e-5)
