"""Sums over each latent's tokens in Triton, by the list of entries sorted by latent.

The list of a latent is cut into segments of SEGMENT entries, and one program adds up one segment. The sums of a latent
with several are kept apart as partial sums and added up in order. No float atomics: every sum has a fixed order, so
results are bitwise equal from run to run. Accumulation is float32 whatever the dtype of the rows. The number of
segments is bounded, not counted, so that nothing waits for the device. Index arithmetic on rows is 64-bit: a decoder of
2^20 latents by 4096 needs more than 32.

Legend: N tokens, L entries (token, latent) in all, M latents, D row width, S segments, P partial sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.entries import Entries
from skipcoder.kernels.gpu.rows import block_d, num_warps

SEGMENT = 256
"""Entries of one latent that one program adds up."""


class Measured(NamedTuple):
    """What `measure` finds without writing the sums of rows."""

    dots: Tensor | None
    """[L] in the codes' own order: scale * row . W[latent]."""
    squares_M: Tensor
    """Square of the length of each latent's sum."""
    sums_M: Tensor
    """Each latent's sum of weights."""
    partial_PD: Tensor
    """The partial sums of rows (not scaled)."""


def cut(starts_M: Tensor, entries: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut a list of so many entries into segments: the fields latent_S, before_M, partial_before_M of Entries."""
    ends = torch.cat([starts_M[1:], starts_M.new_full((1,), entries)])
    segments = (ends - starts_M + SEGMENT - 1) // SEGMENT
    after, split = segments.cumsum(0), torch.where(segments > 1, segments, 0)
    places = torch.arange(min(len(starts_M), entries) + entries // SEGMENT, device=starts_M.device)
    return torch.searchsorted(after, places, right=True), after - segments, split.cumsum(0) - split


@triton.jit
def ends_of(latent, starts_ptr, M, L):  # type: ignore[no-untyped-def]
    """Where a latent's entries begin and end."""
    return tl.load(starts_ptr + latent), tl.load(starts_ptr + latent + 1, mask=latent + 1 < M, other=L)


@triton.jit
def along_removed(total, w):  # type: ignore[no-untyped-def]
    """`total` without its part along w."""
    return total - tl.sum(total * w) / tl.maximum(tl.sum(w * w), 1e-30) * w


@triton.jit
def segment_kernel(  # type: ignore[no-untyped-def]
    entry_ptr, token_ptr, starts_ptr, latent_ptr, before_ptr, partial_before_ptr, weight_ptr, rows_ptr, W_ptr,
    scale_ptr, out_ptr, dot_ptr, square_ptr, sum_ptr, partial_ptr, partial_sum_ptr, M, D, L,
    SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr, MEASURE: tl.constexpr, DOTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add up one segment. The sum goes to `out` (MEASURE: only its length does, to `square`) if it is the latent's only
    one, else to `partial`. DOTS: also row . W[latent] for every entry."""
    s = tl.program_id(0).to(tl.int64)
    latent = tl.load(latent_ptr + s)
    if latent < M:
        offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offset < D
        scale = tl.load(scale_ptr)
        first, last = ends_of(latent, starts_ptr, M, L)
        number = s - tl.load(before_ptr + latent)  # which of the latent's segments this is
        begin = first + number * SEGMENT
        total = tl.zeros((BLOCK_D,), tl.float32)
        weights = 0.0
        if DOTS or UNIT:
            w = tl.load(W_ptr + latent * D + offset, mask=inside, other=0.0)
        for i in range(begin, tl.minimum(begin + SEGMENT, last)):
            entry = tl.load(entry_ptr + i)
            weight = tl.load(weight_ptr + entry).to(tl.float32)
            row = tl.load(rows_ptr + tl.load(token_ptr + i) * D + offset, mask=inside, other=0.0).to(tl.float32)
            total += weight * row
            weights += weight
            if DOTS:
                tl.store(dot_ptr + entry, scale * tl.sum(row * w))
        if last - first > SEGMENT:
            place = tl.load(partial_before_ptr + latent) + number
            tl.store(partial_ptr + place * D + offset, total, mask=inside)
            if MEASURE:
                tl.store(partial_sum_ptr + place, weights)
        elif MEASURE:
            if UNIT:
                total = along_removed(total, w)
            tl.store(square_ptr + latent, scale * scale * tl.sum(total * total))
            tl.store(sum_ptr + latent, weights)
        else:
            tl.store(out_ptr + latent * D + offset, scale * total, mask=inside)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    starts_ptr, partial_before_ptr, W_ptr, scale_ptr, out_ptr, square_ptr, sum_ptr, partial_ptr, partial_sum_ptr,
    M, D, L, SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr, MEASURE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add up the partial sums of a split latent in order; write zeros for a latent without entries."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = ends_of(latent, starts_ptr, M, L)
    if (last - first > SEGMENT) | (last == first):
        offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offset < D
        scale = tl.load(scale_ptr)
        place = tl.load(partial_before_ptr + latent)
        total = tl.zeros((BLOCK_D,), tl.float32)
        weights = 0.0
        for i in range(place, place + (last - first + SEGMENT - 1) // SEGMENT):
            total += tl.load(partial_ptr + i * D + offset, mask=inside, other=0.0)
            if MEASURE:
                weights += tl.load(partial_sum_ptr + i)
        if MEASURE:
            if UNIT:
                total = along_removed(total, tl.load(W_ptr + latent * D + offset, mask=inside, other=0.0))
            tl.store(square_ptr + latent, scale * scale * tl.sum(total * total))
            tl.store(sum_ptr + latent, weights)
        else:
            tl.store(out_ptr + latent * D + offset, scale * total, mask=inside)


def sum_rows(latents: Entries, weights: Tensor, rows_ND: Tensor, scale: Tensor | None = None) -> Tensor:
    """float32 [M, D]: scale * the sum over a latent's entries of weight * row of the entry's token. `weights` are in
    the codes' own order."""
    out = rows_ND.new_empty(len(latents.starts_M), rows_ND.shape[1], dtype=torch.float32)
    tile = block_d(rows_ND.shape[1])
    _launch(latents, weights, rows_ND, None, scale, tile, num_warps(tile, rows_ND.element_size()), out=out)
    return out


def measure(
    latents: Entries, weights: Tensor, rows_ND: Tensor, scale: Tensor | None = None, W_MD: Tensor | None = None,
    unit: bool = False,
) -> Measured:  # fmt: skip
    """Find the lengths of the sums that `sum_rows` would write. With `W_MD`, also the dot products of its rows and
    those of their entries' tokens; `unit`: lengths of what is left of the sums across the rows of W_MD."""
    m, d = len(latents.starts_M), rows_ND.shape[1]
    dots = None if W_MD is None else rows_ND.new_empty(len(latents.entry_L), dtype=torch.float32)
    squares, sums = (rows_ND.new_empty(m, dtype=torch.float32) for _ in range(2))
    tile = triton.next_power_of_2(d)
    warps = min(8, num_warps(tile, rows_ND.element_size()))
    partial = _launch(latents, weights, rows_ND, W_MD, scale, tile, warps, None, dots, squares, sums, unit)
    return Measured(dots, squares, sums, partial)


def _launch(
    latents: Entries, weights: Tensor, rows_ND: Tensor, W_MD: Tensor | None, scale: Tensor | None, tile: int,
    warps: int, out: Tensor | None = None, dots: Tensor | None = None, squares: Tensor | None = None,
    sums: Tensor | None = None, unit: bool = False,
) -> Tensor:  # fmt: skip
    """Run both kernels; return the partial sums."""
    entry, token, starts, latent, before, partial_before = latents
    assert latent is not None and before is not None
    m, length, d, measuring = len(starts), len(entry), rows_ND.shape[1], out is None
    places = 2 * (length // SEGMENT) + 1
    partial = rows_ND.new_empty(places, d, dtype=torch.float32)
    partial_sums = rows_ND.new_empty(places if measuring else 0, dtype=torch.float32)
    scale = rows_ND.new_ones((), dtype=torch.float32) if scale is None else scale
    unused = partial  # what a kernel is not asked to touch
    tiles = triton.cdiv(d, tile)
    out, dot, square, sum_ = (unused if t is None else t for t in (out, dots, squares, sums))
    W = unused if W_MD is None else W_MD
    if length:
        segment_kernel[(len(latent), tiles)](
            entry, token, starts, latent, before, partial_before, weights.contiguous(), rows_ND.contiguous(), W, scale,
            out, dot, square, sum_, partial, partial_sums, m, d, length, SEGMENT=SEGMENT, BLOCK_D=tile,
            MEASURE=measuring, DOTS=dots is not None, UNIT=unit, num_warps=warps,
        )  # fmt: skip
    combine_kernel[(m, tiles)](
        starts, partial_before, W, scale, out, square, sum_, partial, partial_sums, m, d, length, SEGMENT=SEGMENT,
        BLOCK_D=tile, MEASURE=measuring, UNIT=unit, num_warps=warps,
    )  # fmt: skip
    return partial
