"""Top-k of wide rows in Triton. The matrix is read once, by the first of four kernels:

1. maxima: the largest element of each group of GROUP neighbouring columns;
2. the C groups with the largest maxima. They hold the C largest elements: an element of any other group is exceeded by
   C maxima (of equals, the lower column counts as the larger);
3. the C largest elements of these groups;
4. rank: sorts what the exact values say of them.

Steps 2 and 3 find the C-th largest by bisection over the ordered bits of the floats: one count per bit, no sorting,
and duplicates cost nothing. For [8192, 131072] bfloat16 with C = 40, step 1 reads 2,147 MB and writes 67, step 2 reads
these, step 3 reads 21. Legend: N rows, M columns, G groups, C candidates, K kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = 32
MOST = 2**15
"""Keys that one program looks through, if it can be helped: 32 a thread."""


@triton.jit
def ordered_bits(x):  # type: ignore[no-untyped-def]
    """An int32 that orders like the float; -0 equals 0."""
    bits = (x.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def first_largest(keys, C, LOW_BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which of the int32 keys are the C largest (of equals, the first), and the place of each of these in the order of
    the keys. Keys fit 32 - LOW_BIT bits."""
    bound = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= C, 0, -0x80000000 >> LOW_BIT)
    for i in range(31 - LOW_BIT):  # from the sign down: the largest bound that C keys reach
        higher = bound + (1 << (30 - LOW_BIT - i))
        bound = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= C, higher, bound)
    larger, same = keys > bound, keys == bound
    left = C - tl.sum(larger.to(tl.int32))
    if keys.numel <= 32768:  # one scan counts both; fewer than C are larger
        both = tl.cumsum((larger.to(tl.int32) << 16) + same.to(tl.int32))
        before_larger, before_same = both >> 16, both & 0xFFFF
    else:
        before_larger, before_same = tl.cumsum(larger.to(tl.int32)), tl.cumsum(same.to(tl.int32))
    chosen = larger | (same & (before_same <= left))
    return chosen, before_larger + tl.minimum(before_same, left) - 1


@triton.jit
def maxima_kernel(pre_ptr, out_ptr, M, G, GROUP: tl.constexpr, BLOCK: tl.constexpr, LOW_BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n, g] = ordered bits of the largest element of row n's group g, BLOCK groups a program."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(pre_ptr + row * M + column, mask=column < M, other=float("-inf"))
    keys = ordered_bits(tl.max(x.to(tl.float32), axis=1)) >> LOW_BIT
    tl.store(out_ptr + row * G + group, keys.to(out_ptr.dtype.element_ty), mask=group < G)


@triton.jit
def groups_kernel(key_ptr, out_ptr, G, C, PADDED: tl.constexpr, LOW_BIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n]: the C groups with the largest maxima, by rising number."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED)
    keys = tl.load(key_ptr + row * G + group, mask=group < G, other=-0x80000000 >> LOW_BIT).to(tl.int32)
    chosen, at = first_largest(keys, C, LOW_BIT)
    tl.store(out_ptr + row * C + at, group, mask=chosen)


@triton.jit
def elements_kernel(  # type: ignore[no-untyped-def]
    pre_ptr, group_ptr, out_ptr, M, CHOSEN, C, GROUP: tl.constexpr, PADDED: tl.constexpr, LOW_BIT: tl.constexpr
):
    """out[n]: columns of the C largest elements of the CHOSEN groups, by rising column."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, PADDED)
    group = tl.load(group_ptr + row * CHOSEN + slot, mask=slot < CHOSEN, other=M)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = tl.load(pre_ptr + row * M + column, mask=column < M, other=0.0)
    keys = tl.where(column < M, ordered_bits(x) >> LOW_BIT, -0x80000000 >> LOW_BIT)
    chosen, at = first_largest(tl.reshape(keys, [PADDED * GROUP]), C, LOW_BIT)
    tl.store(out_ptr + row * C + at, tl.reshape(column, [PADDED * GROUP]).to(tl.int64), mask=chosen)


@triton.jit
def rank_kernel(  # type: ignore[no-untyped-def]
    value_ptr, column_ptr, values_out_ptr, columns_out_ptr, C, K, PADDED: tl.constexpr
):
    """The K largest of row n's C values, descending, of equals the earlier, and their columns."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, PADDED)
    keys = ordered_bits(tl.load(value_ptr + row * C + slot, mask=slot < C, other=0.0)).to(tl.int64)
    packed = tl.where(slot < C, (keys << 32) | (PADDED - 1 - slot), -0x8000000000000000)
    slot_of = PADDED - 1 - (tl.sort(packed, descending=True) & 0x7FFFFFFF)
    kept = slot < K
    tl.store(values_out_ptr + row * K + slot, tl.load(value_ptr + row * C + slot_of, mask=kept), mask=kept)
    tl.store(columns_out_ptr + row * K + slot, tl.load(column_ptr + row * C + slot_of, mask=kept), mask=kept)


