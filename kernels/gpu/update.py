"""The schedule-free sign step in Triton; see kernels/update.py."""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def sign_step_kernel(y_ptr, z_ptr, grad_ptr, count, lr, y_lr, c, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = lerp(y, z, c) - y_lr sign(g); z = z - lr sign(g)."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    y = tl.load(y_ptr + offset, mask=inside, other=0.0)
    z = tl.load(z_ptr + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
    sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    tl.store(y_ptr + offset, y + c * (z - y) - y_lr * sign, mask=inside)
    tl.store(z_ptr + offset, z - lr * sign, mask=inside)


def sign_step(y: Tensor, z: Tensor, grad: Tensor, lr: float, y_lr: float, c: float) -> None:
    """Update y and z in place."""
    count = y.numel()
    sign_step_kernel[(triton.cdiv(count, BLOCK),)](y, z, grad.contiguous(), count, lr, y_lr, c, BLOCK=BLOCK)
