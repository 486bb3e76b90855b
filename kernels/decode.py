"""sparse_decode: the weighted sum of each token's active decoder rows, and its gradients.

    y_hat = sum_j f_j W_dec[j] + base

Legend: N tokens, M latents, E output width.
"""

from typing import Any

from torch import Tensor
from torch.autograd import Function

from skipcoder.kernels.encode import Codes
from skipcoder.kernels.rows import ByLatent, gather_dot, gather_sum


def sparse_decode(codes: Codes, W_dec_ME: Tensor, base: Tensor) -> Tensor:
    """[N, E]: the sum, added to `base` (the bias [E], or bias plus skip [N, E]) in the same pass."""
    result: Tensor = _SparseDecode.apply(codes.values, W_dec_ME, base, codes)  # type: ignore[no-untyped-call]
    return result


def sparse_decode_reference(f_NM: Tensor, W_dec_ME: Tensor, base: Tensor) -> Tensor:
    """The formula on dense tensors, with autograd; for tests (float64)."""
    return f_NM @ W_dec_ME + base


class _SparseDecode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec_ME: Tensor, base: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(values, W_dec_ME, codes.indices, codes.offsets, *codes.by_latent)
        ctx.base_is_bias = base.dim() == 1
        result: Tensor = gather_sum(codes.indices, values, W_dec_ME, codes.offsets, base)
        return result

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec_ME, indices, offsets, *order = ctx.saved_tensors
        grad_NE = grad_NE.contiguous()
        grad_values = grad_W = grad_base = None
        if ctx.needs_input_grad[0]:
            grad_values = gather_dot(grad_NE, W_dec_ME, indices, offsets).to(values.dtype)
        if ctx.needs_input_grad[1]:
            grad_W = ByLatent(*order).sum_rows(values, grad_NE)
        if ctx.needs_input_grad[2]:
            grad_base = grad_NE.sum(0) if ctx.base_is_bias else grad_NE
        return grad_values, grad_W, grad_base, None
