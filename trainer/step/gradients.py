"""The gradients of one step, from the backward pass to the optimiser: collected, clipped, handed over.

On a GPU those of W_enc and W_dec may stay unsummed (kernels/unsummed.py), if the optimiser can take them so and there
is one sum for each: not with several micro-batches, several processes or a loss that uses a matrix twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skipcoder.kernels.unsummed import Pending, RowSums, leaving_unsummed
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.shard import EVERYWHERE


class Gradients:
    """The gradients of a coder's parameters."""

    def __init__(self, coder: SparseCoder, unit_norm: bool, unsummed: bool) -> None:
        """`unit_norm`: rows of W_dec are kept at length 1; `unsummed`: what is not summed may stay so."""
        self.coder, self.unit_norm, self.unsummed = coder, unit_norm, unsummed
        self.left: dict[nn.Parameter, RowSums] = {}
        """What has no `.grad`."""

    @contextmanager
    def collecting(self, x_ND: Tensor | None = None) -> Iterator[None]:
        """Within, backward passes set gradients. `x_ND`: the batch that the encoder reads, if bfloat16 holds it
        exactly; its rows then take half the bytes."""
        if not self.unsummed:
            yield
            return
        rows = None if x_ND is None or self.coder.b_pre is not None else x_ND.bfloat16()
        found = {self.coder.W_enc: Pending(rows_ND=rows), self.coder.W_dec: Pending(self.unit_norm)}
        with leaving_unsummed(*found.items()):
            yield
        self.left = {}
        for parameter, pending in found.items():
            if len(pending.sums) == 1 and parameter.grad is None:
                self.left[parameter] = pending.sums[0]
                continue
            for sums in pending.sums:
                dense = sums.dense()
                parameter.grad = dense if parameter.grad is None else parameter.grad.add_(dense)

    def clip(self, most: float) -> Tensor:
        """Scale gradients so that their norm is at most `most`; return the norm before."""
        W_dec = self.coder.W_dec
        if self.unit_norm and W_dec.grad is not None:
            remove_parallel_gradient(W_dec)
        shard = self.coder.shard
        if not self.left and shard is None:
            return torch.nn.utils.clip_grad_norm_(self.coder.parameters(), most)
        grads = {name: p.grad for name, p in self.coder.named_parameters() if p.grad is not None}
        dense = list(grads.values())
        lengths = dict(zip(grads, torch._foreach_norm(dense), strict=True))
        everywhere = [lengths.pop(name).square() for name in EVERYWHERE if name in lengths]
        squares = [sums.squares_M.sum() for sums in self.left.values()]
        here = torch.stack([length.square() for length in lengths.values()] + squares).sum()
        norm = torch.stack([here if shard is None else shard.sum(here), *everywhere]).sum().sqrt()
        factor = (most / (norm + 1e-6)).clamp(max=1.0)  # as clip_grad_norm_ has it
        torch._foreach_mul_(dense, factor)
        self.left = {p: sums._replace(scale=sums.scale * factor) for p, sums in self.left.items()}
        return norm


@torch.no_grad()
def remove_parallel_gradient(W_dec_ME: Tensor) -> None:
    """Remove from each row's gradient what would only change the row's length."""
    grad = W_dec_ME.grad
    assert grad is not None
    along = torch.einsum("me,me->m", grad, W_dec_ME) / W_dec_ME.norm(dim=1).square_().clamp_min_(1e-30)
    grad.addcmul_(along[:, None], W_dec_ME, value=-1)


@torch.no_grad()
def normalise_rows(W_dec_ME: Tensor) -> None:
    """Scale every row to length 1."""
    W_dec_ME.div_(W_dec_ME.norm(dim=1, keepdim=True).clamp_min(1e-30))
