"""The C largest elements of a whole batch in Triton, without waiting for the device.

As in gpu/candidates.py: first the C groups of neighbouring columns with the largest maxima, then the C largest of their
elements; of equals the first in reading order. In an array too long for one program the C-th largest is found four bits
at a time: every program counts how many of its keys reach each of fifteen bounds. For [8192, 131072] bfloat16 and
C = 327,680 the matrix is read once (2,147 MB), the 33.6 million maxima six times (67 MB each).

Legend: N rows, M columns, G groups of a row, L keys, C chosen, B blocks of keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.gpu.candidates import GROUP, low_bit_of, maxima, ordered_bits

BLOCK = 4096
PROGRAMS = 1024
"""At most so many programs count, so that few add to the same counts at a time."""
STEP_BITS = 4
"""Bits of the C-th largest key that one pass finds."""


@triton.jit
def bound_after(step, count_ptr, bound_ptr, C, SHIFT: tl.constexpr, BOUNDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bound once a pass has counted how many keys reach those above it."""
    reached = tl.load(count_ptr + step * BOUNDS + tl.arange(0, BOUNDS)) >= C
    return tl.load(bound_ptr + step) + (tl.sum(reached.to(tl.int64)) << SHIFT)


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    key_ptr, count_ptr, bound_ptr, step, C, L, BLOCKS,
    FIRST: tl.constexpr, SHIFT: tl.constexpr, STEP_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """count[step, j] = how many keys reach bound[step] + (j + 1) 2^SHIFT; bound[step] comes from the step before."""
    BOUNDS: tl.constexpr = 1 << STEP_BITS
    bound = tl.load(bound_ptr)
    if not FIRST:
        bound = bound_after(step - 1, count_ptr, bound_ptr, C, SHIFT + STEP_BITS, BOUNDS)
        tl.store(bound_ptr + step, bound, mask=tl.program_id(0) == 0)
    for block in range(tl.program_id(0), BLOCKS, tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = place < L
        keys = tl.load(key_ptr + place, mask=inside, other=0).to(tl.int64)
        higher = bound
        for j in range(BOUNDS - 1):
            higher += 1 << SHIFT
            tl.atomic_add(count_ptr + step * BOUNDS + j, tl.sum((inside & (keys >= higher)).to(tl.int32)))


@triton.jit
def tally_kernel(  # type: ignore[no-untyped-def]
    key_ptr, count_ptr, bound_ptr, tally_ptr, step, C, L, BOUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """tally[0, block], tally[1, block] = how many keys of a block exceed and equal the C-th largest, bound[step]."""
    bound = bound_after(step - 1, count_ptr, bound_ptr, C, 0, BOUNDS)
    tl.store(bound_ptr + step, bound, mask=tl.program_id(0) == 0)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < L
    keys = tl.load(key_ptr + place, mask=inside, other=0).to(tl.int64)
    tl.store(tally_ptr + tl.program_id(0), tl.sum((inside & (keys > bound)).to(tl.int32)))
    same = tl.sum((inside & (keys == bound)).to(tl.int32))
    tl.store(tally_ptr + tl.num_programs(0) + tl.program_id(0), same)


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    key_ptr, bound_ptr, tally_ptr, upto_ptr, out_ptr, C, L, BLOCK: tl.constexpr
):
    """Write the places of all keys above the bound, and of the first that equal it, C in all, in rising order. upto:
    the tallies added up."""
    pid, blocks = tl.program_id(0), tl.num_programs(0)
    place = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < L
    keys = tl.load(key_ptr + place, mask=inside, other=0).to(tl.int64)
    bound, left = tl.load(bound_ptr), C - tl.load(upto_ptr + blocks - 1)
    larger, same = inside & (keys > bound), inside & (keys == bound)
    before_larger = tl.load(upto_ptr + pid) - tl.load(tally_ptr + pid) + tl.cumsum(larger.to(tl.int32))
    before_same = tl.load(upto_ptr + blocks + pid) - tl.load(tally_ptr + blocks + pid) + tl.cumsum(same.to(tl.int32))
    chosen = larger | (same & (before_same <= left))
    tl.store(out_ptr + before_larger + tl.minimum(before_same, left) - 1, place, mask=chosen)


@triton.jit
def keys_kernel(  # type: ignore[no-untyped-def]
    pre_ptr, group_ptr, out_ptr, M, G, C, GROUP: tl.constexpr, BLOCK: tl.constexpr, LOW_BIT: tl.constexpr
):
    """Ordered bits of the elements of the chosen groups; the smallest there is where a row's last group ends early."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    group = tl.load(group_ptr + slot, mask=slot < C, other=0)
    column = (group % G * GROUP)[:, None] + tl.arange(0, GROUP)[None, :]
    inside = (slot < C)[:, None] & (column < M)
    x = tl.load(pre_ptr + (group // G * M)[:, None] + column, mask=inside, other=0.0)
    keys = tl.where(inside, ordered_bits(x) >> LOW_BIT, -0x80000000 >> LOW_BIT)
    member = slot[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(out_ptr + member, keys.to(out_ptr.dtype.element_ty), mask=(slot < C)[:, None])


def first_largest(keys_L: Tensor, c: int) -> Tensor:
    """int64 [C]: the places, rising, of the c largest keys; of equals the first."""
    (length,), device = keys_L.shape, keys_L.device
    bits = 8 * keys_L.element_size()
    blocks, bounds, steps = triton.cdiv(length, BLOCK), 2**STEP_BITS, bits // STEP_BITS
    counts = torch.zeros(steps, bounds, dtype=torch.int32, device=device)
    bound = torch.full((steps + 1,), -(2 ** (bits - 1)), dtype=torch.int64, device=device)
    for i in range(steps):
        count_kernel[(min(blocks, PROGRAMS),)](
            keys_L, counts, bound, i, c, length, blocks, FIRST=i == 0, SHIFT=bits - STEP_BITS * (i + 1),
            STEP_BITS=STEP_BITS, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    tally = torch.empty(2, blocks, dtype=torch.int32, device=device)
    tally_kernel[(blocks,)](keys_L, counts, bound, tally, steps, c, length, BOUNDS=bounds, BLOCK=BLOCK, num_warps=8)
    out = torch.empty(c, dtype=torch.int64, device=device)
    upto = tally.cumsum(1)
    place_kernel[(blocks,)](keys_L, bound[steps:], tally, upto, out, c, length, BLOCK=BLOCK, num_warps=8)
    return out


def largest(values_L: Tensor, c: int) -> Tensor:
    """int64 [C]: the places, rising, of the c largest of a flat tensor; of equals the first."""
    if values_L.dtype == torch.bfloat16:
        bits = (values_L + 0.0).view(torch.int16)
        return first_largest(bits ^ ((bits >> 15) & 0x7FFF), c)
    bits = (values_L.float() + 0.0).view(torch.int32)
    return first_largest(bits ^ ((bits >> 31) & 0x7FFFFFFF), c)


def largest_of_batch(pre_NM: Tensor, c: int) -> Tensor:
    """int64 [C]: the flat positions, rising, of the c largest elements (or of all, if there are fewer)."""
    n, m = pre_NM.shape
    keys_NG = maxima(pre_NM)
    g = keys_NG.shape[1]
    groups = first_largest(keys_NG.view(-1), min(c, n * g))
    keys = torch.empty(len(groups) * GROUP, dtype=keys_NG.dtype, device=pre_NM.device)
    block = 64
    keys_kernel[(triton.cdiv(len(groups), block),)](
        pre_NM, groups, keys, m, g, len(groups), GROUP=GROUP, BLOCK=block,
        LOW_BIT=low_bit_of(pre_NM),
    )  # fmt: skip
    members = first_largest(keys, min(c, n * m))
    group = groups[members // GROUP]
    return group // g * m + group % g * GROUP + members % GROUP
