"""The training loss of one coder on one batch.

Every term is a sum over tokens divided by a constant, so losses add up over micro-batches and ranks. A term that is
not such a sum, like the penalty of jumprelu, is left to its activation. Legend: N tokens, M latents, E output width.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes, encode_topk, first
from skipcoder.trainer.coder.activations.base import Step
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import LossConfig

MULTI_TOPK, MULTI_TOPK_WEIGHT = 4, 1 / 8


class Losses(NamedTuple):
    """The losses of a batch."""

    total: Tensor
    """The sum to minimise."""
    parts: dict[str, Tensor]
    """`fvu`, the error with k latents, and the other terms."""
    codes: Codes
    """Codes of the k latents."""


def losses(
    coder: SparseCoder,
    cfg: LossConfig,
    step: Step,
    x_ND: Tensor,
    y_NE: Tensor,
    variance: float,
    dead_M: Tensor | None = None,
    lap: Callable[[str], None] = lambda phase: None,
) -> Losses:
    """Return the losses of some or all of the tokens of a global batch.

    `step`: what the coder's activation does in this step; `variance`: the denominator, the tokens of the global batch
    times the variance of a token; `dead_M`: indices of the dead latents; `lap` is called when a phase ends.
    """
    parts: dict[str, Tensor] = {}
    if cfg.multi_topk:
        wide = coder.encode(x_ND, min(MULTI_TOPK * step.k, coder.cfg.width))
        codes = first(wide, step.k)
    else:
        codes = step.encode(x_ND)
    lap("encode")
    affine = coder.affine(x_ND)

    def error_of(codes: Codes) -> Tensor:
        return y_NE - sparse_decode(codes, coder.W_dec, affine)

    error_NE = error_of(codes)
    fvu = error_NE.square().sum() / variance
    total = fvu
    if coder.cfg.prefixes:
        shorter = [error_of(_prefix(codes, p)).square().sum() / variance for p in coder.cfg.prefixes]
        parts |= {f"fvu_{p}": loss.detach() for p, loss in zip(coder.cfg.prefixes, shorter, strict=True)}
        total = (fvu + sum(shorter)) / (1 + len(shorter))
    if cfg.multi_topk:
        parts["multi_topk"] = MULTI_TOPK_WEIGHT * error_of(wide).square().sum() / variance
    if cfg.auxk and dead_M is not None:
        parts["auxk"] = cfg.auxk * auxk(coder, x_ND, error_NE.detach(), dead_M) / variance
    total = total + sum(term for term in parts.values() if term.requires_grad)
    lap("decode")
    return Losses(total, {"fvu": fvu, **parts}, codes)


def _prefix(codes: Codes, width: int) -> Codes:
    """Return the codes with latents from `width` on at 0 (Matryoshka: Bussmann et al., arXiv 2503.17547)."""
    return codes._replace(values=torch.where(codes.indices < width, codes.values, 0))


def auxk(coder: SparseCoder, x_ND: Tensor, error_NE: Tensor, dead_M: Tensor) -> Tensor:
    """Return the squared error of the dead latents' prediction of the error (Gao et al., arXiv 2406.04093), weighted by
    how many are dead. The gradient reaches the dead latents' encoder and decoder, but not b_dec or the skip."""
    if not len(dead_M):
        return error_NE.new_zeros(())
    most = coder.d_out // 2
    b_pre = None if coder.b_pre is None else coder.b_pre.detach()
    W_enc, b_enc, W_dec = (p.index_select(0, dead_M) for p in (coder.W_enc, coder.b_enc, coder.W_dec))
    codes = encode_topk(x_ND.to(W_enc.dtype), W_enc, b_enc, min(most, len(dead_M)), b_pre, coder.search)
    predicted_NE = sparse_decode(codes, W_dec, torch.zeros_like(coder.b_dec))
    return min(len(dead_M) / most, 1) * (error_NE - predicted_NE).square().sum()