@triton.jit
def two_kernel(pre_ptr, out_ptr, M, K, SIZE, PADDED: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n, j]: columns, rising, of the two largest of row n's run j of SIZE columns."""
    row, run = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.arange(0, PADDED)
    x = tl.load(pre_ptr + row * M + run * SIZE + slot, mask=slot < SIZE, other=0.0)
    least = tl.full((PADDED,), -0x8000000000000000, tl.int64)
    keys = tl.where(slot < SIZE, (ordered_bits(x).to(tl.int64) << 32) | (0x7FFFFFFF - slot), least)
    first = tl.max(keys)
    second = tl.max(tl.where(keys == first, least, keys))
    a, b = 0x7FFFFFFF - (first & 0x7FFFFFFF), 0x7FFFFFFF - (second & 0x7FFFFFFF)
    at = (row * K + run) * 2
    tl.store(out_ptr + at, run * SIZE + tl.minimum(a, b))
    tl.store(out_ptr + at + 1, run * SIZE + tl.maximum(a, b))


def candidates(pre_NM: Tensor, c: int) -> Tensor:
    """int64 [N, C]: the columns of each row's c largest elements (of equals, the lowest columns), rising."""
    n, m = pre_NM.shape
    columns = torch.empty(n, c, dtype=torch.int64, device=pre_NM.device)
    if not n:
        return columns
    group = GROUP if m > 2**15 else GROUP // 2
    while group > 1 and triton.next_power_of_2(c) * group > MOST and triton.cdiv(m, group // 2) <= MOST:
        group //= 2
    keys, low_bit = maxima(pre_NM, group), low_bit_of(pre_NM)
    g = keys.shape[1]
    chosen = min(c, g)
    groups = torch.empty(n, chosen, dtype=torch.int32, device=pre_NM.device)
    padded = triton.next_power_of_2(g)
    groups_kernel[(n,)](keys, groups, g, chosen, PADDED=padded, LOW_BIT=low_bit, num_warps=num_warps(padded))
    padded = triton.next_power_of_2(chosen)
    elements_kernel[(n,)](
        pre_NM, groups, columns, m, chosen, c, GROUP=group, PADDED=padded, LOW_BIT=low_bit,
        num_warps=num_warps(padded * group),
    )  # fmt: skip
    return columns


def two_of_groups(pre_NM: Tensor, k: int) -> Tensor:
    """int64 [N, 2 K]: the columns of the two largest in each of k equal runs; of equals the lowest."""
    n, m = pre_NM.shape
    columns = torch.empty(n, 2 * k, dtype=torch.int64, device=pre_NM.device)
    padded = triton.next_power_of_2(m // k)
    if n:
        two_kernel[(n, k)](pre_NM, columns, m, k, m // k, PADDED=padded, num_warps=num_warps(padded))
    return columns


def maxima(pre_NM: Tensor, group: int = GROUP) -> Tensor:
    """[N, G]: the ordered bits, as int16 of bfloat16, of the largest element of each group."""
    n, m = pre_NM.shape
    g, low_bit = triton.cdiv(m, group), low_bit_of(pre_NM)
    keys = torch.empty(n, g, dtype=torch.int16 if low_bit else torch.int32, device=pre_NM.device)
    block = min(128, triton.next_power_of_2(g))
    maxima_kernel[(n, triton.cdiv(g, block))](pre_NM, keys, m, g, GROUP=group, BLOCK=block, LOW_BIT=low_bit)
    return keys


def low_bit_of(pre_NM: Tensor) -> int:
    """The lowest bit of a float32 that the dtype has."""
    return 16 if pre_NM.dtype == torch.bfloat16 else 0


def rank(values_NC: Tensor, columns_NC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values [N, K] of each row, descending, and their columns; of equals the earlier first."""
    n, c = values_NC.shape
    values, columns = values_NC.new_empty(n, k), columns_NC.new_empty(n, k)
    if n:
        padded = triton.next_power_of_2(c)
        rank_kernel[(n,)](
            values_NC.contiguous(), columns_NC.contiguous(), values, columns, c, k, PADDED=padded,
            num_warps=num_warps(4 * padded),
        )  # fmt: skip
    return values, columns


def num_warps(elements: int, warp: int = 64 if torch.version.hip else 32) -> int:
    """Warps, at most 1024 threads, such that each thread holds 32 elements, or more if it must (on AMD, where that
    spills, 8)."""
    return max(1, min(1024 // warp, elements // ((32 if warp == 32 else 8) * warp)))
