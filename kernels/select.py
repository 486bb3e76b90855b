"""Which latents fire, and with what pre-activation: one operation for each way of selecting.

An exact search (`float32`) compares the pre-activations themselves. In the other modes they are estimates, which
nominate more latents than are needed; these get exact values, and the best of them are taken.

Each operation is registered with torch.library, so that torch.compile takes it as one node; registered operations take
the fields of a Search, not the Search.

Legend: N tokens, K latents per token, C nominated per token, M latents, D input width, L entries of a whole batch.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.kernels.backend import in_triton
from skipcoder.kernels.candidates import candidates, largest, rank, reaching, topk_lowest, two_of_groups
from skipcoder.kernels.preactivations import EXACT, Chunk, Search, preactivations
from skipcoder.kernels.rows import gather_dot

MARGIN = {"bfloat16": 1 / 32, "fp8": 1 / 4}
"""Share of a threshold by which an estimate may miss it and still be looked at: four roundings of the whole sum.
Training watches the recall of what is missed."""


class Chosen(NamedTuple):
    """The latents that were selected."""

    values: Tensor
    """[N, K] or flat [L]: their pre-activations, in the dtype of the inputs."""
    indices: Tensor
    """int64, shaped like the values."""
    offsets: Tensor | None
    """int64 [N], where each token's entries begin; None where each has K."""
    place: Tensor | None = None
    """int64, shaped like the values: how many of its token's are larger, where the order does not show it."""


def topk(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, search: Search = EXACT) -> Chosen:
    """The k largest latents of each token, descending; equal values by rising index."""
    _refuse_k(k, len(W_MD))
    values, indices = _topk(x_ND, W_MD, b_M, k, *search)
    return Chosen(values, indices, None)


def groupmax(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, search: Search = EXACT) -> Chosen:
    """The largest latent in each of k equal runs of latents, in order of the runs; of equal values the lowest index."""
    _refuse_k(k, len(W_MD))
    if len(W_MD) % k:
        raise ValueError(f"groupmax takes the largest of k groups, but {len(W_MD)} latents do not divide by k={k}")
    values, indices = _groupmax(x_ND, W_MD, b_M, k, *search)
    return Chosen(values, indices, None)


def batchtopk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, search: Search = EXACT, hint: Tensor | None = None
) -> Chosen:
    """The N k largest of the whole batch: flat, by token, then latent; of equal values the earliest token. On CPUs only
    the positive ones; on GPUs always N k, as their number must not depend on values. A `hint`, a number exceeded by a
    few more than N k pre-activations, makes it faster on CPUs and changes nothing else."""
    _refuse_k(k, len(W_MD))
    return Chosen(*_batchtopk(x_ND, W_MD, b_M, k, hint, *search))


def above(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, threshold_M: Tensor, search: Search = EXACT) -> Chosen:
    """All values above both 0 and their latent's threshold: flat, by token, then latent. On CPUs exact in every mode;
    on GPUs estimates nominate, with a margin, in the modes that have them."""
    if not in_triton(x_ND):
        search = search._replace(mode="float32")
    return Chosen(*_above(x_ND, W_MD, b_M, threshold_M, *search))


@torch.library.custom_op("skipcoder::topk", mutates_args=())
def _topk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int,
    mode: str, nominated: float | None, chunk_bytes: int, centre_D: Tensor | None, spread_D: Tensor | None,
    W_half_MD: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    search = Search(mode, nominated, chunk_bytes, centre_D, spread_D, W_half_MD)
    values_NK, indices_NK = _empty(x_ND, k)
    if not len(x_ND):
        return values_NK, indices_NK
    chunks = preactivations(x_ND, W_MD, b_M, search)
    if search.is_exact:
        for part, pre in chunks:
            values_NK[part], indices_NK[part] = topk_lowest(pre, k)
        return values_NK, indices_NK
    c = min(search.candidates(k), len(W_MD))
    columns_NC = torch.cat([candidates(pre, c) for _, pre in chunks])
    return rank(gather_dot(x_ND, W_MD, columns_NC, None, b_M), columns_NC, k)


