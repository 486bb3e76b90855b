"""Which nodes and edges of an attribution graph matter: influence on the logits, as circuit-tracer defines it.

With |edges| divided by their sum over each target (N), w [n] the probabilities of the logits and 0 elsewhere, the
influence of nodes is w (N + N^2 + ...): the graph has no cycles, so this ends.

Legend: n nodes, R targets, C sources.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROWS = 256
"""Rows of which a copy is made at a time: all of them can fill half of the memory."""


class Pruned(NamedTuple):
    """What is left of a graph, and how well it stands for the whole."""

    nodes_n: Tensor
    """bool [n]"""
    edges_nn: Tensor
    """bool [n, n], [target, source]"""
    cumulative_n: Tensor
    """[n]: the share of all influence that nodes at least as influential hold: small is important."""


class Scores(NamedTuple):
    """How much of a prompt the latents explain, before pruning."""

    replacement: float
    """Influence of tokens / influence of tokens and errors."""
    completeness: float
    """Mean share of a node's input that comes from latents and tokens, weighted by influence."""


def normalised(probabilities: Tensor) -> Tensor:
    """Weights of the logits: their probabilities over the sum of them, which can be tiny."""
    return probabilities / probabilities.sum()


def shares(edges: Tensor) -> Tensor:
    """|edges| by their sum over each target."""
    size = edges.abs()
    return size / size.sum(1, keepdim=True).clamp_min(1e-10)


def influence(N_nn: Tensor, weights_n: Tensor) -> Tensor:
    """[n] influence of each node, w (N + N^2 + ...)."""
    total, now = torch.zeros_like(weights_n), weights_n
    for _ in range(len(weights_n)):
        now = now @ N_nn
        if not now.any():
            break
        total = total + now
    return total


def partial_influence(edges_RC: Tensor, visited: Tensor, weights: Tensor) -> Tensor:
    """[C] influence of sources through the targets so far: rows of logits with these weights, then of latents
    `visited`, whose number is that of their column."""
    size_R = torch.cat([some.abs().sum(1) for some in edges_RC.split(_ROWS)]).clamp_min(1e-10)
    now = torch.cat([weights, weights.new_zeros(len(visited))])
    total = edges_RC.new_zeros(edges_RC.shape[1])
    while now.any():
        parts = zip((now / size_R).split(_ROWS), edges_RC.split(_ROWS), strict=True)
        reached = sum((share @ some.abs() for share, some in parts), torch.zeros_like(total))
        total += reached
        now = torch.cat([torch.zeros_like(weights), reached[visited]])
    return total


def scores(N_nn: Tensor, weights_n: Tensor, errors_n: Tensor, tokens_n: Tensor) -> Scores:
    """`errors_n`, `tokens_n`: bool [n], nodes of these kinds."""
    found = influence(N_nn, weights_n)
    tokens, errors = float(found[tokens_n].sum()), float(found[errors_n].sum())
    weight = found + weights_n
    share = 1 - N_nn[:, errors_n].sum(1)  # 1 for tokens and errors, which nothing reaches
    return Scores(tokens / max(tokens + errors, 1e-12), float((share * weight).sum() / weight.sum()))


def prune(
    edges_nn: Tensor,
    weights_n: Tensor,
    always_n: Tensor,
    latents_n: Tensor,
    node_threshold: float,
    edge_threshold: float,
) -> Pruned:
    """Keep the most influential nodes that hold `node_threshold` of all influence, and `always_n` (tokens and logits);
    of the edges between them, those that hold `edge_threshold`; then, until nothing changes, drop other nodes that
    lead nowhere, and latents that nothing leads to."""
    found = influence(shares(edges_nn), weights_n)
    nodes = _most(found, node_threshold) | always_n
    kept = edges_nn * nodes[:, None] * nodes
    N_nn = shares(kept)
    scores_nn = N_nn * (influence(N_nn, weights_n) + weights_n)[:, None]
    edges = _most(scores_nn.flatten(), edge_threshold).view_as(scores_nn) & (kept != 0)
    while True:
        leads = edges.any(0) | always_n
        led = edges.any(1) | ~latents_n
        fewer = nodes & leads & led
        edges = edges & fewer[:, None] & fewer
        if torch.equal(fewer, nodes):
            break
        nodes = fewer
    order = found.argsort(descending=True)
    cumulative = torch.empty_like(found)
    cumulative[order] = found[order].cumsum(0) / found.sum().clamp_min(1e-12)
    return Pruned(nodes, edges, cumulative)


def _most(scores: Tensor, share: float) -> Tensor:
    """bool: the largest scores that together hold a share of the sum."""
    (place,) = scores.nonzero(as_tuple=True)
    some, order = scores[place].sort(descending=True)
    before = some.cumsum(0) - some
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[place[order[before < share * some.sum()]]] = True
    return kept


def total_effects(edges_LC: Tensor, edges_RC: Tensor, visited: Tensor, activation_R: Tensor) -> Tensor:
    """[L, C] effect of each source on each logit along all paths: directly, and through the latents `visited`, whose
    inputs are `edges_RC` and whose outputs grow with their activation."""
    per_unit_RC = edges_RC / activation_R[:, None]
    total, now = edges_LC.clone(), edges_LC
    while now.any():
        now = now[:, visited] @ per_unit_RC
        total += now
    return total
