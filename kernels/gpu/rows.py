"""The two operations by token in Triton: gather-sum and gather-dot.

Every sum has a fixed order. Rows are tiled over their width with masks; accumulation is float32 whatever the dtype of
the rows. Index arithmetic on rows is 64-bit: a decoder of 2^20 latents by 4096 needs more than 32.

Legend: N tokens, K active latents per token, L entries (token, latent) in all, M latents, D row width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def gather_sum_kernel(  # type: ignore[no-untyped-def]
    index_ptr, weight_ptr, W_ptr, offset_ptr, base_ptr, out_ptr, D, K, N, L,
    RAGGED: tl.constexpr, BASE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[n] = base + sum_j weight[n, j] * W[index[n, j]], one tile of D per program. BASE: 0 none, 1 [D], 2 [N, D]."""
    n = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    begin, end = n * K, n * K + K
    if RAGGED:
        begin = tl.load(offset_ptr + n)
        end = tl.load(offset_ptr + n + 1, mask=n + 1 < N, other=L)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for j in range(begin, end):
        row = tl.load(index_ptr + j)
        weight = tl.load(weight_ptr + j).to(tl.float32)
        total += weight * tl.load(W_ptr + row * D + offset, mask=inside, other=0.0).to(tl.float32)
    if BASE > 0:
        start = n * D if BASE == 2 else 0
        total += tl.load(base_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + n * D + offset, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def errors_kernel(  # type: ignore[no-untyped-def]
    index_ptr, weight_ptr, W_ptr, offset_ptr, base_ptr, y_ptr, block_ptr, error_ptr, square_ptr, D, K, N, L,
    RAGGED: tl.constexpr, BASE: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """error[b, n] = y[n] - base - the weighted sum over the entries in blocks 0 ... b, one tile of D per program, and
    the tile's sum of squares."""
    n = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    begin, end = n * K, n * K + K
    if RAGGED:
        begin = tl.load(offset_ptr + n)
        end = tl.load(offset_ptr + n + 1, mask=n + 1 < N, other=L)
    start = n * D if BASE == 2 else 0
    error = tl.load(y_ptr + n * D + offset, mask=inside, other=0.0).to(tl.float32)
    error -= tl.load(base_ptr + start + offset, mask=inside, other=0.0).to(tl.float32)
    for b in range(BLOCKS):
        for j in range(begin, end):
            take = True
            if BLOCKS > 1:
                take = tl.load(block_ptr + j) == b
            if take:
                row = tl.load(index_ptr + j)
                weight = tl.load(weight_ptr + j).to(tl.float32)
                error -= weight * tl.load(W_ptr + row * D + offset, mask=inside, other=0.0).to(tl.float32)
        place = b * N + n
        tl.store(error_ptr + place * D + offset, error, mask=inside)
        tl.store(square_ptr + place * tl.num_programs(1) + tl.program_id(1), tl.sum(error * error))


@triton.jit
def gather_dot_kernel(  # type: ignore[no-untyped-def]
    x_ptr, W_ptr, index_ptr, token_ptr, bias_ptr, out_ptr, D, K, L,
    FLAT: tl.constexpr, BIAS: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[l] = x[token of l] . W[index[l]] (+ bias[index[l]]) for BLOCK_L entries: of one token unless FLAT.

    Products are kept for each column of the tile and added up once, at the end; a sum over the threads for every tile
    made this 1.6 to 2.8 times as slow as gather_sum, which moves the same bytes (H200).
    """
    if FLAT:
        entry = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = entry < L
        token = tl.load(token_ptr + entry, mask=inside, other=0)[:, None]
    else:
        place = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
        inside = place < K
        token = tl.program_id(0).to(tl.int64)
        entry = token * K + place
    rows = tl.load(index_ptr + entry, mask=inside, other=0)
    products = tl.zeros((BLOCK_L, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        offset = (start + tl.arange(0, BLOCK_D))[None, :]
        x = tl.load(x_ptr + token * D + offset, mask=offset < D, other=0.0).to(tl.float32)
        within = inside[:, None] & (offset < D)
        products += x * tl.load(W_ptr + rows[:, None] * D + offset, mask=within, other=0.0).to(tl.float32)
    total = tl.sum(products, axis=1)
    if BIAS:
        total += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + entry, total.to(out_ptr.dtype.element_ty), mask=inside)


WARP = 64 if torch.version.hip else 32


def row_tile(d: int, item_bytes: int, of_thread: int = 16, warp: int = WARP) -> int:
    """Elements of a row that one warp takes at a time: so many bytes for each thread, or the next power of two for
    narrower rows."""
    result: int = min(of_thread * warp // item_bytes, triton.next_power_of_2(d))
    return result


def num_warps(tile: int, item_bytes: int, warp: int = WARP) -> int:
    """Warps with which each thread loads 16 bytes of a tile, the widest load there is."""
    return max(1, tile * item_bytes // (16 * warp))


def gather_sum(
    indices: Tensor, weights: Tensor, W_MD: Tensor, offsets: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """[N, D] in W's dtype; see rows.gather_sum."""
    n, d = len(indices if offsets is None else offsets), W_MD.shape[1]
    out = W_MD.new_empty(n, d)
    if n:
        tile = row_tile(d, W_MD.element_size())
        k = 0 if offsets is not None else indices.shape[1]
        gather_sum_kernel[(n, triton.cdiv(d, tile))](
            indices.contiguous(), weights.contiguous(), W_MD.contiguous(), indices if offsets is None else offsets,
            out if base is None else base.contiguous(), out, d, k, n, indices.numel(), RAGGED=offsets is not None,
            BASE=0 if base is None else base.dim(), BLOCK_D=tile, num_warps=1,
        )  # fmt: skip
    return out


def errors(
    indices: Tensor, weights: Tensor, W_MD: Tensor, offsets: Tensor | None, base: Tensor, y_ND: Tensor,
    block: Tensor | None, blocks: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """float32 errors [B, N, D] and the sums of their squares [B]; see squared_error.py."""
    n, d = y_ND.shape
    tile = row_tile(d, W_MD.element_size())
    tiles = triton.cdiv(d, tile)
    out = W_MD.new_empty(blocks, n, d, dtype=torch.float32)
    squares = W_MD.new_zeros(blocks, n * tiles, dtype=torch.float32)
    if n:
        errors_kernel[(n, tiles)](
            indices.contiguous(), weights.contiguous(), W_MD.contiguous(), indices if offsets is None else offsets,
            base.contiguous(), y_ND.contiguous(), indices if block is None else block.contiguous(), out, squares, d,
            0 if offsets is not None else indices.shape[1], n, indices.numel(), RAGGED=offsets is not None,
            BASE=base.dim(), BLOCKS=blocks, BLOCK_D=tile, num_warps=1,
        )  # fmt: skip
    return out, squares.sum(1)


def gather_dot(
    rows_ND: Tensor, W_MD: Tensor, indices: Tensor, token_L: Tensor | None = None, bias_M: Tensor | None = None
) -> Tensor:
    """Shaped like the indices, in the dtype of the rows; see rows.gather_dot. `token_L`: of flat indices."""
    d, entries = W_MD.shape[1], indices.numel()
    out = rows_ND.new_empty(indices.shape)
    if entries:
        tile, some, flat = row_tile(d, W_MD.element_size(), of_thread=8), 8, token_L is not None
        k = 0 if flat else indices.shape[1]
        grid = (triton.cdiv(entries, some),) if flat else (len(indices), triton.cdiv(k, some))
        gather_dot_kernel[grid](
            rows_ND.contiguous(), W_MD.contiguous(), indices.contiguous(), token_L if flat else out,
            out if bias_M is None else bias_M, out, d, k, entries, FLAT=flat, BIAS=bias_M is not None,
            BLOCK_L=some, BLOCK_D=tile, num_warps=2,
        )  # fmt: skip
    return out
