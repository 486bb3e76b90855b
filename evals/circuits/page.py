"""A circuit's page, and an overview of several: files that open from disk and ask for nothing else."""

import json
import re
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from skipcoder.evals.circuits.contexts import Shown
from skipcoder.evals.circuits.graph import Circuit
from skipcoder.files import write_atomically

SITE = Path(__file__).with_name("site")
LISTED = 200
"""Edges and nodes in an overview."""
EDGES = 40
"""Edges into a node, and out of it, that the page holds."""


def write_page(
    file: Path, circuit: Circuit, latents: Mapping[str, Shown], pages: Mapping[int, str], text: Callable[[int], str]
) -> None:
    """Write the page. `pages`: of each layer's latents, as addresses from the file's folder; `text`: of a token."""
    used = {node["token"] for node in circuit["nodes"] if node["token"] is not None}
    mine = {f"{node['layer']}_{node['latent']}" for node in circuit["nodes"] if node["kind"] == "latent"}
    shown = {name: latents[name] for name in sorted(mine & latents.keys())}
    for one in shown.values():
        used.update(one["tokens"], (t for t, _ in one["up"] + one["down"]), (t for c in one["contexts"] for t in c[0]))
    data = {
        "circuit": {**circuit, "edges": strongest(circuit)},
        "edges": len(circuit["edges"]),
        "reaching": reaching(circuit),
        "latents": shown,
        "pages": pages,
        "words": {token: text(token) for token in sorted(used)},
    }
    page = (SITE / "index.html").read_text()
    for name in ("style.css", "graph.js", "own.js", "panel.js"):
        page = page.replace(f"/* {name} */", (SITE / name).read_text())
    # Text of the model's can hold "</script>" or anything else.
    text_of_data = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    write_atomically(file, page.replace("/* data */", f"window.skipcoderCircuit = {text_of_data};").encode())


def strongest(circuit: Circuit) -> list[tuple[int, int, float]]:
    """The edges that are among the EDGES strongest into their target or out of their source."""
    count: dict[tuple[int, int], int] = {}
    kept = []
    for edge in sorted(circuit["edges"], key=lambda edge: -abs(edge[2])):
        ends = [(0, edge[0]), (1, edge[1])]
        if any(count.get(end, 0) < EDGES for end in ends):
            kept.append(edge)
        for end in ends:
            count[end] = count.get(end, 0) + 1
    return kept


def reaching(circuit: Circuit) -> list[float]:
    """The sum of the absolute weights of all edges into each node."""
    found = [0.0] * len(circuit["nodes"])
    for _, target, weight in circuit["edges"]:
        found[target] += abs(weight)
    return [float(f"{size:.4g}") for size in found]


def write_overview(file: Path, found: Mapping[str, Any], names: Mapping[str, str]) -> None:
    """Write what circuits of several prompts share (recurring.py), with links to their pages beside the file. `names`:
    what "latent LAYER/NUMBER" and "next TOKEN" are called."""

    def called(node: str) -> str:
        return escape(f"{node} {names.get(node, '')}".strip())

    links = enumerate(found["prompts"])
    prompts = "".join(f'<li><a href="{i}/index.html">{escape(text)}</a></li>' for i, text in links)
    edges = "".join(
        f"<tr><td>{called(edge['source'])}<td>{called(edge['target'])}<td>{edge['circuits']}<td>{edge['weight']:.1%}"
        for edge in found["edges"][:LISTED]
    )
    nodes = "".join(f"<tr><td>{called(node['node'])}<td>{node['circuits']}" for node in found["nodes"][:LISTED])
    file_of = {"prompts": prompts, "edges": edges, "nodes": nodes, "style.css": (SITE / "style.css").read_text()}
    page = re.sub(r"/\* (\S+) \*/", lambda match: file_of[match[1]], (SITE / "overview.html").read_text())
    write_atomically(file, page.encode())
