"""The training loss of one coder on one batch.

Every term is a sum over tokens divided by a constant, so losses add up over micro-batches and ranks.
Legend: N tokens, M latents, E output width.
"""

from collections.abc import Callable

import torch
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes, encode, first
from skipcoder.trainer.coder import SparseCoder
from skipcoder.trainer.config import LossConfig
from torch import Tensor

MULTI_TOPK, MULTI_TOPK_WEIGHT = 4, 1 / 8


def losses(
    coder: SparseCoder,
    cfg: LossConfig,
    x_ND: Tensor,
    y_NE: Tensor,
    variance: float,
    dead_M: Tensor | None = None,
    lap: Callable[[str], None] = lambda phase: None,
) -> tuple[dict[str, Tensor], Codes]:
    """The terms to add up, `fvu` first, and the codes of the k latents. `variance`: the denominator, tokens of the
    global batch times variance per token. `dead_M`: indices of the dead latents. `lap` is told when a phase ends."""
    k = coder.cfg.k
    if cfg.multi_topk:
        wide = coder.encode(x_ND, min(MULTI_TOPK * k, coder.cfg.width))
        codes = first(wide, k)
    else:
        codes = coder.encode(x_ND)
    lap("encode")
    affine = coder.affine(x_ND)
    error_NE = y_NE - sparse_decode(codes, coder.W_dec, affine)
    terms = {"fvu": error_NE.square().sum() / variance}
    if cfg.multi_topk:
        wide_error_NE = y_NE - sparse_decode(wide, coder.W_dec, affine)
        terms["multi_topk"] = MULTI_TOPK_WEIGHT * wide_error_NE.square().sum() / variance
    if cfg.auxk and dead_M is not None and len(dead_M):
        terms["auxk"] = cfg.auxk * auxk(coder, x_ND, error_NE.detach(), dead_M) / variance
    lap("decode")
    return terms, codes


def auxk(coder: SparseCoder, x_ND: Tensor, error_NE: Tensor, dead_M: Tensor) -> Tensor:
    """Squared error of the dead latents' prediction of the error (Gao et al., arXiv 2406.04093), weighted by how many
    are dead. The gradient reaches the dead latents' encoder and decoder, not b_dec or the skip."""
    most = coder.d_out // 2
    W_enc, b_enc, W_dec = (p.index_select(0, dead_M) for p in (coder.W_enc, coder.b_enc, coder.W_dec))
    codes = encode(x_ND.to(W_enc.dtype), W_enc, b_enc, min(most, len(dead_M)), coder.b_pre, **vars(coder.encoding))
    predicted_NE = sparse_decode(codes, W_dec, torch.zeros_like(coder.b_dec))
    return min(len(dead_M) / most, 1) * (error_NE - predicted_NE).square().sum()
