"""The three sparse operations in Triton: gather-sum, gather-dot, and the sum over each latent's tokens.

No float atomics: every sum has a fixed order, so results are the same bits from run to run. Rows are tiled over their
width with masks; accumulation is float32 whatever the dtype of the rows. Index arithmetic on rows is 64-bit: a decoder
of 2^20 latents by 4096 does not fit 32.

Legend: N tokens, K active latents per token, M latents, D row width, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 256
"""Entries of one latent that one program adds up; longer lists are split and combined in order."""


@triton.jit
def gather_sum_kernel(index_ptr, weight_ptr, W_ptr, out_ptr, D, K, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[n] = sum_j weight[n, j] * W[index[n, j]], one tile of D per program."""
    n = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(K):
        row = tl.load(index_ptr + n * K + j)
        weight = tl.load(weight_ptr + n * K + j).to(tl.float32)
        total += weight * tl.load(W_ptr + row * D + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + offset, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gather_dot_kernel(  # type: ignore[no-untyped-def]
    x_ptr, W_ptr, index_ptr, out_ptr, D, K, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    """out[n, j] = x[n] . W[index[n, j]] for BLOCK_K of the j; x[n] is read once for all of them."""
    n = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows = tl.load(index_ptr + n * K + j, mask=j < K, other=0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    for start in range(0, D, BLOCK_D):
        offset = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + n * D + offset, mask=offset < D, other=0.0).to(tl.float32)
        inside = (j < K)[:, None] & (offset < D)[None, :]
        W = tl.load(W_ptr + rows[:, None] * D + offset[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(W * x[None, :], axis=1)
    tl.store(out_ptr + n * K + j, total.to(out_ptr.dtype.element_ty), mask=j < K)


@triton.jit
def segment_sum_kernel(  # type: ignore[no-untyped-def]
    latent_ptr, token_ptr, weight_ptr, rows_ptr, start_ptr, count_ptr, segments_ptr, before_ptr, partial_before_ptr,
    out_ptr, partial_ptr, M, D, SEGMENT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum one segment of one latent's entries; alone it goes to `out`, else to `partial`."""
    s = tl.program_id(0).to(tl.int64)
    latent = tl.load(latent_ptr + s)
    if latent < M:
        offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offset < D
        number = s - tl.load(before_ptr + latent)  # which of the latent's segments this is
        first = tl.load(start_ptr + latent)
        begin = first + number * SEGMENT
        end = tl.minimum(begin + SEGMENT, first + tl.load(count_ptr + latent))
        total = tl.zeros((BLOCK_D,), tl.float32)
        for i in range(begin, end):
            token = tl.load(token_ptr + i)
            weight = tl.load(weight_ptr + i).to(tl.float32)
            total += weight * tl.load(rows_ptr + token * D + offset, mask=inside, other=0.0).to(tl.float32)
        if tl.load(segments_ptr + latent) == 1:
            tl.store(out_ptr + latent * D + offset, total, mask=inside)
        else:
            place = tl.load(partial_before_ptr + latent) + number
            tl.store(partial_ptr + place * D + offset, total, mask=inside)


@triton.jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr, segments_ptr, partial_before_ptr, out_ptr, D, BLOCK_D: tl.constexpr
):
    """Add up a split latent's segments in order; write zeros for a latent without entries."""
    latent = tl.program_id(0).to(tl.int64)
    segments = tl.load(segments_ptr + latent)
    if segments != 1:
        offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = offset < D
        first = tl.load(partial_before_ptr + latent)
        total = tl.zeros((BLOCK_D,), tl.float32)
        for i in range(segments):
            total += tl.load(partial_ptr + (first + i) * D + offset, mask=inside, other=0.0)
        tl.store(out_ptr + latent * D + offset, total, mask=inside)


def block_d(d: int) -> int:
    """Tile width; narrower rows take the next power of two."""
    return min(512, triton.next_power_of_2(d))


def num_warps(tile: int, item_bytes: int, warp: int = 64 if torch.version.hip else 32) -> int:
    """Warps with which each thread loads 16 bytes of a tile, the widest load there is."""
    return max(1, tile * item_bytes // (16 * warp))


def gather_sum(indices_NK: Tensor, weights_NK: Tensor, W_MD: Tensor) -> Tensor:
    """[N, D] in W's dtype."""
    (n, k), d = indices_NK.shape, W_MD.shape[1]
    out = W_MD.new_empty(n, d)
    if n:
        tile = block_d(d)
        grid = (n, triton.cdiv(d, tile))
        warps = num_warps(tile, W_MD.element_size())
        gather_sum_kernel[grid](
            indices_NK.contiguous(), weights_NK.contiguous(), W_MD, out, d, k, BLOCK_D=tile, num_warps=warps
        )
    return out


def gather_dot(rows_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """[N, K] in the dtype of the rows."""
    (n, k), d = indices_NK.shape, W_MD.shape[1]
    out = rows_ND.new_empty(n, k)
    if n:
        tile, some = min(256, block_d(d)), min(8, triton.next_power_of_2(k))
        grid = (n, triton.cdiv(k, some))
        gather_dot_kernel[grid](
            rows_ND.contiguous(), W_MD, indices_NK.contiguous(), out, d, k, BLOCK_K=some, BLOCK_D=tile
        )
    return out


def sum_rows(token: Tensor, weight: Tensor, starts_M: Tensor, rows_ND: Tensor, segment: int = SEGMENT) -> Tensor:
    """float32 [M, D]: for each latent the weighted sum of the rows of its tokens.

    `token` and `weight` hold the N*K entries sorted by latent, `starts_M` where each latent's begin. The number of
    segments is bounded, not counted, so that nothing waits for the device.
    """
    m, d, entries = len(starts_M), rows_ND.shape[1], len(token)
    out = rows_ND.new_empty(m, d, dtype=torch.float32)
    ends = torch.cat([starts_M[1:], starts_M.new_full((1,), entries)])
    count = ends - starts_M
    segments = (count + segment - 1) // segment
    after = segments.cumsum(0)
    split = torch.where(segments > 1, segments, 0)
    partial_before = split.cumsum(0) - split
    partial = rows_ND.new_empty(2 * (entries // segment) + 1, d, dtype=torch.float32)
    most = min(m, entries) + entries // segment
    tile = block_d(d)
    tiles = triton.cdiv(d, tile)
    if most:
        latent = torch.searchsorted(after, torch.arange(most, device=token.device), right=True)
        segment_sum_kernel[(most, tiles)](
            latent, token, weight, rows_ND.contiguous(), starts_M, count, segments, after - segments, partial_before,
            out, partial, m, d, SEGMENT=segment, BLOCK_D=tile, num_warps=num_warps(tile, rows_ND.element_size()),
        )  # fmt: skip
    combine_kernel[(m, tiles)](partial, segments, partial_before, out, d, BLOCK_D=tile, num_warps=num_warps(tile, 4))
    return out
