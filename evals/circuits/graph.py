"""A circuit: the pruned graph of a prompt, as our JSON and as circuit-tracer's and Neuronpedia's.

circuit.json holds what is said at `Circuit`. circuit-tracer's form (schema 1) is written from it. One thing differs
from what circuit-tracer writes: errors are called LAYER_error_mlp_POSITION, as Neuronpedia's own converter does, since
0_LAYER_POSITION is also a latent of layer 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired

import torch
from typing_extensions import TypedDict

from skipcoder.evals.circuits.attribution import Attribution
from skipcoder.evals.circuits.influence import normalised, prune, scores, shares

FORMAT, VERSION = "skipcoder.circuit", 1


class LayerFacts(TypedDict):
    """A replaced MLP."""

    hookpoint: str
    number: int
    width: int | None
    """Latents; None where the MLP was left as it is."""
    run: str | None
    """Folder of its coder."""


class Node(TypedDict):
    """A node. `layer` is the model's layer, -1 for tokens, one past the last for logits."""

    id: str
    kind: Literal["latent", "error", "token", "logit"]
    layer: int
    position: int
    latent: int | None
    token: int | None
    """Of the vocabulary, for tokens and logits."""
    value: float | None
    """Activation, or logit less the mean logit."""
    constant: float | None
    """What reaches it from biases and positions left out: with the edges into it, pruned ones too, it makes `value`."""
    probability: float | None
    influence: float
    """Share of all influence that nodes at least as influential hold: small is important."""


class Circuit(TypedDict):
    """The pruned graph of a prompt."""

    format: str
    version: int
    prompt: str
    tokens: list[str]
    ids: list[int]
    left_out: list[int]
    """Positions at which MLPs stay as they are."""
    model: str
    layers: list[LayerFacts]
    nodes: list[Node]
    edges: list[tuple[int, int, float]]
    """(source, target, weight): places in `nodes`, and the direct effect on the target's value."""
    replacement: float
    completeness: float
    active: int
    """Latents active on the prompt; `visited` of them were targets."""
    visited: int
    departure: float
    """Largest share by which edges and constant miss a target's value, before pruning: rounding."""
    thresholds: tuple[float, float]
    verified: NotRequired[dict[str, Any]]


def circuit_of(
    found: Attribution,
    *,
    prompt: str,
    ids: Sequence[int],
    tokens: Sequence[str],
    left_out: Sequence[int],
    model: str,
    layers: Sequence[LayerFacts],
    node_threshold: float,
    edge_threshold: float,
) -> Circuit:
    """Prune an attribution."""
    logits, visited = len(found.logits), len(found.visited)
    columns = torch.cat([found.visited, torch.arange(found.error_column, found.edges_RC.shape[1])])
    n = len(columns) + logits
    edges_nn = found.edges_RC.new_zeros(n, n)  # latents, errors, tokens, logits
    edges_nn[:visited, : len(columns)] = found.edges_RC[logits:, columns]
    edges_nn[len(columns) :, : len(columns)] = found.edges_RC[:logits, columns]
    weights_n = edges_nn.new_zeros(n)
    weights_n[len(columns) :] = normalised(found.probabilities).to(weights_n)
    place = torch.arange(n)
    tokens_from, logits_from = len(columns) - found.positions, len(columns)
    latents_n = place < visited
    errors_n = (place >= visited) & (place < tokens_from)
    tokens_n = (place >= tokens_from) & (place < logits_from)
    pruned = prune(edges_nn, weights_n, place >= tokens_from, latents_n, node_threshold, edge_threshold)
    whole = scores(shares(edges_nn), weights_n, errors_n, tokens_n)
    kept = pruned.nodes_n.nonzero()[:, 0]
    nodes = [_node(i, found, visited, ids, layers, float(pruned.cumulative_n[i])) for i in kept.tolist()]
    where = {int(i): place for place, i in enumerate(kept)}
    pairs = pruned.edges_nn.nonzero()
    weights = edges_nn[pairs[:, 0], pairs[:, 1]]
    edges = [
        (where[source], where[target], _digits(weight))
        for (target, source), weight in zip(pairs.tolist(), weights, strict=True)
    ]
    return {
        "format": FORMAT, "version": VERSION, "prompt": prompt, "tokens": list(tokens), "ids": list(ids),
        "left_out": list(left_out), "model": model, "layers": list(layers), "nodes": nodes, "edges": edges,
        "replacement": _digits(whole.replacement), "completeness": _digits(whole.completeness),
        "active": len(found.latents), "visited": visited, "departure": found.departure(),
        "thresholds": (node_threshold, edge_threshold),
    }  # fmt: skip


