"""The training loss of one coder on one batch.

Every term is a sum over tokens divided by a constant, so losses add up over micro-batches and ranks. A term that is
not such a sum, like the penalty of jumprelu, is left to its activation. Of a coder that writes several sides, every
term is the mean over the sides, each measured by its own variance.

Legend: N tokens, M latents, E output width, B reconstructions, S sides.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.decode import sparse_decode
from skipcoder.kernels.encode import Codes, encode_topk
from skipcoder.kernels.squared_error import squared_error
from skipcoder.trainer.coder.activations.base import Step
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import LossConfig

MULTI_TOPK, MULTI_TOPK_WEIGHT = 4, 1 / 8


class Losses(NamedTuple):
    """The losses of a batch."""

    total: Tensor
    """The sum to minimise."""
    parts: dict[str, Tensor]
    """`fvu`, the error with k latents; where there are several sides, `fvu_side_0` ...; and the other terms."""
    fired_M: Tensor
    """int64: on how many tokens each latent is one of the k and fires."""


class Written(NamedTuple):
    """The sides that a coder writes, in the order in which its rows hold them."""

    widths: Sequence[int]
    variances: Sequence[float]
    """Of each side the denominator: the tokens of the global batch times the variance of a token."""
    summed: bool = False
    """Whether terms add up over the sides, rather than being their mean."""

    def fvus(self, squares_BS: Tensor) -> list[Tensor]:
        """Return each side's part [B] of squared errors, divided by its denominator."""
        return [squares_BS[:, s] / variance for s, variance in enumerate(self.variances)]

    def total(self, of_sides: Sequence[Tensor]) -> Tensor:
        """Return the mean, or the sum; of one side, the term itself."""
        if len(of_sides) == 1:
            return of_sides[0]
        stacked = torch.stack(list(of_sides))
        return stacked.sum(0) if self.summed else stacked.mean(0)


def losses(
    coder: SparseCoder,
    cfg: LossConfig,
    step: Step,
    x_ND: Tensor,
    y_NE: Tensor,
    sides: Written,
    dead_M: Tensor | None = None,
    lap: Callable[[str], None] = lambda phase: None,
    meet: Callable[[Tensor], Tensor] | None = None,
) -> Losses:
    """Return the losses of some or all of the tokens of a global batch.

    `step`: what the coder's activation does in this step; `dead_M`: whether each latent is dead, None to leave AuxK
    out; `lap` is called when a phase ends; `meet`: takes what the coder writes, returns what it and others
    write to the same sides.
    """
    k, wide, prefixes = step.k, cfg.multi_topk, coder.cfg.prefixes or []
    codes = coder.encode(x_ND, min(MULTI_TOPK * k, coder.cfg.width)) if wide else step.encode(x_ND)
    lap("encode")
    # One decode for all reconstructions: of each prefix, of the k latents, of 4 k (Multi-TopK).
    last = len(prefixes)
    block = _blocks(codes, coder.latents.start, prefixes, k) if prefixes or wide else None
    base = coder.affine(x_ND)
    error = None
    if meet is not None:
        with torch.no_grad():
            own = codes._replace(values=codes.values.detach())
            error = y_NE - meet(sparse_decode(own, coder.W_dec.detach(), base.detach()))
    squares, errors = squared_error(
        codes, coder.W_dec, base, y_NE, block, 1 + last + wide, coder.shard, sides.widths, error
    )
    of_sides = sides.fvus(squares)
    terms = sides.total(of_sides)
    parts = {"fvu": terms[last]} | {f"fvu_{p}": terms[i].detach() for i, p in enumerate(prefixes)}
    if len(of_sides) > 1:
        parts |= {f"fvu_side_{s}": fvu[last].detach() for s, fvu in enumerate(of_sides)}
    total = terms[: last + 1].mean() if prefixes else parts["fvu"]  # Matryoshka: Bussmann et al., arXiv 2503.17547
    if wide:
        parts["multi_topk"] = MULTI_TOPK_WEIGHT * terms[last + 1]
        total = total + parts["multi_topk"]
    if cfg.auxk:
        missed = torch.zeros_like(squares[:1]) if dead_M is None else auxk(coder, x_ND, errors[last], dead_M, sides)
        (parts["auxk"],) = sides.total(sides.fvus(cfg.auxk * missed))
        total = total + parts["auxk"]
    lap("decode")
    fires = codes.values.detach() > 0
    return Losses(
        total, parts, codes.by_latent.counts(fires & (block <= last) if wide and block is not None else fires)
    )


def _blocks(codes: Codes, first: int, prefixes: list[int], k: int) -> Tensor:
    """Return the first reconstruction in which each entry takes part; those after the k largest come last. `first`: the
    latent of index 0."""
    block = torch.zeros_like(codes.indices)
    for prefix in prefixes:
        block += codes.indices >= prefix - first
    if codes.place is not None:
        block[codes.place >= k] = len(prefixes) + 1
    elif codes.offsets is None:
        block[:, k:] = len(prefixes) + 1
    return block


def auxk(coder: SparseCoder, x_ND: Tensor, error_NE: Tensor, dead_M: Tensor, sides: Written) -> Tensor:
    """Return the squared error [1, S] of the dead latents' prediction of the error (Gao et al., arXiv 2406.04093),
    weighted by how many are dead. The gradient reaches their encoder and decoder, but not b_dec or the skip."""
    most = (sides.widths[0] if sides.widths else coder.d_out) // 2
    b_pre = None if coder.b_pre is None else coder.b_pre.detach()
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    W_enc, b_enc, W_dec = coder.W_enc, coder.b_enc, coder.W_dec
    dead = dead_M.sum()
    if coder.shard is not None:
        coder.shard.group.sum(dead)
    if in_triton(W_dec):  # all latents compete, as counting the dead would wait; the living are far below 0
        b_enc, k = torch.where(dead_M, b_enc, -torch.inf), min(most, coder.cfg.width)
    else:
        k = min(most, int(dead))
        if not k:
            return error_NE.new_zeros(1, max(1, len(sides.widths)))
        found = dead_M.nonzero()[:, 0]
        W_enc, b_enc, W_dec = (p.index_select(0, found) for p in (W_enc, b_enc, W_dec))
    codes = encode_topk(x_ND.to(W_enc.dtype), W_enc, b_enc, k, b_pre, coder.search, coder.shard)
    none = coder.b_dec.new_zeros(coder.d_out)
    squares, _ = squared_error(codes, W_dec, none, error_NE, peers=coder.shard, widths=sides.widths)
    return (dead.to(squares) / most).clamp(max=1) * squares
