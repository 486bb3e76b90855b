import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcoder.kernels.candidates import GROUP, candidates, topk_lowest


def stable(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition: a stable descending sort."""
    values, columns = pre.sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns[:, :k]


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(1, 90), st.data(), st.sampled_from([0, 1, 3, 1000]), st.integers(0, 999))
def test_equals_a_stable_sort(n: int, m: int, data: st.DataObject, levels: int, seed: int) -> None:
    """From all equal (levels 0) over heavy ties to nearly none."""
    k = data.draw(st.integers(1, m))
    pre = torch.randint(-levels, levels + 1, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    for mine, theirs in zip(topk_lowest(pre, k), stable(pre, k), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 10**6])
@pytest.mark.parametrize("size", [GROUP, GROUP // 2, GROUP // 4])
def test_groups(dtype: torch.dtype, levels: int, size: int) -> None:
    """Just wide enough for group maxima of each size."""
    k = 3
    m = 4 * size * (k + 8)
    pre = torch.randint(-levels, levels, (5, m), generator=torch.Generator().manual_seed(1)).to(dtype)
    for mine, theirs in zip(topk_lowest(pre, k), stable(pre, k), strict=True):
        assert torch.equal(mine, theirs)
    found = pre.gather(1, candidates(pre, k)).sort(dim=1, descending=True).values
    assert torch.equal(found, stable(pre, k)[0])
