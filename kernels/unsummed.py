"""Gradients of encoder and decoder that only the optimiser's step makes.

The gradient of either matrix is, for each latent, a weighted sum of rows of the latent's tokens. Clipping needs its
length before the optimiser needs the gradient. On a GPU, where latents have few tokens, it costs less to form the sums
twice than to write, scale and read a matrix; where they have many, the first sums are kept and scaled as they are read.
Within `leaving_unsummed`, backward passes on a GPU leave the matrices it is given without `.grad`, and note what the
sums are made of.

Legend: L entries (token, latent) of a batch, M latents, D width of a matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.rows import ByLatent

KEPT_FROM = 9
"""Tokens per latent from which sums are kept (where both cost as much on an H100)."""


class RowSums(NamedTuple):
    """A gradient [M, D]: scale * the sum over each latent's entries of weight * row of the entry's token."""

    latents: ByLatent
    weights: Tensor
    """In the codes' own order."""
    rows_ND: Tensor
    scale: Tensor
    """0-d."""
    squares_M: Tensor
    """Square of the length of each latent's sum."""
    partial_PD: Tensor
    """Partial sums of the latents that fire most (gpu/latents.py)."""
    sums_MD: Tensor | None
    """The sums, without the scale, if they are kept."""

    def dense(self) -> Tensor:
        """Return the gradient as a float32 matrix."""
        from skipcoder.kernels.gpu import latents as gpu

        kept = self.sums_MD
        return self.scale * (gpu.sum_rows(self.latents, self.weights, self.rows_ND) if kept is None else kept)


@dataclass
class Pending:
    """What backward passes leave of one matrix's gradient."""

    unit: bool = False
    """Whether only what lies across the matrix's rows counts (they are kept at unit norm)."""
    rows_ND: Tensor | None = None
    """The inputs in a dtype of fewer bytes that holds them exactly, to be read instead of them."""
    sums: list[RowSums] = field(default_factory=list)


_pending: dict[int, Pending] = {}


@contextmanager
def leaving_unsummed(*matrices: tuple[Tensor, Pending]) -> Iterator[None]:
    """Let backward passes on a GPU append the gradients of these matrices to their Pending."""
    keys = {matrix.data_ptr(): pending for matrix, pending in matrices if in_triton(matrix)}
    _pending.update(keys)
    try:
        yield
    finally:
        for key in keys:
            del _pending[key]


def encoder_gradients(
    W_MD: Tensor, latents: ByLatent, weights: Tensor, rows_ND: Tensor, bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradient of W, None if it is left unsummed, and if asked for that of the bias: each latent's sums of
    rows and of weights."""
    pending = _pending.get(W_MD.data_ptr()) if _pending else None
    if pending is None:
        return latents.sum_rows(weights, rows_ND), latents.sum_weights(weights) if bias else None
    from skipcoder.kernels.gpu import latents as gpu

    rows_ND = rows_ND if pending.rows_ND is None else pending.rows_ND
    found = gpu.measure(latents, weights, rows_ND, keep=_many(latents))
    one = weights.new_ones((), dtype=torch.float32)
    pending.sums.append(RowSums(latents, weights, rows_ND, one, found.squares_M, found.partial_PD, found.sums_MD))
    return None, found.weights_M


def decoder_gradients(
    W_MD: Tensor, latents: ByLatent, weights: Tensor, rows_ND: Tensor, scale: Tensor
) -> Tensor | None:
    """If the gradient of W is to be left unsummed, do so and return that of the weights, scale * row . W[latent]: the
    same pass over the rows gives both. Otherwise return None."""
    pending = _pending.get(W_MD.data_ptr()) if _pending else None
    if pending is None:
        return None
    from skipcoder.kernels.gpu import latents as gpu

    found = gpu.measure(latents, weights, rows_ND, scale, W_MD, pending.unit, _many(latents))
    pending.sums.append(RowSums(latents, weights, rows_ND, scale, found.squares_M, found.partial_PD, found.sums_MD))
    assert found.dots is not None
    return found.dots.view(weights.shape)


def _many(latents: ByLatent) -> bool:
    return len(latents.entry_L) >= KEPT_FROM * len(latents.starts_M)
