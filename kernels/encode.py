"""encode: the latents that fire on each token, and their gradients.

    pre = W_enc (x - b_pre) + b_enc,   f = select(ReLU(pre))

The [N, M] pre-activations are made in chunks and never kept. Legend: N tokens, K active latents, M latents,
D input width, L entries of a flat batch.
"""

from typing import Any, NamedTuple

import torch
from skipcoder.kernels.preactivations import MODES
from skipcoder.kernels.rows import ByLatent, by_latent, gather_sum, token_of_entry
from skipcoder.kernels.select import ACTIVATIONS, FLAT, select
from torch import Tensor
from torch.autograd import Function


class Codes(NamedTuple):
    """Sparse activations of a batch of tokens: K for each, or flat with offsets where rows differ in length."""

    values: Tensor
    """[N, K] or [L], at least 0; topk: descending."""
    indices: Tensor
    """int64, the latents."""
    offsets: Tensor | None
    """int64 [N], where each token's entries begin; None where each has K."""
    by_latent: ByLatent
    """The same entries by latent, for gradients."""

    @property
    def token(self) -> Tensor:
        """The token of each entry, shaped like the values."""
        return token_of_entry(self.indices, self.offsets).view(self.indices.shape)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Values and indices as [N, K], K that of the token with most; what is missing is value 0 of latent 0."""
        if self.offsets is None:
            return self.values, self.indices
        token, n = self.token, len(self.offsets)
        place = torch.arange(len(token), device=token.device) - self.offsets[token]
        width = int(place.max()) + 1 if len(place) else 1
        values, indices = self.values.new_zeros(n, width), self.indices.new_zeros(n, width)
        return values.index_put((token, place), self.values), indices.index_put((token, place), self.indices)


def encode(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    activation: str = "topk",
    mode: str = "float32",
    nominated: float = 1.25,
    chunk_elements: int = 2**24,
    centre_D: Tensor | None = None,
    spread_D: Tensor | None = None,
    threshold_M: Tensor | None = None,
) -> Codes:
    """Encode tokens; `select` says what activation does, `preactivations` what mode, centre and spread do.

    Values are those of the dtype of `x_ND` whatever the mode. Equal values are taken by rising index. A latent with
    value 0 gets no gradient. `chunk_elements` bounds the pre-activations held at once.
    """
    m = W_enc_MD.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"k={k} must be between 1 and the number of latents, {m}")
    if activation not in ACTIVATIONS or mode not in MODES:
        raise ValueError(f"activation={activation!r}, mode={mode!r}: choose from {ACTIVATIONS} and {MODES}")
    if activation == "groupmax" and m % k:
        raise ValueError(f"groupmax takes the largest of k groups, but {m} latents do not divide by k={k}")
    values, indices, offsets, *order = _Encode.apply(
        x_ND,
        W_enc_MD,
        b_enc_M,
        b_pre_D,
        k,
        activation,
        mode,
        nominated,
        chunk_elements,
        centre_D,
        spread_D,
        threshold_M,
    )
    return Codes(values, indices, offsets if activation in FLAT else None, ByLatent(*order))


def first(codes: Codes, k: int) -> Codes:
    """The codes of the k largest latents out of topk codes with more."""
    values, indices = codes.values[:, :k], codes.indices[:, :k].contiguous()
    return Codes(values, indices, None, by_latent(indices, len(codes.by_latent.starts_M)))


def subset(codes: Codes, keep_L: Tensor) -> Codes:
    """Some of the entries of flat codes."""
    assert codes.offsets is not None
    indices, token = codes.indices[keep_L], codes.token[keep_L]
    offsets = torch.searchsorted(token, torch.arange(len(codes.offsets), device=token.device))
    return Codes(codes.values[keep_L], indices, offsets, by_latent(indices, len(codes.by_latent.starts_M), offsets))


def encode_reference(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, b_pre_D: Tensor | None = None, activation: str = "topk",
    threshold_M: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula, dense [N, M], by autograd; for tests (float64)."""
    n, m = x_ND.shape[0], W_enc_MD.shape[0]
    pre = torch.relu((x_ND if b_pre_D is None else x_ND - b_pre_D) @ W_enc_MD.T + b_enc_M)
    if threshold_M is not None:
        return pre * (pre > threshold_M)
    shape = {"topk": (n, m), "groupmax": (n * k, m // k), "batchtopk": (1, n * m)}[activation]
    count = {"topk": k, "groupmax": 1, "batchtopk": n * k}[activation]
    kept = pre.detach().reshape(shape).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return pre * torch.zeros(shape).to(pre).scatter_(1, kept, 1).view(n, m)


class _Encode(Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_pre_D: Tensor | None, k: int, activation: str,
        mode: str, nominated: float, chunk_elements: int, centre_D: Tensor | None, spread_D: Tensor | None,
        threshold_M: Tensor | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        centred_ND = x_ND if b_pre_D is None else x_ND - b_pre_D
        if centre_D is not None and b_pre_D is not None:
            centre_D = centre_D - b_pre_D
        values, indices, offsets = select(
            centred_ND,
            W_enc_MD,
            b_enc_M,
            k,
            activation,
            mode,
            nominated,
            chunk_elements,
            centre_D,
            spread_D,
            threshold_M,
        )
        values = torch.relu(values)
        ragged = activation in FLAT
        order = by_latent(indices, W_enc_MD.shape[0], offsets if ragged else None)
        ctx.save_for_backward(centred_ND, W_enc_MD, values, indices, offsets, *order)
        ctx.has_b_pre, ctx.ragged = b_pre_D is not None, ragged
        ctx.mark_non_differentiable(indices, offsets, *order)
        return values, indices, offsets, *order

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_MD, values, indices, offsets, *order = ctx.saved_tensors
        latents = ByLatent(*order)
        grad = torch.where(values > 0, grad, 0)
        grad_x = grad_W = grad_b = grad_b_pre = None
        if ctx.needs_input_grad[0]:
            grad_x = gather_sum(indices, grad, W_enc_MD, offsets if ctx.ragged else None)
        if ctx.needs_input_grad[1]:
            grad_W = latents.sum_rows(grad, centred_ND)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_b = latents.sum_weights(grad)
        if ctx.has_b_pre and ctx.needs_input_grad[3]:
            grad_b_pre = -(grad_b @ W_enc_MD)  # O(M D), where the sum over tokens would be O(N K D)
        return grad_x, grad_W, grad_b if ctx.needs_input_grad[2] else None, grad_b_pre, *[None] * 8
