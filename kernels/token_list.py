"""The sparse operations under encode and decode, and the one list per step that every gradient reads: which tokens
each latent fired on, in order.

On CUDA devices they run in Triton (`gpu.py`), elsewhere, and in float64, as torch's embedding bags; the tensors decide,
at each call.

Legend: N tokens, K active latents per token, M latents, D width.
"""

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F


class TokenList:
    """The N*K (token, latent) entries of a batch of codes, sorted by latent; ties keep token order, so
    every sum over a latent's tokens has a fixed order. Built on first use, then shared."""

    def __init__(self, indices_NK: Tensor, m: int) -> None:
        self.indices_NK = indices_NK
        self.m = m

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor, Tensor]:
        latents, entry = torch.sort(self.indices_NK.flatten(), stable=True)
        counts = torch.bincount(latents, minlength=self.m)
        starts = counts.cumsum(0) - counts
        return entry, entry // self.indices_NK.shape[1], starts

    def sum_rows(self, weights_NK: Tensor, rows_ND: Tensor) -> Tensor:
        """[M, D]: for each latent, the sum over its entries of weight * row of the entry's token."""
        entry, token, starts = self._sorted
        if not len(entry):
            return rows_ND.new_zeros(self.m, rows_ND.shape[1])
        weights = weights_NK.flatten()[entry]
        if _in_triton(rows_ND):
            from skipcoder.kernels import gpu

            return gpu.sum_rows(token, weights, starts, rows_ND).to(rows_ND.dtype)
        return F.embedding_bag(token, rows_ND, starts, mode="sum", per_sample_weights=weights.to(rows_ND.dtype))

    def sum_weights(self, weights_NK: Tensor) -> Tensor:
        """[M]: for each latent, the sum of its entries' weights."""
        entry, _, starts = self._sorted
        if not len(entry):
            return weights_NK.new_zeros(self.m)
        one, same_row = weights_NK.new_ones(1, 1), torch.zeros_like(entry)
        weights = weights_NK.flatten()[entry]
        return F.embedding_bag(same_row, one, starts, mode="sum", per_sample_weights=weights)[:, 0]


def gather_sum(indices_NK: Tensor, weights_NK: Tensor, W_MD: Tensor) -> Tensor:
    """[N, D]: for each token, the sum of its chosen rows of W, weighted."""
    if not len(indices_NK):
        return W_MD.new_zeros(0, W_MD.shape[1])
    if _in_triton(W_MD):
        from skipcoder.kernels import gpu

        return gpu.gather_sum(indices_NK, weights_NK, W_MD)
    return F.embedding_bag(indices_NK, W_MD, mode="sum", per_sample_weights=weights_NK.to(W_MD.dtype))


def gather_dot(rows_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """[N, K]: dot product of each token's row with its chosen rows of W, never holding [N, K, D]."""
    n, k = indices_NK.shape
    if not n:
        return rows_ND.new_zeros(n, k)
    if _in_triton(rows_ND):
        from skipcoder.kernels import gpu

        return gpu.gather_dot(rows_ND, W_MD, indices_NK)
    offsets = torch.arange(0, n * k, k, device=rows_ND.device)
    bag = torch.arange(n, device=rows_ND.device).repeat_interleave(k)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND.contiguous(), W_MD, indices_NK.flatten(), offsets, bag, 0
    )
    return flat.view(n, k)


def _in_triton(rows: Tensor) -> bool:
    return rows.is_cuda and rows.dtype != torch.float64
