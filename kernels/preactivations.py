"""Pre-activations W x + b of a batch in chunks of tokens, at four precisions; [N, M] never exists whole.

In `float32` mode the pre-activations are exact and decide which latents fire. The other modes, `bfloat16`, `fp8` (e4m3)
and on CPUs `scout` (int8), give estimates that only nominate latents, whose exact values are computed afterwards.

With 8 bits the inputs are centred, and every token and every latent gets its own scale. A scout also divides each
dimension by its spread (multiplying the weights by it), so that one with a large variance does not use up the 8 bits.

Legend: N tokens, M latents, D input width, R tokens of one chunk.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton

MODES = ("float32", "bfloat16", "fp8", "scout")
NOMINATED = {"fp8": 1.75}
"""Latents nominated, as a multiple of those that are chosen, where it is not 1.25."""

SCOUT_ELEMENTS = 5 * 2**19
"""Estimates held at once by a scout on a CPU. They pass through the cache three times: at 4096 x 18432 on 2 cores the
passes take 12 ms in chunks of 128 tokens, 40 ms in chunks of 1024; the product takes 118 and 104 ms."""

Chunk = tuple[slice, Tensor]


class Search(NamedTuple):
    """How the latents that fire are searched for. The default is exact."""

    mode: str = "float32"
    """One of MODES."""
    nominated: float | None = None
    """Latents nominated by estimates, as a multiple of those that are chosen; None: what the mode needs."""
    chunk_bytes: int = 2**26
    """Bound on the pre-activations held at once."""
    centre_D: Tensor | None = None
    """Mean of the inputs, which is subtracted before they are put into 8 bits."""
    spread_D: Tensor | None = None
    """Spread by which a scout divides each input dimension."""
    W_half_MD: Tensor | None = None
    """The weights in bfloat16, where somebody keeps them so."""

    @property
    def is_exact(self) -> bool:
        """Whether pre-activations decide, rather than only nominate."""
        return self.mode == "float32"

    def candidates(self, k: int) -> int:
        """Return how many latents to nominate for k."""
        return math.ceil((self.nominated or NOMINATED.get(self.mode, 1.25)) * k)


EXACT = Search()


def preactivations(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, search: Search) -> Iterator[Chunk]:
    """Yield (slice of tokens, their pre-activations [R, M]) of at most `search.chunk_bytes` (R at least 1). Each chunk
    overwrites the previous one. ValueError for an unknown mode."""
    if search.mode == "scout":
        yield from _scout(x_ND, W_MD, b_M, search)
    elif search.mode == "fp8":
        yield from _fp8(x_ND, W_MD, b_M, search)
    elif search.mode in MODES:
        yield from _plain(x_ND, W_MD, b_M, search)
    else:
        raise ValueError(f"mode={search.mode!r}: choose from {', '.join(MODES)}")


def fp8_type(device: torch.device) -> torch.dtype | None:
    """Return the 8-bit float that a device multiplies, None if it has none."""
    if device.type != "cuda":
        return torch.float8_e4m3fn
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName
        if "gfx94" in name:
            return torch.float8_e4m3fnuz
        return torch.float8_e4m3fn if "gfx95" in name else None
    return torch.float8_e4m3fn if torch.cuda.get_device_capability(device) >= (8, 9) else None


def _plain(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, search: Search) -> Iterator[Chunk]:
    n, m = len(x_ND), len(W_MD)
    dtype = torch.bfloat16 if search.mode == "bfloat16" else x_ND.dtype
    kept = search.W_half_MD if search.mode == "bfloat16" else None
    W_cast, b_cast = W_MD.to(dtype) if kept is None else kept, b_M.to(dtype)
    # One buffer for all chunks: fresh pages would cost a fifth of the product's time.
    rows = min(max(1, search.chunk_bytes // (m * dtype.itemsize)), max(n, 1))
    buffer = x_ND.new_empty(rows, m, dtype=dtype)
    for part in _parts(n, rows):
        x_RD = x_ND[part].to(dtype)
        yield part, torch.addmm(b_cast, x_RD, W_cast.T, out=buffer[: len(x_RD)])


def _fp8(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, search: Search) -> Iterator[Chunk]:
    (n, d), m, dtype = x_ND.shape, len(W_MD), fp8_type(x_ND.device)
    assert dtype is not None
    wide, tall = -(-d // 16) * 16, -(-m // 16) * 16  # what the product asks for
    rows = search.chunk_bytes // (2 * tall)
    rows = min(max(16, rows - rows % 16), max(n, 1))  # a chunk's scales must begin at a multiple of 16 bytes
    W_q, W_scale_M, bias_M = _in_8_bits(W_MD, tall, wide, dtype, search.centre_D, b_M)
    x_q, x_scale_N, _ = _in_8_bits(x_ND, n, wide, dtype, search.centre_D)
    buffer = torch.empty(rows, tall, dtype=torch.bfloat16, device=x_ND.device)
    for part in _parts(n, rows):
        out = buffer[: part.stop - part.start]
        scales = {"scale_a": x_scale_N[part, None], "scale_b": W_scale_M[None]}
        torch._scaled_mm(x_q[part], W_q.T, **scales, bias=bias_M, out_dtype=out.dtype, use_fast_accum=True, out=out)
        yield part, out if tall == m else out[:, :m].contiguous()


def _in_8_bits(
    rows_RD: Tensor, tall: int, wide: int, dtype: torch.dtype, centre_D: Tensor | None, bias_R: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [tall, wide] in 8-bit floats, padded with zeros, and their scales. Of inputs the centre is subtracted; with
    a bias they are weights, and the bias in bfloat16 takes up the centre."""
    r, d = rows_RD.shape
    out = torch.zeros(tall, wide, dtype=dtype, device=rows_RD.device)
    # Room for the product to read scales of whole tiles (pytorch issue 133334).
    scale = torch.ones(-(-tall // 256) * 256, device=rows_RD.device)[:tall]
    bias = torch.zeros(tall, dtype=torch.bfloat16, device=rows_RD.device)
    if in_triton(rows_RD):
        from skipcoder.kernels.gpu import quantise as gpu

        gpu.quantise(rows_RD, out[:r], scale[:r], centre_D, bias_R, bias)
        return out, scale, bias
    if bias_R is not None:
        bias[:r] = bias_R if centre_D is None else bias_R + rows_RD @ centre_D
    elif centre_D is not None:
        rows_RD = rows_RD - centre_D
    scale[:r] = (rows_RD.abs().amax(1) / torch.finfo(dtype).max).clamp_min(1e-30)
    out[:r, :d] = (rows_RD / scale[:r, None]).to(dtype)
    return out, scale, bias


def _scout(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, search: Search) -> Iterator[Chunk]:
    (n, d), m = x_ND.shape, len(W_MD)
    spread_D = x_ND.new_ones(d) if search.spread_D is None else search.spread_D
    if search.centre_D is not None:
        x_ND, b_M = x_ND - search.centre_D, b_M + W_MD @ search.centre_D
    x_scale_N1 = _absmax(x_ND / spread_D)
    wide, tall = -(-d // 8) * 8, -(-m // 8) * 8  # what the int8 product asks for
    # Fewer than 32 tokens starve the product.
    rows = max(1, min(search.chunk_bytes // 4, max(SCOUT_ELEMENTS, 32 * m)) // m)
    rows = min(rows - rows % 32 if rows >= 32 else rows, max(n, 1))
    x_q = torch.zeros(rows, wide, dtype=torch.int8)
    W_q, W_scale_M = _quantise_weights(W_MD, spread_D, wide, tall)
    products = torch.empty(rows, tall, dtype=torch.int32)
    estimates = torch.empty(rows, m)
    for part in _parts(n, rows):
        r = len(x_ND[part])
        x_q[:r, :d] = (x_ND[part] / (x_scale_N1[part] * spread_D)).round_()
        torch._int_mm(x_q[:r], W_q.T, out=products[:r])
        # Three passes: torch has no vector code for int32 * float32 in one.
        pre = estimates[:r].copy_(products[:r, :m])
        yield part, torch.addcmul(b_M, pre.mul_(x_scale_N1[part]), W_scale_M, out=pre)


def _quantise_weights(W_MD: Tensor, spread_D: Tensor, wide: int, tall: int, block: int = 256) -> tuple[Tensor, Tensor]:
    """int8 [M, D], padded with zeros to [tall, wide], and the scale [M] of each row; in blocks that stay in cache."""
    m, d = W_MD.shape
    W_q = torch.zeros(tall, wide, dtype=torch.int8)
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