@torch.library.custom_op("skipcoder::groupmax", mutates_args=())
def _groupmax(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int,
    mode: str, nominated: float | None, chunk_bytes: int, centre_D: Tensor | None, spread_D: Tensor | None,
    W_half_MD: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    search = Search(mode, nominated, chunk_bytes, centre_D, spread_D, W_half_MD)
    values_NK, indices_NK = _empty(x_ND, k)
    if not len(x_ND):
        return values_NK, indices_NK
    chunks = preactivations(x_ND, W_MD, b_M, search)
    if search.is_exact:
        for part, pre in chunks:
            values_NK[part], indices_NK[part] = _max_of_groups(pre, k)
        return values_NK, indices_NK
    columns_NC = torch.cat([two_of_groups(pre, k) for _, pre in chunks])
    exact_NC = gather_dot(x_ND, W_MD, columns_NC, None, b_M)
    pairs, columns = exact_NC.view(len(x_ND), k, -1), columns_NC.view(len(x_ND), k, -1)
    best = pairs.max(2, keepdim=True)
    return best.values.squeeze(2), columns.gather(2, best.indices).squeeze(2)


@torch.library.custom_op("skipcoder::batchtopk", mutates_args=())
def _batchtopk(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, hint: Tensor | None,
    mode: str, nominated: float | None, chunk_bytes: int, centre_D: Tensor | None, spread_D: Tensor | None,
    W_half_MD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    search = Search(mode, nominated, chunk_bytes, centre_D, spread_D, W_half_MD)
    n, m = len(x_ND), len(W_MD)
    if not n:
        return _empty_flat(x_ND)
    tokens = torch.arange(n, device=x_ND.device)
    count = n * k if search.is_exact else min(search.candidates(n * k), n * m)
    if in_triton(x_ND):
        flat, values = _largest_of_batch_on_gpu(preactivations(x_ND, W_MD, b_M, search), m, count)
    else:
        flat, values = _largest_of_batch(preactivations(x_ND, W_MD, b_M, search), m, count, hint)
        if hint is not None and len(flat) < count:
            flat, values = _largest_of_batch(preactivations(x_ND, W_MD, b_M, search), m, count)
    if not search.is_exact:
        token, latent = flat // m, flat % m
        offsets = torch.searchsorted(token, tokens)
        exact = gather_dot(x_ND, W_MD, latent, offsets, b_M)
        best = largest(exact, n * k)
        flat, values = flat[best], exact[best]
    if not in_triton(x_ND):  # there the number must not depend on the values; those below 0 become 0
        flat, values = flat[values > 0], values[values > 0]
    return values, flat % m, torch.searchsorted(flat // m, tokens)


@torch.library.custom_op("skipcoder::above", mutates_args=())
def _above(
    x_ND: Tensor, W_MD: Tensor, b_M: Tensor, threshold_M: Tensor,
    mode: str, nominated: float | None, chunk_bytes: int, centre_D: Tensor | None, spread_D: Tensor | None,
    W_half_MD: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    search = Search(mode, nominated, chunk_bytes, centre_D, spread_D, W_half_MD)
    m, bound_M, tokens = len(W_MD), threshold_M.clamp_min(0), torch.arange(len(x_ND), device=x_ND.device)
    if not len(x_ND):
        return _empty_flat(x_ND)
    least_M = bound_M if search.is_exact else bound_M * (1 - MARGIN[mode])
    flat, values = [], []
    for part, pre in preactivations(x_ND, W_MD, b_M, search):
        row, column = (pre > least_M).nonzero(as_tuple=True)
        flat.append((row + part.start) * m + column)
        values.append(pre[row, column])
    flat_L, value_L = torch.cat(flat), torch.cat(values)
    if not search.is_exact:
        latent_L, offsets = flat_L % m, torch.searchsorted(flat_L // m, tokens)
        value_L = gather_dot(x_ND, W_MD, latent_L, offsets, b_M)
        fires_L = value_L > bound_M[latent_L]
        flat_L, value_L = flat_L[fires_L], value_L[fires_L]
    return value_L, flat_L % m, torch.searchsorted(flat_L // m, tokens)


@_topk.register_fake
@_groupmax.register_fake
def _(x_ND: Tensor, W_MD: Tensor, b_M: Tensor, k: int, *search: object) -> tuple[Tensor, Tensor]:
    return _empty(x_ND, k)


@_batchtopk.register_fake
@_above.register_fake
def _(x_ND: Tensor, *others: object) -> tuple[Tensor, Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()
    indices = x_ND.new_empty(size, dtype=torch.int64)
    return x_ND.new_empty(size), indices, indices.new_empty(len(x_ND))


def _empty(x_ND: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x_ND.new_empty(len(x_ND), k), x_ND.new_empty(len(x_ND), k, dtype=torch.int64)


def _empty_flat(x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x_ND.new_empty(0), x_ND.new_empty(0, dtype=torch.int64), x_ND.new_empty(0, dtype=torch.int64)


def _refuse_k(k: int, m: int) -> None:
    if not 1 <= k <= m:
        raise ValueError(f"k={k} must be between 1 and the number of latents, {m}")


def _max_of_groups(pre_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = pre_NM.view(len(pre_NM), k, -1).max(2)
    first = torch.arange(k, device=pre_NM.device) * (pre_NM.shape[1] // k)
    return best.values, best.indices + first


def _largest_of_batch_on_gpu(chunks: Iterator[Chunk], m: int, count: int) -> tuple[Tensor, Tensor]:
    """Flat positions (rising) and values of exactly the `count` largest elements; holds `count` for every chunk."""
    from skipcoder.kernels.gpu.batch import largest_of_batch

    flat, values = [], []
    for part, pre in chunks:
        places = largest_of_batch(pre, count)
        flat.append(places + part.start * m)
        values.append(pre.view(-1)[places])
    best = largest(torch.cat(values), count)
    return torch.cat(flat)[best], torch.cat(values)[best]


def _largest_of_batch(chunks: Iterator[Chunk], m: int, count: int, hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flat positions (rising) and values of the `count` largest non-negative elements of the [N, M] that the chunks
    make up; with a hint, only those that reach it. Holds one chunk and 4 `count` elements at a time."""
    flat = values = bound = torch.empty(0)
    for part, pre in chunks:
        if part.start == 0:
            flat = torch.empty(0, dtype=torch.int64, device=pre.device)
            values, bound = pre.new_empty(0), pre.new_zeros(())
            if hint is not None:
                bound = hint.clamp_min(0).to(pre.dtype)
        row, column = reaching(pre, bound)
        flat = torch.cat([flat, (row + part.start) * m + column])
        values = torch.cat([values, pre[row, column]])
        if len(values) > 4 * count:
            best = largest(values, count)
            flat, values = flat[best], values[best]
            bound = torch.maximum(bound, values.min())
    best = largest(values, count)
    return flat[best], values[best]
