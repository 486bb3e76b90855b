"""squared_error: what sparse reconstructions miss of their target, and its gradients.

    y_hat_b = sum of f_j W_dec[j] over the entries j in blocks 0 ... b, + base,    error_b = y - y_hat_b

A batch's loss needs the sum of squares of each error. Blocks nest several reconstructions in one: the prefixes of a
Matryoshka coder, or the k and the 4 k largest latents. Each row of W_dec is read once for all of them, and the gradient
of an entry in block b comes from the sum of the errors of blocks b and later.

Where a row holds several sides, one after another (a crosscoder's), each side has sums of its own, so that each can
count by its own variance.

Legend: N tokens, M latents, E output width, B blocks, S sides.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.encode import Codes, Peers
from skipcoder.kernels.rows import ByLatent, gather_dot, gather_sum
from skipcoder.kernels.unsummed import decoder_gradients


class SquaredError(NamedTuple):
    """The errors of the nested reconstructions."""

    squares_BS: Tensor
    """Sum of the squares of each error on each side, with gradients."""
    error_BNE: Tensor
    """The errors, without."""


def squared_error(
    codes: Codes,
    W_dec_ME: Tensor,
    base: Tensor,
    y_NE: Tensor,
    block: Tensor | None = None,
    blocks: int = 1,
    peers: Peers | None = None,
    widths: Sequence[int] = (),
    error: Tensor | None = None,
) -> SquaredError:
    """Decode on top of `base` (the bias [E], or bias plus skip [N, E]) and compare. `block`: the block of each entry,
    shaped like the indices; without it there is one. `peers`: who holds the other latents. `widths` of the sides of a
    row; empty: it has one. `error` [N, E]: where it is known already, of one block."""
    squares, errors = _SquaredError.apply(
        codes.values, W_dec_ME, base, y_NE, codes, block, blocks, peers, widths, error
    )  # type: ignore[no-untyped-call]
    return SquaredError(squares, errors)


def squared_error_reference(
    f_NM: Tensor, W_dec_ME: Tensor, base: Tensor, y_NE: Tensor, block_NM: Tensor, widths: Sequence[int] = ()
) -> Tensor:
    """The formula [B, S] on dense tensors, with autograd; for tests (float64)."""
    last, widths = int(block_NM.max()), list(widths or y_NE.shape[1:])
    parts = [torch.where(block_NM <= b, f_NM, 0) @ W_dec_ME + base for b in range(last + 1)]
    return torch.stack([torch.stack([e.square().sum() for e in (y_NE - y_hat).split(widths, 1)]) for y_hat in parts])


class _SquaredError(Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_dec_ME: Tensor, base: Tensor, y_NE: Tensor, codes: Codes, block: Tensor | None,
        blocks: int, peers: Peers | None, widths: Sequence[int], error: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        indices, offsets = codes.indices, codes.offsets
        if error is not None:
            errors, squares = error[None], error.square().sum()[None]
        elif in_triton(W_dec_ME) and peers is None:
            from skipcoder.kernels.gpu import rows as gpu

            errors, squares = gpu.errors(indices, values, W_dec_ME, offsets, base, y_NE, block, blocks)
        else:
            kept = [values if block is None else torch.where(block <= b, values, 0) for b in range(blocks)]
            if peers is None:
                each = [y_NE - gather_sum(indices, v, W_dec_ME, offsets, base) for v in kept]
            else:
                partial = torch.stack([gather_sum(indices, v, W_dec_ME, offsets) for v in kept])
                each = list(y_NE - base - peers.sum(partial))
            errors = each[0][None] if blocks == 1 else torch.stack(each)
            squares = torch.stack([error.square().sum() for error in each])
        if len(widths) < 2:
            squares_BS = squares[:, None]
        else:
            squares_BS = torch.stack([side.square().sum((1, 2)) for side in errors.split(list(widths), 2)], 1)
        ctx.save_for_backward(values, W_dec_ME, errors, indices, offsets, block, *codes.by_latent)
        ctx.base_is_bias, ctx.widths = base.dim() == 1, widths
        ctx.mark_non_differentiable(errors)
        ctx.set_materialize_grads(False)  # none for the errors; that of the squares is asked for whenever this runs
        return squares_BS, errors

    @staticmethod
    def backward(ctx: Any, grad_BS: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec_ME, error_BNE, indices, offsets, block, *order = ctx.saved_tensors
        blocks, n, e = error_BNE.shape
        latents, scale_BS = ByLatent(*order), -2 * grad_BS
        rows_BNE, scale = error_BNE, scale_BS[0, 0]
        if blocks > 1 or len(ctx.widths) > 1:
            scale_B1E = scale_BS[:, None, :1]
            if len(ctx.widths) > 1:
                scale_B1E = torch.cat([scale_BS[:, None, [s]].expand(-1, 1, d) for s, d in enumerate(ctx.widths)], 2)
            rows_BNE, scale = error_BNE * scale_B1E, torch.ones_like(scale)
        if blocks > 1:  # what reaches a block is the sum over itself and all later ones
            rows_BNE = rows_BNE.flip(0).cumsum(0).flip(0)
            latents = latents._replace(token_L=latents.token_L + n * block.flatten()[latents.entry_L])
        grad_W = None
        grad_values = decoder_gradients(W_dec_ME, latents, values, rows_BNE.view(-1, e), scale)
        if grad_values is None:
            if blocks == 1:
                rows_BNE, scale = rows_BNE * scale, torch.ones_like(scale)
            grad_W = latents.sum_rows(values, rows_BNE.view(-1, e))
            grad_values = gather_dot(rows_BNE[0], W_dec_ME, indices, offsets)
            for b in range(1, blocks):
                grad_values = torch.where(block == b, gather_dot(rows_BNE[b], W_dec_ME, indices, offsets), grad_values)
        grad_base = scale * rows_BNE[0].sum(0) if ctx.base_is_bias else scale * rows_BNE[0]
        return grad_values.to(values.dtype), grad_W, grad_base, None, None, None, None, None, None, None
