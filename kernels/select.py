"""Which latents fire, and how strongly: top-k per token, the largest of each of k groups, top-k of the whole batch, or
all above a threshold.

In `float32` mode the pre-activations themselves are compared. In the other modes they are estimates that nominate
`nominated` times as many latents; these get exact values, and the best of them are taken.

Legend: N tokens, K latents per token, C nominated per token, M latents, D input width, L entries of a whole batch.
"""

import math
from collections.abc import Iterator
from functools import partial

import torch
from skipcoder.kernels.preactivations import Chunk, preactivations
from skipcoder.kernels.rows import gather_dot
from skipcoder.kernels.topk import above, candidates, largest, rank, topk_lowest
from torch import Tensor

ACTIVATIONS = ("topk", "groupmax", "batchtopk", "above")
FLAT = ("batchtopk", "above")
"""Those whose codes differ in length from token to token."""


@torch.library.custom_op("skipcoder::select", mutates_args=())
def select(
    x_ND: Tensor,
    W_MD: Tensor,
    b_M: Tensor,
    k: int,
    activation: str = "topk",
    mode: str = "float32",
    nominated: float = 1.25,
    chunk_elements: int = 2**24,
    centre_D: Tensor | None = None,
    spread_D: Tensor | None = None,
    threshold_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pre-activations of the chosen latents, their indices, and (batchtopk) where each token's begin.

    topk: [N, K] values descending. groupmax: [N, K], column j from the j-th run of M/K latents. batchtopk: flat, by
    token, then latent, positive values only; the third result is [N], else it is empty. above: in the same form all
    that exceed both 0 and their latent's threshold, in float32 whatever the mode. Equal values: the lowest index
    (batchtopk: the earliest token). batchtopk is faster, and chooses the same, if `threshold_M` is something that a few
    more than N K exceed.
    """
    n, m = len(x_ND), len(W_MD)
    none = torch.empty(0, dtype=torch.int64, device=x_ND.device)
    if not n:
        shape = (0,) if activation in FLAT else (0, k)
        return x_ND.new_empty(shape), none.new_empty(shape), none
    mode = "float32" if activation == "above" else mode
    chunks = partial(preactivations, x_ND, W_MD, b_M, mode, chunk_elements, centre_D, spread_D)
    tokens = torch.arange(n, device=x_ND.device)
    if activation == "above":
        assert threshold_M is not None
        flat, values = _above_threshold(chunks(), threshold_M.clamp_min(0))
        return values, flat % m, torch.searchsorted(flat // m, tokens)
    if activation == "batchtopk":
        count = n * k if mode == "float32" else math.ceil(nominated * n * k)
        flat, values = _largest_of_batch(chunks(), m, count, hint=threshold_M)
        if threshold_M is not None and len(flat) < count:
            flat, values = _largest_of_batch(chunks(), m, count)
        if mode != "float32":
            token, latent = flat // m, flat % m
            offsets = torch.searchsorted(token, tokens)
            exact = gather_dot(x_ND, W_MD, latent, offsets) + b_M[latent]
            best = largest(exact, n * k)
            flat, values = flat[best], exact[best]
        flat, values = flat[values > 0], values[values > 0]
        return values, flat % m, torch.searchsorted(flat // m, tokens)
    if mode == "float32":
        values_NK = x_ND.new_empty(n, k)
        indices_NK = torch.empty(n, k, dtype=torch.int64, device=x_ND.device)
        for part, pre in chunks():
            values_NK[part], indices_NK[part] = topk_lowest(pre, k) if activation == "topk" else _max_of_groups(pre, k)
        return values_NK, indices_NK, none
    c = min(math.ceil(nominated * k), m)
    nominate = candidates if activation == "topk" else _two_of_groups
    columns_NC = torch.cat([nominate(pre, c if activation == "topk" else k) for _, pre in chunks()])
    exact_NC = gather_dot(x_ND, W_MD, columns_NC) + b_M[columns_NC]
    if activation == "topk":
        return *rank(exact_NC, columns_NC, k), none
    pairs, columns = exact_NC.view(n, k, -1), columns_NC.view(n, k, -1)
    best = pairs.max(2, keepdim=True)
    return best.values.squeeze(2), columns.gather(2, best.indices).squeeze(2), none


@select.register_fake
def _(
    x_ND: Tensor,
    W_MD: Tensor,
    b_M: Tensor,
    k: int,
    activation: str = "topk",
    mode: str = "float32",
    nominated: float = 1.25,
    chunk_elements: int = 2**24,
    centre_D: Tensor | None = None,
    spread_D: Tensor | None = None,
    threshold_M: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(x_ND)
    shape = (torch.library.get_ctx().new_dynamic_size(),) if activation in FLAT else (n, k)
    ints = x_ND.new_empty(shape, dtype=torch.int64)
    return x_ND.new_empty(shape), ints, ints.new_empty(n if activation in FLAT else 0)


def _max_of_groups(pre_NM: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = pre_NM.view(len(pre_NM), k, -1).max(2)
    first = torch.arange(k, device=pre_NM.device) * (pre_NM.shape[1] // k)
    return best.values, best.indices + first


def _two_of_groups(pre_NM: Tensor, k: int) -> Tensor:
    """[N, 2 K] (or [N, K] where groups have one member), rising within each group."""
    grouped = pre_NM.view(len(pre_NM), k, -1)
    two = torch.topk(grouped, min(2, grouped.shape[2]), dim=2).indices.sort(dim=2).values
    first = torch.arange(k, device=pre_NM.device)[:, None] * grouped.shape[2]
    return (two + first).flatten(1)


def _above_threshold(chunks: Iterator[Chunk], threshold_M: Tensor) -> tuple[Tensor, Tensor]:
    """Flat positions (rising) and values of what exceeds its column's threshold."""
    flat, values = [], []
    for part, pre in chunks:
        row, column = (pre > threshold_M).nonzero(as_tuple=True)
        flat.append((row + part.start) * len(threshold_M) + column)
        values.append(pre[row, column])
    return torch.cat(flat), torch.cat(values)


def _largest_of_batch(chunks: Iterator[Chunk], m: int, count: int, hint: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Flat positions (rising) and values of the `count` largest non-negative elements of the [N, M] that the chunks
    make up, holding one chunk and 4 `count` elements at a time; with a hint, of those among them that reach it."""
    flat = values = bound = torch.empty(0)
    for part, pre in chunks:
        if part.start == 0:
            flat = torch.empty(0, dtype=torch.int64, device=pre.device)
            values, bound = pre.new_empty(0), pre.new_zeros(())
            if hint is not None:
                bound = hint.amin().clamp_min(0).to(pre.dtype)
        row, column = above(pre, bound)
        flat = torch.cat([flat, (row + part.start) * m + column])
        values = torch.cat([values, pre[row, column]])
        if len(values) > 4 * count:
            best = largest(values, count)
            flat, values = flat[best], values[best]
            bound = torch.maximum(bound, values.min())
    best = largest(values, count)
    return flat[best], values[best]
