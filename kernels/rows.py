"""The sparse operations under encode and decode: sums and dot products of chosen rows, and the one list per step that
every gradient reads: the tokens on which each latent fired, in order.

Each call runs in Triton (`gpu/rows.py`) on CUDA tensors, and by torch's embedding bags otherwise and in float64. The
operations are registered with torch.library, so that torch.compile takes each as one node.

Legend: N tokens, K active latents per token, L entries (token, latent) in all, M latents, D width. Choices are either
K per token, [N, K], or flat, [L], with `offsets` [N]: where each token's entries begin.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcoder.kernels.backend import in_triton


class ByLatent(NamedTuple):
    """The L entries of a batch of codes sorted by latent; ties keep token order, so every sum over a latent's tokens
    has a fixed order."""

    entry_L: Tensor
    """Index of the entry in the codes."""
    token_L: Tensor
    """Token of the entry."""
    starts_M: Tensor
    """Where each latent's entries begin."""

    def sum_rows(self, weights: Tensor, rows_ND: Tensor) -> Tensor:
        """[M, D]: for each latent, the sum over its entries of weight * row of the entry's token."""
        result: Tensor = sum_rows(self.token_L, weights.flatten()[self.entry_L], self.starts_M, rows_ND)
        return result

    def sum_weights(self, weights: Tensor) -> Tensor:
        """[M]: for each latent, the sum of its entries' weights."""
        ones = weights.new_ones(1, 1)
        result: Tensor = sum_rows(
            torch.zeros_like(self.token_L), weights.flatten()[self.entry_L], self.starts_M, ones
        ).squeeze(1)
        return result


def by_latent(indices: Tensor, m: int, offsets: Tensor | None = None) -> ByLatent:
    """Sort the entries of [N, K] or flat indices by latent."""
    latents, entry = torch.sort(indices.flatten(), stable=True)
    # Not by bincount, whose length depends on the data: torch.compile would break the graph.
    starts = torch.searchsorted(latents, torch.arange(m, device=indices.device))
    return ByLatent(entry, token_of_entry(indices, offsets)[entry], starts)


def token_of_entry(indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """int64 [L]: the token of each entry."""
    entries = torch.arange(indices.numel(), device=indices.device)
    if offsets is None:
        return entries // indices.shape[1]
    return torch.searchsorted(offsets, entries, right=True) - 1


@torch.library.custom_op("skipcoder::sum_rows", mutates_args=())
def sum_rows(token_L: Tensor, weights_L: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    """[M, D] in the dtype of the rows: weighted sums of rows over each latent's run in a list sorted by latent."""
    if not len(token_L):
        return rows_ND.new_zeros(len(starts_M), rows_ND.shape[1])
    if in_triton(rows_ND):
        from skipcoder.kernels.gpu import rows as gpu

        return gpu.sum_rows(token_L, weights_L, starts_M, rows_ND).to(rows_ND.dtype)
    return F.embedding_bag(token_L, rows_ND, starts_M, mode="sum", per_sample_weights=weights_L.to(rows_ND.dtype))


@sum_rows.register_fake
def _(token_L: Tensor, weights_L: Tensor, starts_M: Tensor, rows_ND: Tensor) -> Tensor:
    return rows_ND.new_empty(len(starts_M), rows_ND.shape[1])


@torch.library.custom_op("skipcoder::gather_sum", mutates_args=())
def gather_sum(
    indices: Tensor, weights: Tensor, W_MD: Tensor, offsets: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    """[N, D]: for each token, the weighted sum of its chosen rows of W, plus `base` ([D] or [N, D])."""
    n, d = len(indices if offsets is None else offsets), W_MD.shape[1]
    if in_triton(W_MD):
        from skipcoder.kernels.gpu import rows as gpu

        return gpu.gather_sum(indices, weights, W_MD, offsets, base)
    if not indices.numel():
        out = W_MD.new_zeros(n, d)
    else:
        out = F.embedding_bag(indices, W_MD, offsets, mode="sum", per_sample_weights=weights.to(W_MD.dtype))
    return out if base is None else out.add_(base)


@gather_sum.register_fake
def _(
    indices: Tensor, weights: Tensor, W_MD: Tensor, offsets: Tensor | None = None, base: Tensor | None = None
) -> Tensor:
    return W_MD.new_empty(len(indices if offsets is None else offsets), W_MD.shape[1])


@torch.library.custom_op("skipcoder::gather_dot", mutates_args=())
def gather_dot(
    rows_ND: Tensor, W_MD: Tensor, indices: Tensor, offsets: Tensor | None = None, bias_M: Tensor | None = None
) -> Tensor:
    """Dot products of each token's row with its chosen rows of W (plus their biases), shaped like the indices; never
    holds [L, D]."""
    if not indices.numel():
        return rows_ND.new_zeros(indices.shape)
    if in_triton(rows_ND):
        from skipcoder.kernels.gpu import rows as gpu

        token = None if offsets is None else token_of_entry(indices, offsets)
        return gpu.gather_dot(rows_ND, W_MD, indices, token, bias_M)
    starts = torch.arange(0, indices.numel(), indices.shape[1]) if offsets is None else offsets
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND.contiguous(), W_MD, indices.flatten(), starts.to(indices.device), token_of_entry(indices, offsets), 0
    )
    result: Tensor = dots.view(indices.shape)
    return result if bias_M is None else result + bias_M[indices]


@gather_dot.register_fake
def _(
    rows_ND: Tensor, W_MD: Tensor, indices: Tensor, offsets: Tensor | None = None, bias_M: Tensor | None = None
) -> Tensor:
    return rows_ND.new_empty(indices.shape)
