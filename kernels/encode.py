"""encode_topk: values and indices of each token's K largest pre-activations, and their gradients.

    pre = W_enc (x - b_pre) + b_enc,   f = TopK_k(ReLU(pre))

The [N, M] pre-activations are made in chunks of tokens and never kept. Legend: N tokens, K active latents,
M latents, D input width.
"""

import math
from typing import Any

import torch
from skipcoder.kernels.token_list import TokenList, gather_dot, gather_sum
from skipcoder.kernels.topk import candidates, rank, topk_lowest
from torch import Tensor
from torch.autograd import Function

CHUNK_ELEMENTS = 2**24
"""Pre-activations held at once (64 MiB in float32)."""

NOMINATED = 1.25
"""Latents nominated by a low-precision GEMM, as a multiple of k."""


def encode_topk(
    x_ND: Tensor,
    W_enc_MD: Tensor,
    b_enc_M: Tensor,
    k: int,
    b_pre_D: Tensor | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, TokenList]:
    """Top-k encoding. Returns values [N, K] (>= 0, descending), indices [N, K] and their token list.

    Equal values are taken by rising index. With a lower-precision `matmul_dtype` the GEMM only nominates
    1.25 k latents; their values are computed again in the dtype of `x_ND`, and the best k of those are taken.
    A latent with value 0 gets no gradient.
    """
    m = W_enc_MD.shape[0]
    if not 1 <= k <= m:
        raise ValueError(f"k={k} must be between 1 and the number of latents, {m}")
    return _EncodeTopK.apply(x_ND, W_enc_MD, b_enc_M, b_pre_D, k, matmul_dtype)


def encode_topk_reference(
    x_ND: Tensor, W_enc_MD: Tensor, b_enc_M: Tensor, k: int, b_pre_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, dense, by autograd; for tests (float64)."""
    centred = x_ND if b_pre_D is None else x_ND - b_pre_D
    return torch.topk(torch.relu(centred @ W_enc_MD.T + b_enc_M), k)


class _EncodeTopK(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        W_enc_MD: Tensor,
        b_enc_M: Tensor,
        b_pre_D: Tensor | None,
        k: int,
        matmul_dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, TokenList]:
        n, m = x_ND.shape[0], W_enc_MD.shape[0]
        centred_ND = x_ND if b_pre_D is None else x_ND - b_pre_D
        dtype = matmul_dtype or x_ND.dtype
        W_cast, b_cast = W_enc_MD.to(dtype), b_enc_M.to(dtype)
        values_NK = x_ND.new_empty(n, k)
        indices_NK = torch.empty(n, k, dtype=torch.int64, device=x_ND.device)
        # One buffer for all chunks: fresh pages for [N, M] cost as much as a fifth of the GEMM.
        rows = min(max(1, CHUNK_ELEMENTS // m), max(n, 1))
        buffer = x_ND.new_empty(rows, m, dtype=dtype)
        for start in range(0, n, rows):
            part = slice(start, min(start + rows, n))
            x_part = centred_ND[part].to(dtype)
            pre = torch.addmm(b_cast, x_part, W_cast.T, out=buffer[: len(x_part)])
            if dtype == x_ND.dtype:
                values_NK[part], indices_NK[part] = topk_lowest(pre, k)
            else:
                nominated = candidates(pre, min(math.ceil(NOMINATED * k), m))
                exact = gather_dot(centred_ND[part], W_enc_MD, nominated) + b_enc_M[nominated]
                values_NK[part], indices_NK[part] = rank(exact, nominated, k)
        values_NK = values_NK.relu_()
        tokens = TokenList(indices_NK, m)
        ctx.save_for_backward(centred_ND, W_enc_MD, values_NK)
        ctx.tokens, ctx.has_b_pre = tokens, b_pre_D is not None
        ctx.mark_non_differentiable(indices_NK)
        return values_NK, indices_NK, tokens

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        centred_ND, W_enc_MD, values_NK = ctx.saved_tensors
        grad_NK = torch.where(values_NK > 0, grad_NK, 0)
        indices_NK = ctx.tokens.indices_NK
        grad_x = grad_W = grad_b = grad_b_pre = None
        if ctx.needs_input_grad[0]:
            grad_x = gather_sum(indices_NK, grad_NK, W_enc_MD)
        if ctx.needs_input_grad[1]:
            grad_W = ctx.tokens.sum_rows(grad_NK, centred_ND)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            grad_b = ctx.tokens.sum_weights(grad_NK)
        if ctx.has_b_pre and ctx.needs_input_grad[3]:
            grad_b_pre = -(grad_b @ W_enc_MD)  # O(M D), where the sum over tokens would be O(N K D)
        return grad_x, grad_W, grad_b if ctx.needs_input_grad[2] else None, grad_b_pre, None, None
