"""The C largest elements of a whole batch in Triton, without waiting for the device.

As in gpu/candidates.py: first the C groups of neighbouring columns with the largest maxima, then the C largest of their
elements; of equals the first in reading order. In an array too long for one program the C-th largest is found four bits
at a time: every program counts how many of its keys reach each of fifteen bounds. For [8192, 131072] bfloat16 and
C = 327,680 the matrix is read once (2,147 MB), the 33.6 million maxima seven times (67 MB each).

Legend: N rows, M columns, G groups of a row, L keys, C chosen, B blocks of keys.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.gpu.candidates import GROUP, low_bit_of, maxima, ordered_bits

BLOCK = 4096
STEP_BITS = 4
"""Bits of the C-th largest key that one pass finds."""


@triton.jit
def count_kernel(  # type: ignore[no-untyped-def]
    key_ptr, bound_ptr, count_ptr, L, SHIFT: tl.constexpr, BOUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """count[block, j] = how many keys of the block reach bound + (j + 1) 2^SHIFT."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < L
    keys = tl.load(key_ptr + place, mask=inside, other=0).to(tl.int64)
    bound = tl.load(bound_ptr)
    for j in range(BOUNDS):
        bound += 1 << SHIFT
        reached = tl.sum((inside & (keys >= bound)).to(tl.int32))
        tl.store(count_ptr + tl.program_id(0) * BOUNDS + j, reached)


@triton.jit
def place_kernel(  # type: ignore[no-untyped-def]
    key_ptr, bound_ptr, larger_ptr, same_ptr, left_ptr, out_ptr, L, BLOCK: tl.constexpr
):
    """Write the places of all keys above the bound, and of the first `left` that equal it, in rising order."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < L
    keys = tl.load(key_ptr + place, mask=inside, other=0).to(tl.int64)
    bound, left = tl.load(bound_ptr), tl.load(left_ptr)
    larger, same = inside & (keys > bound), inside & (keys == bound)
    before_larger = tl.load(larger_ptr + tl.program_id(0)) + tl.cumsum(larger.to(tl.int32))
    before_same = tl.load(same_ptr + tl.program_id(0)) + tl.cumsum(same.to(tl.int32))
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
    blocks, bounds = triton.cdiv(length, BLOCK), 2**STEP_BITS - 1
    bound = torch.full((), -(2 ** (bits - 1)), dtype=torch.int64, device=device)
    for shift in range(bits - STEP_BITS, -1, -STEP_BITS):
        counts = torch.empty(blocks, bounds, dtype=torch.int32, device=device)
        count_kernel[(blocks,)](keys_L, bound, counts, length, SHIFT=shift, BOUNDS=bounds, BLOCK=BLOCK, num_warps=8)
        bound = bound + ((counts.sum(0) >= c).sum() << shift)
    counts = torch.empty(blocks, 1, dtype=torch.int32, device=device)
    count_kernel[(blocks,)](keys_L, bound, counts, length, SHIFT=0, BOUNDS=1, BLOCK=BLOCK, num_warps=8)
    larger = counts[:, 0].cumsum(0)
    count_kernel[(blocks,)](keys_L, bound - 1, counts, length, SHIFT=0, BOUNDS=1, BLOCK=BLOCK, num_warps=8)
    reached = counts[:, 0].cumsum(0)
    before = [torch.cat([z.new_zeros(1), z[:-1]]) for z in (larger, reached - larger)]
    out = torch.empty(c, dtype=torch.int64, device=device)
    place_kernel[(blocks,)](keys_L, bound, *before, c - larger[-1], out, length, BLOCK=BLOCK, num_warps=8)
    return out


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
