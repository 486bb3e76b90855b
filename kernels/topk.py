"""Exact top-k of a matrix of pre-activations, ties to the lowest index, reading the whole matrix once.

The k largest elements of a row lie in the k blocks with the largest maxima (any other block's elements are beaten
by k maxima), so only k blocks of 64 are searched. Ties are settled by searching integer keys that hold the
value's bits above the inverted column, in both stages; the argument above then holds for ties too.

Legend: N rows, M columns, K kept, B blocks, C candidates.
"""

import torch
from torch import Tensor

BLOCK = 64


def topk_lowest(pre_NM: Tensor, k: int) -> Tensor:
    """int64 [N, K]: columns of the k largest elements of each row, descending, equal ones by rising column.

    NaN counts as larger than any number, as in torch.topk; -0.0 counts as 0.0.
    """
    n, m = pre_NM.shape
    blocks = -(-m // BLOCK)
    if blocks <= k or not n:
        return _search(_keys(pre_NM, torch.arange(m, device=pre_NM.device)), k)
    whole = m // BLOCK * BLOCK
    maxima_NB = pre_NM[:, :whole].view(n, -1, BLOCK).amax(2)
    if whole < m:
        maxima_NB = torch.cat([maxima_NB, pre_NM[:, whole:].amax(1, keepdim=True)], 1)
    chosen_NK = _search(_keys(maxima_NB, torch.arange(blocks, device=pre_NM.device)), k)
    columns_NC = (chosen_NK[:, :, None] * BLOCK + torch.arange(BLOCK, device=pre_NM.device)).flatten(1)
    beyond = columns_NC >= m
    columns_NC = columns_NC.clamp_max(m - 1)
    keys_NC = _keys(pre_NM.gather(1, columns_NC), columns_NC)
    if whole < m:
        keys_NC = keys_NC.masked_fill(beyond, torch.iinfo(keys_NC.dtype).min)
    return _search(keys_NC, k)


def topk_lowest_reference(pre_NM: Tensor, k: int) -> Tensor:
    """The definition: a stable descending sort; for tests."""
    return torch.sort(pre_NM, dim=1, descending=True, stable=True).indices[:, :k]


def _keys(values: Tensor, columns: Tensor) -> Tensor:
    """int64 keys in the order (value, then lowest column)."""
    if values.dtype == torch.float64:
        raise TypeError("float64 has no room for the column beside its bits")
    bits = (values.float() + 0.0).view(torch.int32).long()  # + 0.0: -0.0 becomes 0.0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return (ordered << 32) | (0x7FFFFFFF - columns)


def _search(keys: Tensor, k: int) -> Tensor:
    return 0x7FFFFFFF - (torch.topk(keys, k, dim=1).values & 0x7FFFFFFF)
