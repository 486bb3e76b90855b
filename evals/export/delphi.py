"""Write a run's firings as eai-delphi (0.1.3) reads them: FOLDER/HOOKPOINT/START_END.safetensors and config.json.

delphi keeps activations in float16 and expects each latent's firings in the order of the text, files that tile the
latents from 0, and all tokens in each file.
"""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from skipcoder.errors import UserError
from skipcoder.evals.latents.index import LatentIndex

LARGEST = float(np.finfo(np.float16).max)


def export(index: LatentIndex, folder: Path, splits: int = 5) -> Path:
    """Write the cache of one hookpoint; UserError where an activation is too large for float16."""
    hookpoint, context = index.run.summary["hookpoint"], index.store.context
    out = folder / hookpoint
    out.mkdir(parents=True, exist_ok=True)
    edges = np.linspace(0, index.width, splits + 1).astype(int)
    for first, end in pairwise(edges.tolist()):
        firing = [index.of(latent) for latent in range(first, end)]
        latent = np.repeat(np.arange(end - first), [len(f.position) for f in firing])
        position = np.concatenate([f.position for f in firing])
        value = np.concatenate([f.value for f in firing])
        if value.max(initial=0) > LARGEST:
            raise UserError(f"{index.run.path}: activations up to {value.max():.0f} do not fit delphi's float16")
        small = max(len(index.tokens), end - first, context) < 2**16
        locations = np.empty((len(position), 3), np.uint16 if small else np.uint32)
        locations[:, 0], locations[:, 1], locations[:, 2] = position // context, position % context, latent
        tensors = {
            "locations": locations,
            "activations": value.astype(np.float16),
            "tokens": index.tokens.astype(np.int64),
        }
        save_file(tensors, out / f"{first}_{end - 1}.safetensors")
    (out / "config.json").write_text(json.dumps(_config(index, splits), indent=2))
    return out


def _config(index: LatentIndex, splits: int) -> dict[str, Any]:
    identity = index.store.attrs["identity"]
    return {
        "dataset_repo": identity["data"]["kind"], "dataset_split": "train",
        "dataset_name": "", "dataset_column": "text",
        "batch_size": 32, "cache_ctx_len": index.store.context, "n_tokens": int(index.tokens.size), "n_splits": splits,
        "model_name": identity["model"]["id"],
    }  # fmt: skip
