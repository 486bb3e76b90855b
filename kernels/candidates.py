"""Top-k of large matrices of pre-activations in two steps: find candidates cheaply, then rank them exactly.

Legend: N rows, M columns, C candidates, K kept.
"""

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton

GROUP = 32


def candidates(pre_NM: Tensor, c: int) -> Tensor:
    """int64 [N, C]: columns of the c largest elements of each row. On a GPU of equals the lowest columns, rising; on a
    CPU unordered, and ties are broken arbitrarily, but always in the same way.

    Columns m, m + M/32, m + 2 M/32, ... form a group. The c largest elements lie in the c groups with the largest
    maxima: an element of any other group is exceeded by c maxima. The matrix is thus read once and only c groups are
    searched. Strided groups let vector instructions take the maxima: 10 ms, against 24 with neighbouring columns, at
    4096 x 18432 bfloat16 on 2 CPU cores.
    """
    n, m = pre_NM.shape
    if in_triton(pre_NM):
        from skipcoder.kernels.gpu import candidates as gpu

        return gpu.candidates(pre_NM, c)
    # The largest groups that leave at least four of them per candidate.
    group = next((g for g in (GROUP, GROUP // 2, GROUP // 4) if m % g == 0 and m // g >= 4 * c), None)
    if group is None:
        return torch.topk(pre_NM, c, dim=1, sorted=False).indices
    groups = m // group
    grouped = pre_NM.view(n, group, groups)
    chosen_NC = torch.topk(grouped.amax(1), c, dim=1, sorted=False).indices
    inside = grouped.gather(2, chosen_NC[:, None].expand(-1, group, -1)).flatten(1)
    best_NC = torch.topk(inside, c, dim=1, sorted=False).indices
    return best_NC // c * groups + chosen_NC.gather(1, best_NC % c)


def rank(values_NC: Tensor, columns_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of the candidates: values [N, K] descending, columns [N, K]; equal values by rising column."""
    if in_triton(values_NC):
        from skipcoder.kernels.gpu import candidates as gpu

        return gpu.rank(values_NC, columns_NC, k)
    columns, order = columns_NC.sort(dim=1)
    values, best = values_NC.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], columns.gather(1, best[:, :k])


def topk_lowest(pre_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exact top-k: values [N, K] descending, columns [N, K], equal values by rising column.

    On a CPU a few more candidates than k settle ties; a row in which even the last of them equals the k-th value (many
    duplicates) is fully sorted.
    """
    m = pre_NM.shape[1]
    if in_triton(pre_NM):
        columns_NK = candidates(pre_NM, k)
        return rank(pre_NM.gather(1, columns_NK), columns_NK, k)
    columns_NC = candidates(pre_NM, min(k + 8, m))
    values_NC = pre_NM.gather(1, columns_NC)
    values, columns = rank(values_NC, columns_NC, k)
    if columns_NC.shape[1] < m:
        undecided = (values_NC.amin(1) == values[:, -1]).nonzero()[:, 0]
        if len(undecided):
            rows = pre_NM[undecided].sort(dim=1, descending=True, stable=True)
            values[undecided], columns[undecided] = rows.values[:, :k], rows.indices[:, :k]
    return values, columns


def two_of_groups(pre_NM: Tensor, k: int) -> Tensor:
    """Columns [N, 2 K] of the two largest in each of k equal runs of columns ([N, K] if runs have one), rising within
    each run. On a GPU of equals the lowest columns."""
    size = pre_NM.shape[1] // k
    if in_triton(pre_NM) and size > 1:
        from skipcoder.kernels.gpu import candidates as gpu

        return gpu.two_of_groups(pre_NM, k)
    two = torch.topk(pre_NM.view(len(pre_NM), k, size), min(2, size), dim=2).indices.sort(dim=2).values
    return (two + torch.arange(k, device=pre_NM.device)[:, None] * size).flatten(1)


def reaching(pre_NM: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """(row, column) of every element >= bound, by rising row, then column."""
    n, m = pre_NM.shape
    groups = m // GROUP
    if m % GROUP:
        row, column = (pre_NM >= bound).nonzero(as_tuple=True)
        return row, column
    row, group = (pre_NM.view(n, GROUP, groups).amax(1) >= bound).nonzero(as_tuple=True)
    columns = group[:, None] + groups * torch.arange(GROUP, device=pre_NM.device)
    hit = pre_NM[row[:, None], columns] >= bound
    flat = ((row * m)[:, None] + columns)[hit].sort().values
    return flat // m, flat % m


def largest(values: Tensor, count: int) -> Tensor:
    """Positions (rising) of the `count` largest of a flat tensor; equal values by rising position."""
    if len(values) <= count:
        return torch.arange(len(values), device=values.device)
    if in_triton(values):
        from skipcoder.kernels.gpu import batch as gpu

        return gpu.largest(values, count)
    return values.sort(descending=True, stable=True).indices[:count].sort().values
