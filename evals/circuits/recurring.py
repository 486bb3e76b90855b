"""What the circuits of several prompts share: latents and edges that recur, whatever their position."""

from collections.abc import Sequence
from typing import Any

from skipcoder.evals.circuits.graph import Circuit, Node


def recurring(circuits: Sequence[Circuit], least: int = 2) -> dict[str, Any]:
    """Nodes and edges in at least `least` circuits, the most frequent first. Nodes of a circuit that differ in their
    position alone count as one: their weights are added. `weight`: the mean over all circuits, 0 where an edge is
    missing, of the edge as a share of all that reaches its target."""
    names: dict[str, set[int]] = {}
    weights: dict[tuple[str, str], dict[int, float]] = {}
    for number, circuit in enumerate(circuits):
        called = [_name(node, circuit) for node in circuit["nodes"]]
        for name in called:
            names.setdefault(name, set()).add(number)
        size: dict[str, float] = {}
        for _, target, weight in circuit["edges"]:
            size[called[target]] = size.get(called[target], 0.0) + abs(weight)
        for source, target, weight in circuit["edges"]:
            of = weights.setdefault((called[source], called[target]), {})
            of[number] = of.get(number, 0.0) + weight / size[called[target]]
    edges: list[dict[str, Any]] = [
        {"source": source, "target": target, "circuits": len(of), "weight": sum(of.values()) / len(circuits)}
        for (source, target), of in weights.items()
        if len(of) >= least
    ]
    edges.sort(key=lambda edge: (-edge["circuits"], -abs(edge["weight"])))
    frequent = sorted(((name, len(of)) for name, of in names.items() if len(of) >= least), key=lambda one: -one[1])
    return {
        "circuits": len(circuits),
        "prompts": [circuit["prompt"] for circuit in circuits],
        "nodes": [{"node": name, "circuits": count} for name, count in frequent],
        "edges": edges,
    }


def _name(node: Node, circuit: Circuit) -> str:
    if node["kind"] == "latent":
        return f"latent {node['layer']}/{node['latent']}"
    if node["kind"] == "error":
        return f"error {node['layer']}"
    if node["kind"] == "token":
        return f"token {circuit['tokens'][node['position']]!r}"
    return f"next {node['token']}"
