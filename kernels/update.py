"""Optimiser steps that touch each weight and its state once.

Schedule-free sign descent (Defazio et al., arXiv 2405.15682): gradients are taken at y = (1 - beta) z + beta x, z makes
plain steps, x is the running average of the z; x is never stored.

    z' = z - lr sign(g)
    x' = (1 - c) x + c z'
    y' = (1 - beta) z' + beta x' = (1 - c) y + c z - lr (1 - beta (1 - c)) sign(g)

`adam_rows` and `sign_rows` take gradients that are left unsummed (unsummed.py), on GPUs only; `unit` also scales the
new rows to length 1, `half_MD` is a copy in bfloat16 that they keep up to date. Rates and numbers of steps may be
tensors on the device, so that a CUDA graph can replay a step.
"""

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.unsummed import RowSums

BLOCK = 2**18
"""Elements that pass through the CPU's cache together: 6 ms for 18432 x 576 on 2 cores; whole tensors take 19 ms."""


@torch.no_grad()
def sign_step(y: Tensor, z: Tensor, grad: Tensor, lr: float | Tensor, beta: float, step: Tensor) -> None:
    """Update `y` and `z` in place; all three contiguous and of one shape. `step`: 0-d, from 1; the new z counts
    1 / step in the average."""
    if in_triton(y):
        from skipcoder.kernels.gpu import update as gpu

        gpu.sign_step(y, z, grad, _sign_hyper(lr, beta, step))
        return
    c, lr = 1 / float(step), float(lr)
    y_lr = lr * (1 - beta * (1 - c))
    for y_B, z_B, grad_B in zip(*(t.view(-1).split(BLOCK) for t in (y, z, grad.contiguous())), strict=True):
        sign_B = grad_B.sign()
        y_B.lerp_(z_B, c).sub_(sign_B, alpha=y_lr)
        z_B.sub_(sign_B, alpha=lr)


@torch.no_grad()
def sign_rows(
    y_MD: Tensor, z_MD: Tensor, sums: RowSums, lr: float | Tensor, beta: float, step: Tensor, unit: bool = False,
    half_MD: Tensor | None = None,
) -> None:  # fmt: skip
    """`sign_step` on an unsummed gradient."""
    from skipcoder.kernels.gpu import update as gpu

    hyper = _sign_hyper(lr, beta, step)
    gpu.sign_rows(
        y_MD, z_MD, sums.latents, sums.weights, sums.rows_ND, sums.partial_PD, sums.sums_MD, half_MD, sums.scale, hyper,
        unit,
    )  # fmt: skip


@torch.no_grad()
def adam_rows(
    p_MD: Tensor, m_MD: Tensor, v_MD: Tensor, sums: RowSums, step: Tensor, lr: float | Tensor,
    betas: tuple[float, float], eps: float, unit: bool = False, half_MD: Tensor | None = None,
) -> None:  # fmt: skip
    """Make a step of Adam (the formulas of torch's fused one) on an unsummed gradient; m and v: its moments."""
    from skipcoder.kernels.gpu import update as gpu

    correction1, correction2 = (1 - beta ** step.double() for beta in betas)
    hyper = torch.stack([lr / correction1, correction2.sqrt()]).float()
    gpu.adam_rows(
        p_MD, m_MD, v_MD, sums.latents, sums.weights, sums.rows_ND, sums.partial_PD, sums.sums_MD, half_MD,
        sums.scale, hyper, 1 - betas[0], 1 - betas[1], eps, unit,
    )  # fmt: skip


def _sign_hyper(lr: float | Tensor, beta: float, step: Tensor) -> Tensor:
    """float32 [lr, y_lr, c] on the device."""
    c = 1 / step.double()
    return torch.stack([0 * c + lr, lr * (1 - beta * (1 - c)), c]).float()


def sign_step_reference(
    x: Tensor, z: Tensor, grad: Tensor, lr: float, beta: float, c: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', z', y') from the definitions; for tests."""
    z = z - lr * grad.sign()
    x = (1 - c) * x + c * z
    return x, z, (1 - beta) * z + beta * x
