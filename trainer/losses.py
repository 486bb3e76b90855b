"""The training loss of one coder on one batch.

Every term is a sum over tokens divided by a constant, so losses add up over micro-batches and ranks; jumprelu's
penalty, which is not, is left to who sees the whole batch. Legend: N tokens, M latents, E output width.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes, encode, first, subset
from skipcoder.trainer.coder import SparseCoder
from skipcoder.trainer.config import Activation, LossConfig
from skipcoder.trainer.ranks import ALONE, Ranks
from torch import Tensor

MULTI_TOPK, MULTI_TOPK_WEIGHT = 4, 1 / 8


class Losses(NamedTuple):
    """What a batch gives."""

    total: Tensor
    """To be minimised."""
    parts: dict[str, Tensor]
    """`fvu`, the error of the k latents, and the other terms."""
    codes: Codes
    """Of the k latents."""
    l0: Tensor | None = None
    """jumprelu: latents that fire on these tokens, over those of the batch; with gradients to the thresholds."""


def losses(
    coder: SparseCoder,
    cfg: LossConfig,
    x_ND: Tensor,
    y_NE: Tensor,
    batch_tokens: int,
    token_variance: float,
    k: int,
    dead_M: Tensor | None = None,
    lap: Callable[[str], None] = lambda phase: None,
    ranks: Ranks = ALONE,
) -> Losses:
    """Of some or all of the `batch_tokens` of a global batch; the denominator is that number times the variance per
    token. `dead_M`: indices of the dead latents. `lap` is told when a phase ends."""
    variance = batch_tokens * token_variance
    parts: dict[str, Tensor] = {}
    l0 = None
    if cfg.multi_topk:
        wide = coder.encode(x_ND, min(MULTI_TOPK * k, coder.cfg.width))
        codes = first(wide, k)
    elif coder.cfg.activation == Activation.jumprelu:
        codes, fired = coder.encode_jumprelu(x_ND)
        l0 = fired / batch_tokens
    elif coder.cfg.activation == Activation.batchtopk:
        codes = batchtopk(coder, x_ND, k, ranks)
    else:
        codes = coder.encode(x_ND, k)
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
    return Losses(total, {"fvu": fvu, **parts}, codes, l0)


def batchtopk(coder: SparseCoder, x_ND: Tensor, k: int, ranks: Ranks) -> Codes:
    """The latents that are largest in the batch of all ranks, k per token. Each rank offers a quarter more than its
    share, since tokens are dealt at random; should one have had even more, all offer as much as could be needed."""
    if ranks.size == 1:
        return coder.encode(x_ND, k)
    tokens = int(ranks.total(len(x_ND)))
    for share in (1.25, tokens / max(len(x_ND), 1)):
        offer = min(math.ceil(share * k), coder.cfg.width)
        codes = coder.encode(x_ND, offer)
        values = codes.values.detach()
        least = ranks.gather(values).sort(descending=True).values[: tokens * k][-1:].sum()  # 0 if none is positive
        gave_all = len(values) == offer * len(x_ND) and bool((values > least).all()) and len(values) > 0
        if not ranks.any(gave_all):
            break
    return subset(codes, values >= least)


def _prefix(codes: Codes, width: int) -> Codes:
    """The codes with latents from `width` on at 0 (Matryoshka: Bussmann et al., arXiv 2503.17547)."""
    return codes._replace(values=torch.where(codes.indices < width, codes.values, 0))


def auxk(coder: SparseCoder, x_ND: Tensor, error_NE: Tensor, dead_M: Tensor) -> Tensor:
    """Squared error of the dead latents' prediction of the error (Gao et al., arXiv 2406.04093), weighted by how many
    are dead. The gradient reaches the dead latents' encoder and decoder, not b_dec or the skip."""
    if not len(dead_M):
        return error_NE.new_zeros(())
    most = coder.d_out // 2
    b_pre = None if coder.b_pre is None else coder.b_pre.detach()
    W_enc, b_enc, W_dec = (p.index_select(0, dead_M) for p in (coder.W_enc, coder.b_enc, coder.W_dec))
    codes = encode(x_ND.to(W_enc.dtype), W_enc, b_enc, min(most, len(dead_M)), b_pre, **vars(coder.encoding))
    predicted_NE = sparse_decode(codes, W_dec, torch.zeros_like(coder.b_dec))
    return min(len(dead_M) / most, 1) * (error_NE - predicted_NE).square().sum()
