"""Rows of float32 as 8-bit floats, each with its own scale, in one pass.

Legend: R rows, D width, WIDE the padded width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.gpu.rows import num_warps


@triton.jit
def quantise_kernel(  # type: ignore[no-untyped-def]
    row_ptr, centre_ptr, bias_ptr, out_ptr, scale_ptr, bias_out_ptr, D, WIDE, LARGEST,
    CENTRE: tl.constexpr, WEIGHTS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """out = row / scale, with scale = the row's largest size / LARGEST. CENTRE: of inputs the centre is subtracted
    first; of WEIGHTS its product with the row is added to the bias."""
    r = tl.program_id(0).to(tl.int64)
    offset = tl.arange(0, PADDED)
    inside = offset < D
    row = tl.load(row_ptr + r * D + offset, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTS:
        bias = tl.load(bias_ptr + r)
        if CENTRE:
            bias += tl.sum(row * tl.load(centre_ptr + offset, mask=inside, other=0.0))
        tl.store(bias_out_ptr + r, bias.to(bias_out_ptr.dtype.element_ty))
    elif CENTRE:
        row -= tl.load(centre_ptr + offset, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(row)) / LARGEST, 1e-30)
    tl.store(scale_ptr + r, scale)
    tl.store(out_ptr + r * WIDE + offset, (row / scale).to(out_ptr.dtype.element_ty), mask=offset < WIDE)


def quantise(
    rows_RD: Tensor, out: Tensor, scale_R: Tensor, centre_D: Tensor | None, bias_R: Tensor | None, bias_out: Tensor
) -> None:
    """Fill `out` [R, WIDE] and `scale_R`; with a bias, of weights, also the bias that goes with centred inputs."""
    r, d = rows_RD.shape
    padded = triton.next_power_of_2(out.shape[1])
    quantise_kernel[(r,)](
        rows_RD.contiguous(), scale_R if centre_D is None else centre_D, scale_R if bias_R is None else bias_R, out,
        scale_R, bias_out, d, out.shape[1], torch.finfo(out.dtype).max, CENTRE=centre_D is not None,
        WEIGHTS=bias_R is not None, PADDED=padded, num_warps=min(8, num_warps(padded, 4)),
    )  # fmt: skip
