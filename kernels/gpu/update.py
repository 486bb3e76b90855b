"""Optimiser steps in Triton; see kernels/update.py.

The steps on rows read and write a matrix's weights and the optimiser's state once. They form each latent's gradient
anew from its entries (gpu/latents.py), unless the sums were kept.

Legend: L entries (token, latent) in all, M latents, D row width.
"""

import triton
import triton.language as tl
from torch import Tensor

from skipcoder.kernels.entries import Entries
from skipcoder.kernels.gpu import latents as gpu
from skipcoder.kernels.gpu.latents import ends_of, some_rows
from skipcoder.kernels.gpu.rows import num_warps

BLOCK = 1024


@triton.jit
def sign_step_kernel(y_ptr, z_ptr, grad_ptr, hyper_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = lerp(y, z, c) - y_lr sign(g); z = z - lr sign(g). hyper: lr, y_lr, c."""
    lr, y_lr, c = tl.load(hyper_ptr), tl.load(hyper_ptr + 1), tl.load(hyper_ptr + 2)
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offset < count
    y = tl.load(y_ptr + offset, mask=inside, other=0.0)
    z = tl.load(z_ptr + offset, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + offset, mask=inside, other=0.0)
    sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    tl.store(y_ptr + offset, y + c * (z - y) - y_lr * sign, mask=inside)
    tl.store(z_ptr + offset, z - lr * sign, mask=inside)


def sign_step(y: Tensor, z: Tensor, grad: Tensor, hyper: Tensor) -> None:
    """Update y and z in place."""
    count = y.numel()
    sign_step_kernel[(triton.cdiv(count, BLOCK),)](y, z, grad.contiguous(), hyper, count, BLOCK=BLOCK)


@triton.jit
def along_removed(total, w):  # type: ignore[no-untyped-def]
    """`total` without its part along w."""
    return total - tl.sum(total * w) / tl.maximum(tl.sum(w * w), 1e-30) * w


@triton.jit
def row_sum(  # type: ignore[no-untyped-def]
    latent, offset, inside, entry_ptr, token_ptr, starts_ptr, partial_before_ptr, weight_ptr, rows_ptr, partial_ptr,
    sums_ptr, M, D, L, SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """The sum over a latent's entries, in the order of gpu/latents.py; of a split latent from its partial sums. KEPT:
    as it was written."""
    if KEPT:
        total = tl.load(sums_ptr + latent * D + offset, mask=inside, other=0.0)
    else:
        first, last = ends_of(latent, starts_ptr, M, L)
        total = tl.zeros((BLOCK_D,), tl.float32)
        if last - first > SEGMENT:
            place = tl.load(partial_before_ptr + latent)
            for i in range(place, place + (last - first + SEGMENT - 1) // SEGMENT):
                total += tl.load(partial_ptr + i * D + offset, mask=inside, other=0.0)
        else:
            for i in range(first, last, AT_ONCE):
                _, _, weight, row = some_rows(
                    i, last, entry_ptr, token_ptr, weight_ptr, rows_ptr, offset, inside, D, AT_ONCE
                )
                total += tl.sum(weight[:, None] * row, axis=0)
    return total


@triton.jit
def adam_rows_kernel(  # type: ignore[no-untyped-def]
    p_ptr, m_ptr, v_ptr, entry_ptr, token_ptr, starts_ptr, partial_before_ptr, weight_ptr, rows_ptr, partial_ptr,
    sums_ptr, half_ptr, factor_ptr, hyper_ptr, M, D, L, rest1, rest2, eps, SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_D: tl.constexpr, KEPT: tl.constexpr, UNIT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One row of Adam, with gradient factor * sum. hyper: rate / bias correction 1, root of bias correction 2;
    rest: 1 - beta."""
    ONCE: tl.constexpr = "" if KEPT else "evict_first"  # leaves the cache to the rows that are read again
    latent = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    at = latent * D + offset
    total = row_sum(
        latent, offset, inside, entry_ptr, token_ptr, starts_ptr, partial_before_ptr, weight_ptr, rows_ptr,
        partial_ptr, sums_ptr, M, D, L, SEGMENT, AT_ONCE, BLOCK_D, KEPT,
    )  # fmt: skip
    p = tl.load(p_ptr + at, mask=inside, other=0.0, eviction_policy=ONCE)
    if UNIT:
        total = along_removed(total, p)
    grad = tl.load(factor_ptr) * total
    m = tl.load(m_ptr + at, mask=inside, other=0.0, eviction_policy=ONCE)
    v = tl.load(v_ptr + at, mask=inside, other=0.0, eviction_policy=ONCE)
    m += rest1 * (grad - m)
    v += rest2 * (grad * grad - v)
    p -= tl.load(hyper_ptr) * m / (tl.sqrt(v) / tl.load(hyper_ptr + 1) + eps)
    if UNIT:
        p /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, p * p, 0.0))), 1e-30)
    tl.store(m_ptr + at, m, mask=inside, eviction_policy=ONCE)
    tl.store(v_ptr + at, v, mask=inside, eviction_policy=ONCE)
    tl.store(p_ptr + at, p, mask=inside)
    if HALF:
        tl.store(half_ptr + at, p.to(half_ptr.dtype.element_ty), mask=inside)


