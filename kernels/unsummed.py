"""Gradients of encoder and decoder that are never written to memory.

The gradient of either matrix is, for each latent, a weighted sum of rows of the latent's tokens. On a GPU writing,
reading and scaling such matrices costs more than forming the sums twice: once for their length, which clipping needs,
and once inside the optimiser's step. Within `leaving_unsummed`, backward passes on a GPU leave the matrices it is given
without `.grad`, and note what the sums are made of.

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

    def dense(self) -> Tensor:
        """Return the gradient as a float32 matrix."""
        from skipcoder.kernels.gpu import latents as gpu

        return gpu.sum_rows(self.latents, self.weights, self.rows_ND, self.scale)


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
    pending = _pending.get(W_MD.data_ptr())
    if pending is None:
        return latents.sum_rows(weights, rows_ND), latents.sum_weights(weights) if bias else None
    from skipcoder.kernels.gpu import latents as gpu

    rows_ND = rows_ND if pending.rows_ND is None else pending.rows_ND
    found = gpu.measure(latents, weights, rows_ND)
    one = weights.new_ones((), dtype=torch.float32)
    pending.sums.append(RowSums(latents, weights, rows_ND, one, found.squares_M, found.partial_PD))
    return None, found.sums_M


def decoder_gradients(
    W_MD: Tensor, latents: ByLatent, weights: Tensor, rows_ND: Tensor, scale: Tensor
) -> Tensor | None:
    """If the gradient of W is to be left unsummed, do so and return that of the weights, scale * row . W[latent]: the
    same pass over the rows gives both. Otherwise return None."""
    pending = _pending.get(W_MD.data_ptr())
    if pending is None:
        return None
    from skipcoder.kernels.gpu import latents as gpu

    found = gpu.measure(latents, weights, rows_ND, scale, W_MD, pending.unit)
    pending.sums.append(RowSums(latents, weights, rows_ND, scale, found.squares_M, found.partial_PD))
    assert found.dots is not None
    return found.dots.view(weights.shape)
