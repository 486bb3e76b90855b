"""What circuit-tracer's viewer shows of latents: FOLDER/features, for `circuit_tracer.frontend.local_server.serve(...,
features_dir=FOLDER/features)` and graphs whose `scan` begins with a slash.

    index.json.gz    for each layer {filename, offsets [M + 1]}
    layer_N.bin      for each latent the length of what follows, 4 bytes, little-endian, and its JSON, zlib

(frontend/feature_models.py, local_server.py and assets/frontend/util-cg.js of commit 4bb8c0e.)
"""

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from skipcoder.evals.config import ExamplesConfig
from skipcoder.evals.features.pages import promoted
from skipcoder.evals.latents.examples import ExampleMaker, Window
from skipcoder.evals.latents.index import LatentIndex

TOP, PARTS, WINDOW, BINS = 12, 5, 32, 24


def write(
    indices: Sequence[LatentIndex],
    model: Any,
    text: Callable[[int], str],
    folder: Path,
    advance: Callable[[int], object] = lambda latents: None,
) -> None:
    """Write the latents of all layers, whose indices come in order."""
    folder.mkdir(parents=True)
    table = []
    for layer, index in enumerate(indices):
        maker = ExampleMaker(index, ExamplesConfig(window=min(WINDOW, index.store.context)))
        up, down = promoted(model, index.run.coder.W_dec)
        name, offsets = f"layer_{layer}.bin", [0]
        with (folder / name).open("wb") as file:
            for latent in range(index.width):
                facts = _facts(maker, latent, text)
                facts["top_logits"] = [text(token) for token, _ in up[latent]]
                facts["bottom_logits"] = [text(token) for token, _ in down[latent]]
                packed = zlib.compress(json.dumps(facts).encode())
                file.write(len(packed).to_bytes(4, "little") + packed)
                offsets.append(file.tell())
                advance(1)
        table.append({"filename": name, "offsets": offsets})
    (folder / "index.json.gz").write_bytes(gzip.compress(json.dumps(table).encode(), mtime=0))


def _facts(maker: ExampleMaker, latent: int, text: Callable[[int], str]) -> dict[str, Any]:
    firing = maker.index.of(latent)
    top, spread = maker.shown(latent, firing, TOP, PARTS)
    groups = {"Top activations": top, "Equal parts of all, the largest first": spread}
    histogram, edges = np.histogram(firing.value, BINS)
    return {
        "index": latent,
        "transcoder_id": maker.index.run.summary["hookpoint"],
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(window, text) for window in windows]}
            for name, windows in groups.items()
            if windows
        ],
        "act_min": 0.0,
        "act_max": float(firing.value.max(initial=0)),
        "activation_frequency": len(firing.value) / maker.index.tokens.size,
        "histogram": histogram.tolist(),
        "quantile_values": [round(float(edge), 4) for edge in edges],
    }


def _example(window: Window, text: Callable[[int], str]) -> dict[str, Any]:
    return {
        "tokens": [text(int(token)) for token in window.tokens],
        "tokens_acts_list": [round(float(value), 3) for value in window.activations],
        "train_token_ind": int(window.activations.argmax()),
        "is_repeated_datapoint": False,
    }
