"""encode: the latents that fire on each token, and their gradients.

    pre = W_enc (x - b_pre) + b_enc,   f = select(ReLU(pre))

There is one operation for each way of selecting (select.py). The [N, M] pre-activations are made in chunks and never
kept. Values have the dtype of `x_ND` whatever the search, equal values are taken by rising index, and a latent with
value 0 gets no gradient.

Legend: N tokens, K active latents, M latents, D input width, L entries of a flat batch.
"""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function

from skipcoder.kernels import select
from skipcoder.kernels.preactivations import EXACT, Search
from skipcoder.kernels.rows import ByLatent, by_latent, gather_sum, token_of_entry
from skipcoder.kernels.select import Chosen
from skipcoder.kernels.unsummed import encoder_gradients


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
    place: Tensor | None = None
    """See Chosen."""

    @property
    def token(self) -> Tensor:
        """The token of each entry, shaped like the values."""
        return token_of_entry(self.indices, self.offsets).view(self.indices.shape)

    def padded(self) -> tuple[Tensor, Tensor]:
        """Values and indices as [N, K], where K is the most that any token has; padded with value 0 of latent 0."""
        if self.offsets is None:
            return self.values, self.indices
        token, n = self.token, len(self.offsets)
        place = torch.arange(len(token), device=token.device) - self.offsets[token]
        width = int(place.max()) + 1 if len(place) else 1
        values, indices = self.values.new_zeros(n, width), self.indices.new_zeros(n, width)
        return values.index_put((token, place), self.values), indices.index_put((token, place), self.indices)


class Peers(Protocol):
    """Processes of which each holds some of a coder's latents (trainer/coder/shard.py). What they choose together is
    what one process would; each gets the entries of its own latents, flat, by token."""

    def topk(self, mine: Chosen, k: int) -> Chosen:
        """From the k largest of each process, or all if it has fewer, those among the k largest."""

    def batchtopk(self, mine: Chosen, k: int) -> Chosen:
        """From the N k largest of the batch of each process those among the N k largest."""

    def sum(self, partial: Tensor) -> Tensor:
        """The sum over the processes, the same bits in all."""


def encode_topk(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    search: Search = EXACT,
    peers: Peers | None = None,
) -> Codes:
    """Codes [N, K]: the k largest latents of each token. ValueError unless 1 <= k <= M. With peers flat."""
    centred_ND, search = _centred(x_ND, b_pre_D, search)
    offered = k if peers is None else min(k, len(W_enc_MD))
    if offered or peers is None:
        chosen = select.topk(centred_ND, W_enc_MD.detach(), b_enc_M.detach(), offered, search)
    else:
        chosen = Chosen(x_ND.new_empty(len(x_ND), 0), x_ND.new_empty(len(x_ND), 0, dtype=torch.int64), None)
    if peers is not None:
        chosen = peers.topk(chosen, k)
    return _codes(x_ND, W_enc_MD, b_enc_M, b_pre_D, centred_ND, chosen)


def encode_groupmax(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, b_pre_D: Tensor | None = None, search: Search = EXACT
) -> Codes:
    """Codes [N, K]: the largest latent in each of k equal runs of latents. ValueError unless k divides M."""
    centred_ND, search = _centred(x_ND, b_pre_D, search)
    chosen = select.groupmax(centred_ND, W_enc_MD.detach(), b_enc_M.detach(), k, search)
    return _codes(x_ND, W_enc_MD, b_enc_M, b_pre_D, centred_ND, chosen)


def encode_batchtopk(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    search: Search = EXACT,
    hint: Tensor | None = None,
    peers: Peers | None = None,
) -> Codes:
    """Flat codes: the N k largest positive latents of the whole batch. For `hint` see `select.batchtopk`."""
    centred_ND, search = _centred(x_ND, b_pre_D, search)
    if peers is None:
        chosen = select.batchtopk(centred_ND, W_enc_MD.detach(), b_enc_M.detach(), k, search, hint)
    else:  # few of the latents here exceed the hint
        offered = min(k, len(W_enc_MD))
        chosen = peers.batchtopk(select.batchtopk(centred_ND, W_enc_MD.detach(), b_enc_M.detach(), offered, search), k)
    return _codes(x_ND, W_enc_MD, b_enc_M, b_pre_D, centred_ND, chosen)


