"""The sparse operations under encode and decode: sums and dot products of chosen rows, and the one list per step that
every gradient reads: the tokens on which each latent fired, in order.

Each call runs in Triton (`gpu/rows.py`) on CUDA tensors, and by torch's embedding bags otherwise and in float64. The
operations are registered with torch.library, so that torch.compile takes each as one node.

Legend: N tokens, K active latents per token, L entries (token, latent) in all, M latents, D width. Choices are either
K per token, [N, K], or flat, [L], with `offsets` [N]: where each token's entries begin.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.entries import Entries


class ByLatent(Entries):
    """The entries of a batch of codes sorted by latent, and the sums that they make."""

    def sum_rows(self, weights: Tensor, rows_ND: Tensor) -> Tensor:
        """[M, D]: for each latent, the sum over its entries of weight * row of the entry's token."""
        result: Tensor = sum_rows(*self, weights, rows_ND)
        return result

    def sum_weights(self, weights: Tensor) -> Tensor:
        """[M]: for each latent, the sum of its entries' weights."""
        one_row = self._replace(token_L=torch.zeros_like(self.token_L))
        return one_row.sum_rows(weights, weights.new_ones(1, 1)).squeeze(1)

    def counts(self, flags: Tensor) -> Tensor:
        """int64 [M]: for each latent, how many of its entries are flagged."""
        total_L = flags.flatten()[self.entry_L].cumsum(0, dtype=torch.int64)
        before_M = torch.cat([total_L.new_zeros(1), total_L])[self.starts_M]
        return torch.cat([before_M[1:], total_L[-1:]]) - before_M if len(total_L) else before_M


def by_latent(indices: Tensor, m: int, offsets: Tensor | None = None) -> ByLatent:
    """Sort the entries of [N, K] or flat indices by latent."""
    on_gpu, latents = in_triton(indices), indices.flatten()
    if on_gpu:  # a radix sort takes a pass for every byte
        latents = latents.to(torch.int16 if m <= 2**15 else torch.int32)
    latents, entry = torch.sort(latents, stable=True)
    # Not by bincount, whose length depends on the data: torch.compile would break the graph.
    starts = torch.searchsorted(latents, torch.arange(m, dtype=latents.dtype, device=indices.device))
    order = ByLatent(entry, token_of_entry(indices, offsets)[entry], starts)
    if not on_gpu:
        return order
    from skipcoder.kernels.gpu import latents as gpu

    return ByLatent(*order[:3], *gpu.cut(starts, len(entry)))


def token_of_entry(indices: Tensor, offsets: Tensor | None = None) -> Tensor:
    """int64 [L]: the token of each entry."""
    entries = torch.arange(indices.numel(), device=indices.device)
    if offsets is None:
        return entries // indices.shape[1]
    return torch.searchsorted(offsets, entries, right=True) - 1


@torch.library.custom_op("skipcoder::sum_rows", mutates_args=())
def sum_rows(
    entry_L: Tensor, token_L: Tensor, starts_M: Tensor, latent_S: Tensor | None, before_M: Tensor | None,
    partial_before_M: Tensor | None, weights: Tensor, rows_ND: Tensor,
) -> Tensor:  # fmt: skip
    """[M, D] in the dtype of the rows: see ByLatent, whose fields come first."""
    if not len(token_L):
        return rows_ND.new_zeros(len(starts_M), rows_ND.shape[1])
    if in_triton(rows_ND):
        from skipcoder.kernels.gpu import latents as gpu

        latents = ByLatent(entry_L, token_L, starts_M, latent_S, before_M, partial_before_M)
        return gpu.sum_rows(latents, weights, rows_ND).to(rows_ND.dtype)
    weights_L = weights.flatten()[entry_L].to(rows_ND.dtype)
    return F.embedding_bag(token_L, rows_ND, starts_M, mode="sum", per_sample_weights=weights_L)


@sum_rows.register_fake
def _(
    entry_L: Tensor, token_L: Tensor, starts_M: Tensor, latent_S: Tensor | None, before_M: Tensor | None,
    partial_before_M: Tensor | None, weights: Tensor, rows_ND: Tensor,
) -> Tensor:  # fmt: skip
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
