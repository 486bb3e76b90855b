"""JumpReLU with learned thresholds, by straight-through estimators on a window around them.

    f = pre if pre > theta else 0           df/dtheta  ~ -(theta / eps) [|pre - theta| < eps / 2]
    H = 1   if pre > theta else 0           dH/dtheta  ~ -(1 / eps)     [|pre - theta| < eps / 2]

Rajamanoharan et al., arXiv 2407.14435. Both work on the L entries of flat codes, which must include all that lie in the
window.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from skipcoder.kernels.rows import ByLatent


def jumprelu(pre_L: Tensor, theta_L: Tensor, bandwidth: float) -> Tensor:
    """[L]: activations; gradients to both inputs."""
    result: Tensor = _JumpReLU.apply(pre_L, theta_L, bandwidth)  # type: ignore[no-untyped-call]
    return result


def fires(pre_L: Tensor, theta_L: Tensor, bandwidth: float) -> Tensor:
    """[L]: 1 where a latent fires; gradient to the thresholds."""
    result: Tensor = _Fires.apply(pre_L, theta_L, bandwidth)  # type: ignore[no-untyped-call]
    return result


def per_entry(theta_M: Tensor, indices_L: Tensor, latents: ByLatent) -> Tensor:
    """[L]: each entry's threshold; its gradient is summed in a fixed order."""
    result: Tensor = _PerEntry.apply(theta_M, indices_L, *latents)  # type: ignore[no-untyped-call]
    return result


class _PerEntry(Function):
    @staticmethod
    def forward(ctx: Any, theta_M: Tensor, indices_L: Tensor, *latents: Tensor) -> Tensor:
        ctx.save_for_backward(*latents)
        return theta_M[indices_L]

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor | None, ...]:
        latents = ByLatent(*ctx.saved_tensors)
        return latents.sum_weights(grad_L), None, *(None for _ in latents)


def _window(pre_L: Tensor, theta_L: Tensor, bandwidth: float) -> Tensor:
    return ((pre_L - theta_L).abs() < bandwidth / 2).to(pre_L.dtype) / bandwidth


class _JumpReLU(Function):
    @staticmethod
    def forward(ctx: Any, pre_L: Tensor, theta_L: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_L, theta_L)
        ctx.bandwidth = bandwidth
        return torch.where(pre_L > theta_L, pre_L, 0)

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[Tensor, Tensor, None]:
        pre_L, theta_L = ctx.saved_tensors
        to_theta = -theta_L * _window(pre_L, theta_L, ctx.bandwidth) * grad_L
        return torch.where(pre_L > theta_L, grad_L, 0), to_theta, None


class _Fires(Function):
    @staticmethod
    def forward(ctx: Any, pre_L: Tensor, theta_L: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre_L, theta_L)
        ctx.bandwidth = bandwidth
        return (pre_L > theta_L).to(pre_L.dtype)

    @staticmethod
    def backward(ctx: Any, grad_L: Tensor) -> tuple[None, Tensor, None]:
        pre_L, theta_L = ctx.saved_tensors
        return None, -_window(pre_L, theta_L, ctx.bandwidth) * grad_L, None
