"""The candidates of a top-k in Triton: one program per row, which reads the row twice, from the L2 cache if the chunk
of pre-activations fits there (2^24 bfloat16 elements are 32 MiB; an H100 has 50).

1. Columns g, g + GROUPS, g + 2 GROUPS, ... form a group; the maxima of all groups stay on chip. The c-th largest of
   them is a lower bound of the c-th largest element, and close to it where groups outnumber c.
2. All elements that reach the bound are written out, with room for half as many again as c. Only a row with more
   (many duplicates, or fewer groups than c) is searched for its exact c-th element.

Bounds are found by bisection over the ordered bits of the floats: a count per bit, no sorting and no data-dependent
memory. Legend: N rows, M columns, C candidates asked, P places.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST_GROUPS = 4096


@triton.jit
def ordered_bits(x):  # type: ignore[no-untyped-def]
    """An int32 that orders like the float; -0 equals 0."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load_keys(pre_ptr, row, column, inside, LOW_BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ordered bits of a tile of a row, without the LOW_BIT lowest, which bfloat16 does not have; elements outside
    the row count as the smallest."""
    return ordered_bits(tl.load(pre_ptr + row + column, mask=inside, other=float("-inf"))) >> LOW_BIT


@triton.jit
def candidates_kernel(  # type: ignore[no-untyped-def]
    pre_ptr, out_ptr, M, C, P, GROUPS: tl.constexpr, LOW_BIT: tl.constexpr
):
    """out[n]: columns of the C largest elements of row n, by rising column; the rest of its P places is unchanged."""
    row = tl.program_id(0).to(tl.int64) * M
    place = tl.program_id(0).to(tl.int64) * P
    group = tl.arange(0, GROUPS)
    top = tl.full((GROUPS,), -0x80000000, tl.int32)
    for start in range(0, M, GROUPS):
        top = tl.maximum(top, load_keys(pre_ptr, row, start + group, start + group < M, LOW_BIT))

    # The largest bound that C of the maxima reach, bit by bit from the sign down.
    bound = tl.sum(tl.where(top >= 0, 1, 0)).to(tl.int32)
    bound = tl.where(bound >= C, 0, -0x80000000 >> LOW_BIT)
    for i in range(31 - LOW_BIT):
        higher = bound + (1 << (30 - LOW_BIT - i))
        reached = tl.sum(tl.where(top >= higher, 1, 0))
        bound = tl.where(reached >= C, higher, bound)

    found = 0
    for start in range(0, M, GROUPS):
        keys = load_keys(pre_ptr, row, start + group, start + group < M, LOW_BIT)
        hit = (keys >= bound) & (start + group < M)
        at = found + tl.cumsum(hit.to(tl.int32)) - 1
        tl.store(out_ptr + place + at, (start + group).to(tl.int64), mask=hit & (at < P))
        found += tl.sum(hit.to(tl.int32))

    if found > P:  # find the C-th element itself, then take all larger ones and the first of its equals
        count = 0
        for start in range(0, M, GROUPS):
            inside = start + group < M
            count += tl.sum((inside & (load_keys(pre_ptr, row, start + group, inside, LOW_BIT) >= 0)).to(tl.int32))
        exact = tl.where(count >= C, 0, -0x80000000 >> LOW_BIT)
        for i in range(31 - LOW_BIT):
            higher = exact + (1 << (30 - LOW_BIT - i))
            count = 0
            for start in range(0, M, GROUPS):
                inside = start + group < M
                count += tl.sum(
                    (inside & (load_keys(pre_ptr, row, start + group, inside, LOW_BIT) >= higher)).to(tl.int32)
                )
            exact = tl.where(count >= C, higher, exact)
        larger = 0
        for start in range(0, M, GROUPS):
            inside = start + group < M
            larger += tl.sum((inside & (load_keys(pre_ptr, row, start + group, inside, LOW_BIT) > exact)).to(tl.int32))
        equal = 0
        found = 0
        for start in range(0, M, GROUPS):
            inside = start + group < M
            keys = load_keys(pre_ptr, row, start + group, inside, LOW_BIT)
            same = inside & (keys == exact)
            same = same & (equal + tl.cumsum(same.to(tl.int32)) <= C - larger)
            equal += tl.sum(same.to(tl.int32))
            hit = (inside & (keys > exact)) | same
            at = found + tl.cumsum(hit.to(tl.int32)) - 1
            tl.store(out_ptr + place + at, (start + group).to(tl.int64), mask=hit & (at < P))
            found += tl.sum(hit.to(tl.int32))
        for start in range(C, P, GROUPS):
            tl.store(out_ptr + place + start + group, -1, mask=start + group < P)


def candidates(pre_NM: Tensor, c: int, out: Tensor | None = None) -> Tensor:
    """int64 [N, P], P between c and 2 c: the columns of each row's c largest elements and of a few more; -1 where a
    row has fewer than P. If at most P elements reach the bound, they include all equals of the c-th, else only
    the first of these."""
    n, m = pre_NM.shape
    room = places(m, c)
    if out is None:
        out = torch.full((n, room), -1, dtype=torch.int64, device=pre_NM.device)
    if n:
        number = groups(m, c)
        candidates_kernel[(n,)](
            pre_NM, out, m, c, room, GROUPS=number, LOW_BIT=16 if pre_NM.dtype == torch.bfloat16 else 0,
            num_warps=num_warps(number),
        )  # fmt: skip
    return out


def places(m: int, c: int) -> int:
    """Maximum number of columns written per row."""
    return min(c + c // 2 + 8, m)


def groups(m: int, c: int) -> int:
    """Number of groups: many more than c, so that few elements besides the c largest reach the bound."""
    result: int = min(MOST_GROUPS, max(256, triton.next_power_of_2(8 * c)), triton.next_power_of_2(m))
    return result


def num_warps(groups: int, warp: int = 64 if torch.version.hip else 32) -> int:
    """Warps, at most 8, such that each thread loads 16 bytes of bfloat16 at a time and holds 8 maxima (or more)."""
    return max(1, min(8, groups // (8 * warp)))
