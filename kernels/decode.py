"""sparse_decode: the weighted sum of each token's active decoder rows, and its gradients.

    y_hat = sum_j f_j W_dec[j] + b_dec

Legend: N tokens, K active latents, M latents, E output width.
"""

from typing import Any

from skipcoder.kernels.token_list import TokenList, gather_dot, gather_sum
from torch import Tensor
from torch.autograd import Function


def sparse_decode(
    values_NK: Tensor, indices_NK: Tensor, W_dec_ME: Tensor, b_dec_E: Tensor, tokens: TokenList | None = None
) -> Tensor:
    """[N, E]. Pass the encoder's `tokens` so that both backward passes share one sort."""
    if tokens is None:
        tokens = TokenList(indices_NK, W_dec_ME.shape[0])
    return _SparseDecode.apply(values_NK, indices_NK, W_dec_ME, tokens) + b_dec_E


def sparse_decode_reference(values_NK: Tensor, indices_NK: Tensor, W_dec_ME: Tensor, b_dec_E: Tensor) -> Tensor:
    """The formula, dense, by autograd; for tests (float64)."""
    n, m = values_NK.shape[0], W_dec_ME.shape[0]
    f_NM = values_NK.new_zeros(n, m).scatter_add(1, indices_NK, values_NK)
    return f_NM @ W_dec_ME + b_dec_E


class _SparseDecode(Function):
    @staticmethod
    def forward(ctx: Any, values_NK: Tensor, indices_NK: Tensor, W_dec_ME: Tensor, tokens: TokenList) -> Tensor:
        ctx.save_for_backward(values_NK, indices_NK, W_dec_ME)
        ctx.tokens = tokens
        return gather_sum(indices_NK, values_NK, W_dec_ME)

    @staticmethod
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[Tensor | None, ...]:
        values_NK, indices_NK, W_dec_ME = ctx.saved_tensors
        grad_NE = grad_NE.contiguous()
        grad_values = grad_W = None
        if ctx.needs_input_grad[0]:
            grad_values = gather_dot(grad_NE, W_dec_ME, indices_NK).to(values_NK.dtype)
        if ctx.needs_input_grad[2]:
            grad_W = ctx.tokens.sum_rows(values_NK, grad_NE)
        return grad_values, None, grad_W, None
