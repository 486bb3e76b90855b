"""Pre-activations W x + b of a batch in chunks of tokens, at three precisions; [N, M] never exists whole.

In `float32` mode the pre-activations are exact and decide which latents fire. The other modes, `bfloat16` and `scout`
(int8), give estimates that only nominate latents, whose exact values are computed afterwards.

A scout centres the inputs and divides each dimension by its spread (multiplying the weights by it), so that a dimension
with a large mean or variance does not use up the 8 bits; then every token and every latent gets its own scale.

Legend: N tokens, M latents, D input width, R tokens of one chunk.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MODES = ("float32", "bfloat16", "scout")

SCOUT_ELEMENTS = 5 * 2**19
"""Estimates held at once by a scout on a CPU. They pass through the cache three times: at 4096 x 18432 on 2 cores the
passes take 12 ms in chunks of 128 tokens, 40 ms in chunks of 1024; the product takes 118 and 104 ms."""

Chunk = tuple[slice, Tensor]


class Search(NamedTuple):
    """How the latents that fire are searched for. The default is exact."""

    mode: str = "float32"
    """One of MODES."""
    nominated: float = 1.25
    """Latents nominated by estimates, as a multiple of those that are chosen."""
    chunk_bytes: int = 2**26
    """Bound on the pre-activations held at once."""
    centre_D: Tensor | None = None
    """Mean of the inputs, which a scout subtracts."""
    spread_D: Tensor | None = None
    """Spread by which a scout divides each input dimension."""

    @property
    def is_exact(self) -> bool:
        """Whether pre-activations decide, rather than only nominate."""
        return self.mode == "float32"


EXACT = Search()


def preactivations(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, search: Search) -> Iterator[Chunk]:
    """Yield (slice of tokens, their pre-activations [R, M]) of at most `search.chunk_bytes` (R at least 1). Each chunk
    overwrites the previous one. ValueError for an unknown mode."""
    if search.mode not in MODES:
        raise ValueError(f"mode={search.mode!r}: choose from {', '.join(MODES)}")
    n, m = len(x_ND), len(W_MD)
    if search.mode == "scout":
        elements = search.chunk_bytes // 4
        if not x_ND.is_cuda:
            elements = min(elements, max(SCOUT_ELEMENTS, 32 * m))  # fewer tokens starve the product
        yield from _scout(x_ND, W_MD, b_M, max(1, elements // m), search.centre_D, search.spread_D)
        return
    dtype = torch.bfloat16 if search.mode == "bfloat16" else x_ND.dtype
    W_cast, b_cast = W_MD.to(dtype), b_M.to(dtype)
    # One buffer for all chunks: fresh pages would cost a fifth of the product's time.
    rows = min(max(1, search.chunk_bytes // (m * dtype.itemsize)), max(n, 1))
    buffer = x_ND.new_empty(rows, m, dtype=dtype)
    for part in _parts(n, rows):
        x_RD = x_ND[part].to(dtype)
        yield part, torch.addmm(b_cast, x_RD, W_cast.T, out=buffer[: len(x_RD)])


def _scout(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, rows: int, centre_D: Tensor | None, spread_D: Tensor | None
) -> Iterator[Chunk]:
    (n, d), m = x_ND.shape, len(W_MD)
    spread_D = x_ND.new_ones(d) if spread_D is None else spread_D
    if centre_D is not None:
        x_ND, b_M = x_ND - centre_D, b_M + W_MD @ centre_D
    x_scale_N1 = _absmax(x_ND / spread_D)
    # The int8 product asks for widths that are multiples of 8, and on GPUs for more than 16 rows.
    wide, tall = -(-d // 8) * 8, -(-m // 8) * 8
    least = 17 if x_ND.is_cuda else 1
    rows = min(max(rows - rows % 32 if rows >= 32 else rows, least), max(n, least))
    x_q = torch.zeros(rows, wide, dtype=torch.int8, device=x_ND.device)
    W_q, W_scale_M = _quantise_weights(W_MD, spread_D, wide, tall)
    products = torch.empty(rows, tall, dtype=torch.int32, device=x_ND.device)
    estimates = torch.empty(rows, m, device=x_ND.device)
    for part in _parts(n, rows):
        r = len(x_ND[part])
        x_q[:r, :d] = (x_ND[part] / (x_scale_N1[part] * spread_D)).round_()
        torch._int_mm(x_q[: max(r, least)], W_q.T, out=products[: max(r, least)])
        # Three passes: torch has no vector code for int32 * float32 in one.
        pre = estimates[:r].copy_(products[:r, :m])
        yield part, torch.addcmul(b_M, pre.mul_(x_scale_N1[part]), W_scale_M, out=pre)


def _quantise_weights(W_MD: Tensor, spread_D: Tensor, wide: int, tall: int, block: int = 256) -> tuple[Tensor, Tensor]:
    """int8 [M, D], padded with zeros to [tall, wide], and the scale [M] of each row; in blocks that stay in cache."""
    m, d = W_MD.shape
    W_q = torch.zeros(tall, wide, dtype=torch.int8, device=W_MD.device)
    scale_M1 = W_MD.new_empty(m, 1)
    for part in _parts(m, block):
        rows = W_MD[part] * spread_D
        scale_M1[part] = _absmax(rows)
        W_q[part, :d] = rows.div_(scale_M1[part]).round_()
    return W_q, scale_M1.squeeze(1)


def _absmax(rows: Tensor) -> Tensor:
    """The scale [., 1] that brings each row into -127..127."""
    most = torch.maximum(rows.amax(1, keepdim=True), -rows.amin(1, keepdim=True))  # aminmax takes six times as long
    return most.div_(127).clamp_min_(1e-30)


def _parts(n: int, rows: int) -> Iterator[slice]:
    for start in range(0, n, rows):
        yield slice(start, min(start + rows, n))
