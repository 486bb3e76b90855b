"""Sums over each latent's tokens in Triton, by the list of entries sorted by latent.

The list of a latent is cut into segments of SEGMENT entries, and one program adds up a tile of one segment. The sums
of a latent with several are kept apart as partial sums and added up in order. No float atomics: every sum has a fixed
order, so results are bitwise equal from run to run. Accumulation is float32 whatever the dtype of the rows. The number
of segments is bounded, not counted, so that nothing waits for the device. Index arithmetic on rows is 64-bit: a decoder
of 2^20 latents by 4096 needs more than 32.

Legend: N tokens, L entries (token, latent) in all, M latents, D row width, S segments, P partial sums.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.entries import Entries
from skipcoder.kernels.gpu import rows

SEGMENT = 256
"""Entries of one latent that one program adds up."""
AT_ONCE = 2
"""Entries whose rows a program has under way at a time."""
BLOCK_M = 128
"""Latents that one program of `combine` looks at."""


class Measured(NamedTuple):
    """What `measure` finds."""

    dots: Tensor | None
    """[L] in the codes' own order: scale * row . W[latent]."""
    squares_M: Tensor
    """Square of the length of each latent's sum."""
    weights_M: Tensor
    """Each latent's sum of weights."""
    partial_PD: Tensor
    """The partial sums of rows (not scaled)."""
    sums_MD: Tensor | None
    """The sums themselves (not scaled), if asked for."""


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
def some_rows(  # type: ignore[no-untyped-def]
    begin, end, entry_ptr, token_ptr, weight_ptr, rows_ptr, offset, inside, D, AT_ONCE: tl.constexpr
):
    """AT_ONCE entries from `begin`, their weights and a tile of their tokens' rows; zeros from `end` on."""
    place = begin + tl.arange(0, AT_ONCE)
    some = place < end
    entry = tl.load(entry_ptr + place, mask=some, other=0)
    token = tl.load(token_ptr + place, mask=some, other=0)
    weight = tl.load(weight_ptr + entry, mask=some, other=0.0).to(tl.float32)
    at = token[:, None] * D + offset[None, :]
    row = tl.load(rows_ptr + at, mask=some[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return entry, some, weight, row


@triton.jit
def write_measures(total, w, measure_ptr, at, step, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Squared length of a tile of a latent's sum. UNIT: also its product with that of W's row, and that row's squared
    length."""
    tl.store(measure_ptr + at, tl.sum(total * total))
    if UNIT:
        tl.store(measure_ptr + step + at, tl.sum(total * w))
        tl.store(measure_ptr + 2 * step + at, tl.sum(w * w))


@triton.jit
def segment_kernel(  # type: ignore[no-untyped-def]
    entry_ptr, token_ptr, starts_ptr, latent_ptr, before_ptr, partial_before_ptr, weight_ptr, rows_ptr, W_ptr,
    scale_ptr, out_ptr, dot_ptr, measure_ptr, weights_ptr, partial_ptr, partial_weights_ptr, M, D, L,
    SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, SUMS: tl.constexpr, MEASURE: tl.constexpr,
    DOTS: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Add up one tile of one segment. If it is the latent's only one, the sum goes to `out` (SUMS) and its length to
    `measure` (MEASURE), else the sum goes to `partial`. DOTS: also row . W[latent] for every entry."""
    s, tile = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    latent = tl.load(latent_ptr + s)
    if latent < M:
        offset = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offset < D
        first, last = ends_of(latent, starts_ptr, M, L)
        number = s - tl.load(before_ptr + latent)  # which of the latent's segments this is
        begin = first + number * SEGMENT
        end = tl.minimum(begin + SEGMENT, last)
        total = tl.zeros((BLOCK_D,), tl.float32)
        w = total
        weights = 0.0
        if DOTS or UNIT:
            w = tl.load(W_ptr + latent * D + offset, mask=inside, other=0.0)
        for i in range(begin, end, AT_ONCE):
            entry, some, weight, row = some_rows(
                i, end, entry_ptr, token_ptr, weight_ptr, rows_ptr, offset, inside, D, AT_ONCE
            )
            total += tl.sum(weight[:, None] * row, axis=0)
            weights += tl.sum(weight)
            if DOTS:
                tl.store(dot_ptr + tile * L + entry, tl.load(scale_ptr) * tl.sum(row * w[None, :], axis=1), mask=some)
        if last - first > SEGMENT:
            place = tl.load(partial_before_ptr + latent) + number
            tl.store(partial_ptr + place * D + offset, total, mask=inside)
            if MEASURE:
                tl.store(partial_weights_ptr + place, weights)
        else:
            if SUMS:
                tl.store(out_ptr + latent * D + offset, total, mask=inside)
            if MEASURE:
                write_measures(total, w, measure_ptr, tile * M + latent, tl.num_programs(1) * M, UNIT)
                tl.store(weights_ptr + latent, weights)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    starts_ptr, partial_before_ptr, W_ptr, out_ptr, measure_ptr, weights_ptr, partial_ptr, partial_weights_ptr, M, D, L,
    SEGMENT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, SUMS: tl.constexpr, MEASURE: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_M latents, add up the partial sums of those that are split, in order, and write zeros for those without
    entries: one tile."""
    tile = tl.program_id(1).to(tl.int64)
    offset = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    begin = tl.program_id(0).to(tl.int64) * BLOCK_M
    latents = begin + tl.arange(0, BLOCK_M)
    firsts = tl.load(starts_ptr + latents, mask=latents < M, other=L)
    counts = tl.load(starts_ptr + latents + 1, mask=latents + 1 < M, other=L) - firsts
    work = counts > SEGMENT
    idle = (counts == 0) & (latents < M)
    if MEASURE:
        for kind in range(3 if UNIT else 1):
            tl.store(measure_ptr + (kind * tl.num_programs(1) + tile) * M + latents, 0.0, mask=idle)
        tl.store(weights_ptr + latents, 0.0, mask=idle)
    if SUMS:
        work |= idle
    if tl.max(work.to(tl.int32)) > 0:
        for latent in range(begin, tl.minimum(begin + BLOCK_M, M)):
            first, last = ends_of(latent, starts_ptr, M, L)
            if (last - first > SEGMENT) | (SUMS & (last == first)):
                total = tl.zeros((BLOCK_D,), tl.float32)
                w = total
                weights = 0.0
                place = tl.load(partial_before_ptr + latent)
                for i in range(place, place + (last - first + SEGMENT - 1) // SEGMENT):
                    total += tl.load(partial_ptr + i * D + offset, mask=inside, other=0.0)
                    if MEASURE:
                        weights += tl.load(partial_weights_ptr + i)
                if SUMS:
                    tl.store(out_ptr + latent * D + offset, total, mask=inside)
                if MEASURE:
                    if UNIT:
                        w = tl.load(W_ptr + latent * D + offset, mask=inside, other=0.0)
                    write_measures(total, w, measure_ptr, tile * M + latent, tl.num_programs(1) * M, UNIT)
                    tl.store(weights_ptr + latent, weights)


def sum_rows(latents: Entries, weights: Tensor, rows_ND: Tensor) -> Tensor:
    """float32 [M, D]: the sum over a latent's entries of weight * row of the entry's token. `weights` are in the codes'
    own order."""
    out = rows_ND.new_empty(len(latents.starts_M), rows_ND.shape[1], dtype=torch.float32)
    _launch(latents, weights, rows_ND, out=out)
    return out


def measure(
    latents: Entries, weights: Tensor, rows_ND: Tensor, scale: Tensor | None = None, W_MD: Tensor | None = None,
    unit: bool = False, keep: bool = False,
) -> Measured:  # fmt: skip
    """Find the lengths of scale * the sums that `sum_rows` would write. With `W_MD`, also the dot products of its rows
    and those of their entries' tokens; `unit`: lengths of what is left of the sums across the rows of W_MD; `keep`:
    also write the sums."""
    (m, d), length = (len(latents.starts_M), rows_ND.shape[1]), len(latents.entry_L)
    tiles = triton.cdiv(d, tile_of(rows_ND))
    new = partial(rows_ND.new_empty, dtype=torch.float32)
    dots = None if W_MD is None else new(tiles, length)
    measures, weights_M, sums = new(3 if unit else 1, tiles, m), new(m), new(m, d) if keep else None
    scale = rows_ND.new_ones((), dtype=torch.float32) if scale is None else scale
    partial_PD = _launch(latents, weights, rows_ND, scale, W_MD, sums, dots, measures, weights_M)
    squares, *others = measures.sum(1)
    if unit:
        squares = (squares - others[0].square() / others[1].clamp_min(1e-30)).clamp_min(0)
    return Measured(None if dots is None else dots.sum(0), squares * scale.square(), weights_M, partial_PD, sums)


def _launch(
    latents: Entries, weights: Tensor, rows_ND: Tensor, scale: Tensor | None = None, W_MD: Tensor | None = None,
    out: Tensor | None = None, dots: Tensor | None = None, measures: Tensor | None = None,
    weights_M: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Run both kernels; return the partial sums."""
    entry, token, starts, latent, before, partial_before = latents
    assert latent is not None and before is not None
    m, length, d = len(starts), len(entry), rows_ND.shape[1]
    places = 2 * (length // SEGMENT) + 1
    partial_PD = rows_ND.new_empty(places, d, dtype=torch.float32)
    partial_weights = rows_ND.new_empty(places if measures is not None else 0, dtype=torch.float32)
    # A kernel does not touch what it is not asked for.
    W, scale, sums, dot, found, sum_ = (
        partial_PD if t is None else t for t in (W_MD, scale, out, dots, measures, weights_M)
    )
    tile = tile_of(rows_ND)
    tiles = triton.cdiv(d, tile)
    asked = {"SUMS": out is not None, "MEASURE": measures is not None}
    asked["UNIT"] = measures is not None and len(measures) > 1
    if length:
        segment_kernel[(len(latent), tiles)](
            entry, token, starts, latent, before, partial_before, weights.contiguous(), rows_ND.contiguous(), W, scale,
            sums, dot, found, sum_, partial_PD, partial_weights, m, d, length, SEGMENT=SEGMENT,
            AT_ONCE=AT_ONCE, BLOCK_D=tile, DOTS=dots is not None, **asked, num_warps=1,
        )  # fmt: skip
    combine_kernel[(triton.cdiv(m, BLOCK_M), tiles)](
        starts, partial_before, W, sums, found, sum_, partial_PD, partial_weights, m, d, length, SEGMENT=SEGMENT,
        BLOCK_M=BLOCK_M, BLOCK_D=tile, **asked, num_warps=1,
    )  # fmt: skip
    return partial_PD


def tile_of(rows_ND: Tensor) -> int:
    """Width of the tile of a row that one warp takes. Programs of one tile follow each other, so that the rows' columns
    of that tile stay in the cache however often they are read."""
    return rows.row_tile(rows_ND.shape[1], rows_ND.element_size(), of_thread=32)