@triton.jit
def sign_rows_kernel(  # type: ignore[no-untyped-def]
    y_ptr, z_ptr, entry_ptr, token_ptr, starts_ptr, partial_before_ptr, weight_ptr, rows_ptr, partial_ptr, sums_ptr,
    half_ptr, factor_ptr, hyper_ptr, M, D, L, SEGMENT: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr,
    KEPT: tl.constexpr, UNIT: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """One row of the schedule-free sign step. hyper: lr, y_lr, c as in sign_step_kernel."""
    latent = tl.program_id(0).to(tl.int64)
    offset = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = offset < D
    at = latent * D + offset
    total = row_sum(
        latent, offset, inside, entry_ptr, token_ptr, starts_ptr, partial_before_ptr, weight_ptr, rows_ptr,
        partial_ptr, sums_ptr, M, D, L, SEGMENT, AT_ONCE, BLOCK_D, KEPT,
    )  # fmt: skip
    y = tl.load(y_ptr + at, mask=inside, other=0.0)
    z = tl.load(z_ptr + at, mask=inside, other=0.0)
    if UNIT:
        total = along_removed(total, y)
    grad = tl.load(factor_ptr) * total
    sign = (grad > 0).to(tl.float32) - (grad < 0).to(tl.float32)
    y += tl.load(hyper_ptr + 2) * (z - y) - tl.load(hyper_ptr + 1) * sign
    z -= tl.load(hyper_ptr) * sign
    if UNIT:
        y /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, y * y, 0.0))), 1e-30)
        z /= tl.maximum(tl.sqrt(tl.sum(tl.where(inside, z * z, 0.0))), 1e-30)
    tl.store(y_ptr + at, y, mask=inside)
    tl.store(z_ptr + at, z, mask=inside)
    if HALF:
        tl.store(half_ptr + at, y.to(half_ptr.dtype.element_ty), mask=inside)


def adam_rows(
    p: Tensor, m: Tensor, v: Tensor, latents: Entries, weights: Tensor, rows_ND: Tensor, partial_PD: Tensor,
    sums_MD: Tensor | None, half_MD: Tensor | None, factor: Tensor, hyper: Tensor, rest1: float, rest2: float,
    eps: float, unit: bool,
) -> None:  # fmt: skip
    """Update a matrix [M, D], its moments and its copy in bfloat16, if any, in place."""
    cut_up = _tiling(rows_ND, unit)
    adam_rows_kernel[(len(p), triton.cdiv(p.shape[1], cut_up["BLOCK_D"]))](
        p, m, v, *latents[:3], latents.partial_before_M, weights.contiguous(), rows_ND.contiguous(), partial_PD,
        partial_PD if sums_MD is None else sums_MD, p if half_MD is None else half_MD, factor, hyper, *p.shape,
        len(latents.entry_L), rest1, rest2, eps, SEGMENT=gpu.SEGMENT, KEPT=sums_MD is not None, UNIT=unit,
        HALF=half_MD is not None, **cut_up,
    )  # fmt: skip


def sign_rows(
    y: Tensor, z: Tensor, latents: Entries, weights: Tensor, rows_ND: Tensor, partial_PD: Tensor,
    sums_MD: Tensor | None, half_MD: Tensor | None, factor: Tensor, hyper: Tensor, unit: bool,
) -> None:  # fmt: skip
    """Update y and z [M, D], and the copy of y in bfloat16, if any, in place."""
    cut_up = _tiling(rows_ND, unit)
    sign_rows_kernel[(len(y), triton.cdiv(y.shape[1], cut_up["BLOCK_D"]))](
        y, z, *latents[:3], latents.partial_before_M, weights.contiguous(), rows_ND.contiguous(), partial_PD,
        partial_PD if sums_MD is None else sums_MD, y if half_MD is None else half_MD, factor, hyper, *y.shape,
        len(latents.entry_L), SEGMENT=gpu.SEGMENT, KEPT=sums_MD is not None, UNIT=unit, HALF=half_MD is not None,
        **cut_up,
    )  # fmt: skip


def _tiling(rows_ND: Tensor, whole: bool) -> dict[str, int]:
    """Width of a program's tile, 256 or (`whole`) all of a row, and its warps."""
    tile = triton.next_power_of_2(rows_ND.shape[1])
    warps = min(16, num_warps(tile, rows_ND.element_size())) if whole else 1
    return {"AT_ONCE": gpu.AT_ONCE, "BLOCK_D": tile if whole else min(256, tile), "num_warps": warps}
