import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcoder.pipeline.store.stats import Moments, merge_all, pack, unpack


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 3000), max_size=4), seed=st.integers(0, 99))
def test_merged_parts_equal_the_whole(cuts: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    z = (rng.normal(size=(3000, 3)) * [1, 10, 0.1] + [0, 500, 0]).astype(np.float32)
    parts = np.split(z, sorted(cuts))
    merged = merge_all((Moments.of(part, 1.5) for part in parts), Moments.empty(3))
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
        f"h/{side}/other": Moments.of(rng.normal(size=(100, d)).astype(np.float32), 0.25)
        for side, d in (("input", 5), ("output", 3))
    }
    again = unpack(pack(moments))
    assert again.keys() == moments.keys() and pack(again) == pack(dict(reversed(moments.items()))) == pack(moments)
    for name, one in moments.items():
        for field, value in vars(one).items():
            np.testing.assert_array_equal(getattr(again[name], field), value)
