import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcoder.pipeline.store.stats import Moments, merge_all, pack, sums, unpack


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=4), seed=st.integers(0, 99))
def test_merged_parts_equal_the_whole(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(3000, 3)) * [1, 10, 0.1] + [0, 500, 0]).astype(np.float32)
    parts = np.split(z, sorted(cuts))
    merged = merge_all((Moments.of(torch.from_numpy(part), 1.5) for part in parts), Moments.empty(3))
    exact = z.astype(np.float64)
    assert merged.count == len(z)
    # Means add up rounding of a few hundred ulps of the mean, variances of its square.
    np.testing.assert_allclose(merged.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(merged.variance, exact.var(0), rtol=1e-9)
    np.testing.assert_array_equal(merged.absmax, np.abs(exact).max(0))
    np.testing.assert_allclose(merged.mean_norm, np.linalg.norm(exact, axis=1).mean(), rtol=1e-12)
    assert merged.error == 1.5 * sum(len(part) > 0 for part in parts)
    np.testing.assert_allclose(merged.mean_square, (exact**2).mean(), rtol=1e-10)


def test_packing_is_exact_and_always_the_same_bytes() -> None:
    rng = np.random.default_rng(0)
    moments = {
        f"h/{side}/other": Moments.of(torch.from_numpy(rng.normal(size=(100, d))), 0.25)
        for side, d in (("input", 5), ("output", 3))
    }
    again = unpack(pack(moments))
    assert again.keys() == moments.keys() and pack(again) == pack(dict(reversed(moments.items()))) == pack(moments)
    for name, one in moments.items():
        for field, value in vars(one).items():
            np.testing.assert_array_equal(getattr(again[name], field), value)


def test_nothing_is_lost_to_a_large_mean() -> None:
    """A channel ten thousand times its own deviation, and one that is constant."""
    z = (torch.randn(5000, 2, generator=torch.Generator().manual_seed(0)) * 0.5 + 8192).float()
    z[:, 1] = 77.0
    found = Moments.of(z)
    np.testing.assert_allclose(found.variance[0], z[:, 0].double().var(correction=0), rtol=1e-12)
    assert found.variance[1] == 0 and found.mean[1] == 77


def test_a_thread_more_changes_no_bit() -> None:
    z = torch.randn(3000, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    before, threads = sums(z), torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        assert torch.equal(sums(z), before)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_sums_the_same() -> None:
    z = torch.randn(5000, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(sums(z.cuda()).cpu(), sums(z), rtol=1e-12, atol=1e-9)
    assert torch.equal(sums(z.cuda()), sums(z.cuda()))