def _node(
    i: int, found: Attribution, visited: int, ids: Sequence[int], layers: Sequence[LayerFacts], influence: float
) -> Node:
    """Node i of latents, errors, tokens, logits."""
    logits, errors = len(found.logits), len(layers) * found.positions
    node: Node = {
        "id": "", "kind": "latent", "layer": -1, "position": 0, "latent": None, "token": None, "value": None,
        "constant": None, "probability": None, "influence": round(influence, 5),
    }  # fmt: skip
    row = None
    if i < visited:
        number, row = int(found.visited[i]), logits + i
        node["layer"] = layers[int(found.latents.layer[number])]["number"]
        node["position"], node["latent"] = int(found.latents.position[number]), int(found.latents.latent[number])
        node["id"] = f"{node['layer']}_{node['latent']}_{node['position']}"
    elif i < visited + errors:
        layer, node["position"] = divmod(i - visited, found.positions)
        node["kind"], node["layer"] = "error", layers[layer]["number"]
        node["id"] = f"{node['layer']}_error_mlp_{node['position']}"
    elif i < visited + errors + found.positions:
        node["kind"], node["position"] = "token", i - visited - errors
        node["token"] = ids[node["position"]]
        node["id"] = f"E_{node['token']}_{node['position']}"
    else:
        row = i - visited - errors - found.positions
        node["kind"], node["layer"], node["position"] = "logit", layers[-1]["number"] + 1, found.positions - 1
        node["token"], node["probability"] = int(found.logits[row]), _digits(found.probabilities[row])
        node["id"] = f"{node['layer'] + 1}_{node['token']}_{node['position']}"  # as circuit-tracer numbers logits
    if row is not None:
        node["value"], node["constant"] = _digits(found.values_R[row]), _digits(found.constants_R[row])
    return node


def circuit_tracer_form(
    circuit: Circuit, slug: str, scan: str, vocabulary: Mapping[int, str], labels: Mapping[str, str]
) -> dict[str, Any]:
    """The same as graph JSON of circuit-tracer and Neuronpedia. `scan`: the model's name there; `vocabulary`: texts of
    tokens; `labels`: explanations by node id."""
    likeliest = max((node["probability"] or 0 for node in circuit["nodes"]), default=0)
    nodes = []
    for node in circuit["nodes"]:
        position, kind, text = node["position"], node["kind"], circuit["tokens"][node["position"]]
        layer, feature = str(node["layer"]), -1
        if kind == "latent":
            feature = cantor(node["layer"], int(node["latent"] or 0))
            js, what, clerp = f"{layer}_{node['latent']}-0", "cross layer transcoder", labels.get(node["id"], "")
        elif kind == "error":
            js, what, clerp = f"{layer}_{position}-0", "mlp reconstruction error", f"Err: mlp {text!r}"
        elif kind == "token":
            layer, feature = "E", position
            js, what, clerp = f"E_{node['token']}-{position}", "embedding", f'Emb: "{text}"'
        else:
            layer, feature = str(node["layer"] + 1), int(node["token"] or 0)
            js, what = f"L_{feature}-{position}", "logit"
            clerp = f'Output "{vocabulary[feature]}" (p={node["probability"]:.3f})'
        nodes.append({
            "node_id": node["id"], "feature": feature, "layer": layer, "ctx_idx": position, "feature_type": what,
            "token_prob": node["probability"] or 0.0, "run_idx": 0, "reverse_ctx_idx": 0, "jsNodeId": js,
            "is_target_logit": kind == "logit" and node["probability"] == likeliest, "clerp": clerp,
            "influence": None if kind == "logit" else node["influence"],
            "activation": node["value"] if kind == "latent" else None,
        })  # fmt: skip
    ids = [node["node_id"] for node in nodes]
    node_threshold, edge_threshold = circuit["thresholds"]
    return {
        "metadata": {
            "slug": slug, "scan": scan, "transcoder_list": [layer["hookpoint"] for layer in circuit["layers"]],
            "prompt_tokens": circuit["tokens"], "prompt": circuit["prompt"], "node_threshold": node_threshold,
            "schema_version": 1, "info": {"generator": {"name": "skipcoder"}},
            "pruning_settings": {"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": nodes,
        "links": [{"source": ids[s], "target": ids[t], "weight": weight} for s, t, weight in circuit["edges"]],
    }  # fmt: skip


def cantor(layer: int, latent: int) -> int:
    """Cantor's pairing of layer and latent, by which circuit-tracer and Neuronpedia number latents."""
    return (layer + latent) * (layer + latent + 1) // 2 + latent


def _digits(value: Any) -> float:
    return float(f"{float(value):.6g}")
