"""What is shown of a circuit's latents: texts from the store, explanations, tokens they promote. No model runs."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from skipcoder.evals.circuits.graph import Circuit
from skipcoder.evals.circuits.trace import Tracer
from skipcoder.evals.explain.records import explanations
from skipcoder.evals.features.pages import context, promoted
from skipcoder.evals.latents.examples import Window
from skipcoder.evals.latents.largest import largest_windows

WINDOW, PROMOTED, TOKENS = 24, 6, 3
"""Tokens of a text; tokens promoted and lowered; tokens that a latent is named by."""


class Shown(TypedDict):
    """What is shown of a latent."""

    contexts: list[list[Any]]
    """As on the pages of latents (features/pages.py)."""
    tokens: list[int]
    """The tokens on which it is largest."""
    explanation: str | None
    up: list[tuple[int, float]]
    """Tokens whose logits it raises, and by how much for each unit of activation."""
    down: list[tuple[int, float]]


def shown_latents(
    tracer: Tracer,
    circuits: Iterable[Circuit],
    contexts: int,
    advance: Callable[[int], object] = lambda tokens: None,
) -> dict[str, Shown]:
    """{LAYER_LATENT: what is shown of it} for every latent of the circuits; `advance` is told of the store's tokens
    that are read for each layer."""
    wanted: dict[int, set[int]] = {}
    for circuit in circuits:
        for node in circuit["nodes"]:
            if node["latent"] is not None:
                wanted.setdefault(node["layer"], set()).add(node["latent"])
    found: dict[str, Shown] = {}
    for layer in tracer.layers:
        run, latents = tracer.runs.get(layer.hookpoint), sorted(wanted.get(layer.number, ()))
        if run is None or not latents:
            continue
        said = explanations(run)
        up, down = promoted(tracer.model, run.coder.W_dec[torch.tensor(latents)].float())
        texts: list[list[Window]] = [[] for _ in latents]
        if contexts:
            texts = largest_windows(run, tracer.store, latents, contexts, WINDOW, tracer.device, advance)
        for place, latent in enumerate(latents):
            windows = texts[place]
            largest = max((float(one.activations.max()) for one in windows), default=0.0)
            found[f"{layer.number}_{latent}"] = {
                "contexts": [context(window, largest) for window in windows],
                "tokens": list(dict.fromkeys(int(w.tokens[w.activations.argmax()]) for w in windows))[:TOKENS],
                "explanation": said.get(latent),
                "up": [(t, round(v, 3)) for t, v in up[place][:PROMOTED]],
                "down": [(t, round(v, 3)) for t, v in down[place][:PROMOTED]],
            }
    return found


def pages_of(tracer: Tracer, folder: Path) -> dict[int, str]:
    """{layer: address, from a folder, of the pages of its coder's latents}, where they were made."""
    return {
        layer.number: os.path.relpath(page, folder)
        for layer in tracer.layers
        if (run := tracer.runs.get(layer.hookpoint)) and (page := run.path / "features" / "index.html").is_file()
    }


def label(shown: Shown, text: Callable[[int], str]) -> str:
    """A short name: its explanation or, without one, the tokens on which it is largest."""
    return shown["explanation"] or "  ".join(text(token) for token in shown["tokens"])