def encode_above(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    threshold_M: Tensor,
    b_pre_D: Tensor | None = None,
    search: Search = EXACT,
) -> Codes:
    """Flat codes: every latent that exceeds both 0 and its threshold; see `select.above`."""
    centred_ND, search = _centred(x_ND, b_pre_D, search)
    chosen = select.above(centred_ND, W_enc_MD.detach(), b_enc_M.detach(), threshold_M, search)
    return _codes(x_ND, W_enc_MD, b_enc_M, b_pre_D, centred_ND, chosen)


def subset(codes: Codes, keep_L: Tensor) -> Codes:
    """The entries of flat codes that `keep_L` selects."""
    assert codes.offsets is not None
    indices, token = codes.indices[keep_L], codes.token[keep_L]
    offsets = torch.searchsorted(token, torch.arange(len(codes.offsets), device=token.device))
    return Codes(codes.values[keep_L], indices, offsets, by_latent(indices, len(codes.by_latent.starts_M), offsets))


def encode_reference(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, b_pre_D: Tensor | None = None, activation: str = "topk",
    threshold_M: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The formula on dense tensors [N, M], with autograd; for tests (float64)."""
    n, m = x_ND.shape[0], W_enc_MD.shape[0]
    pre = torch.relu((x_ND if b_pre_D is None else x_ND - b_pre_D) @ W_enc_MD.T + b_enc_M)
    if threshold_M is not None:
        return pre * (pre > threshold_M)
    shape = {"topk": (n, m), "groupmax": (n * k, m // k), "batchtopk": (1, n * m)}[activation]
    count = {"topk": k, "groupmax": 1, "batchtopk": n * k}[activation]
    kept = pre.detach().reshape(shape).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return pre * torch.zeros(shape).to(pre).scatter_(1, kept, 1).view(n, m)


def _centred(x_ND: Tensor, b_pre_D: Tensor | None, search: Search) -> tuple[Tensor, Search]:
    """x - b_pre without gradients, and the search with its centre shifted likewise."""
    if b_pre_D is None:
        return x_ND.detach(), search
    if search.centre_D is not None:
        search = search._replace(centre_D=search.centre_D - b_pre_D.detach())
    return x_ND.detach() - b_pre_D.detach(), search


def _codes(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_pre_D: Tensor | None, centred_ND: Tensor, chosen: Chosen
) -> Codes:
    order = by_latent(chosen.indices, len(W_enc_MD), chosen.offsets)
    codes = Codes(torch.relu(chosen.values), chosen.indices, chosen.offsets, order, chosen.place)
    values: Tensor = _Values.apply(x_ND, W_enc_MD, b_enc_M, b_pre_D, centred_ND, codes)  # type: ignore[no-untyped-call]
    return codes._replace(values=values)


class _Values(Function):
    """The values of codes already chosen, as a function of inputs and encoder."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, b_pre_D: Tensor | None, centred_ND: Tensor,
        codes: Codes,
    ) -> Tensor:  # fmt: skip
        values, indices, offsets, order, _ = codes
        ctx.save_for_backward(centred_ND, W_enc_MD, values, indices, offsets, *order)
        ctx.has_b_pre = b_pre_D is not None
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_MD, values, indices, offsets, *order = ctx.saved_tensors
        grad = torch.where(values > 0, grad, 0)
        grad_x = grad_W = grad_b = grad_b_pre = None
        wants_x, wants_W, wants_b, wants_b_pre = ctx.needs_input_grad[:4]
        if wants_x:
            grad_x = gather_sum(indices, grad, W_enc_MD, offsets)
        if wants_W:
            grad_W, grad_b = encoder_gradients(W_enc_MD, ByLatent(*order), grad, centred_ND, wants_b or wants_b_pre)
        elif wants_b or wants_b_pre:
            grad_b = ByLatent(*order).sum_weights(grad)
        if ctx.has_b_pre and wants_b_pre:
            grad_b_pre = -(grad_b @ W_enc_MD)  # O(M D), where the sum over tokens would be O(N K D)
        return grad_x, grad_W, grad_b if wants_b else None, grad_b_pre, None, None
