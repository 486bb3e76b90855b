"""The one list per step that every sparse gradient reads: which tokens each latent fired on, in order.

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
        weights = weights_NK.flatten()[entry].to(rows_ND.dtype)
        if not len(entry):
            return rows_ND.new_zeros(self.m, rows_ND.shape[1])
        return F.embedding_bag(token, rows_ND, starts, mode="sum", per_sample_weights=weights)

    def sum_weights(self, weights_NK: Tensor) -> Tensor:
        """[M]: for each latent, the sum of its entries' weights."""
        entry, _, _ = self._sorted
        ones = weights_NK.new_ones(1, 1)
        weights = weights_NK.flatten()[entry]
        if not len(entry):
            return weights_NK.new_zeros(self.m)
        zeros = torch.zeros_like(entry)
        _, _, starts = self._sorted
        return F.embedding_bag(zeros, ones, starts, mode="sum", per_sample_weights=weights)[:, 0]


def gather_dot(rows_ND: Tensor, W_MD: Tensor, indices_NK: Tensor) -> Tensor:
    """[N, K]: dot product of each token's row with its chosen rows of W, never holding [N, K, D]."""
    n, k = indices_NK.shape
    if not n:
        return rows_ND.new_zeros(n, k)
    offsets = torch.arange(0, n * k, k, device=indices_NK.device)
    bag = torch.arange(n, device=indices_NK.device).repeat_interleave(k)
    flat = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        rows_ND.contiguous(), W_MD, indices_NK.flatten(), offsets, bag, 0
    )
    return flat.view(n, k)
