"""Write a run's latents as Neuronpedia takes them, from the run's index: the model does not run.

    MODEL/LAYER-SET/release.jsonl model.jsonl sourceset.jsonl source.jsonl     for its bulk import: one row each,
                    features/batch-N.jsonl.gz activations/batch-N.jsonl.gz     and rows of BATCH latents
                    upload/batch-N.json                                        bodies for POST /api/feature/upload-batch

The rows' keys are those of SAEDashboard's exporter (neuronpedia_export.py, commit 3ea1249), the bodies' those of the
Python package neuronpedia (1.2.1). Latents that never fire are left out: both ask for activations.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import ExamplesConfig
from skipcoder.evals.explain.records import explanations, read_summary
from skipcoder.evals.features.pages import text_of, unembedding
from skipcoder.evals.latents.examples import ExampleMaker, Window
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.trainer.formats.config import NeuronpediaConfig
from skipcoder.trainer.formats.hooks import layer_of

BATCH, LOGITS, BINS, TOP, PARTS, WINDOW = 128, 10, 50, 20, 10, 64
"""Latents of a file (the API takes no more); tokens raised and lowered; bars of histograms; texts of the largest
activations; texts of equal parts of all; tokens of a text."""
LONGEST = 512
"""Characters of an explanation."""


def export(
    index: LatentIndex,
    model: Any,
    tokenizer: Any,
    cfg: NeuronpediaConfig,
    folder: Path,
    advance: Callable[[int], object] = lambda latents: None,
) -> Path:
    """Write the folder of one layer. UserError for names that Neuronpedia refuses."""
    run, coder = index.run, index.run.coder
    layer = layer_of(coder.meta["write"]["module"])
    model_id = cfg.model or str(run.summary["model"]).lower()
    name = cfg.set or f"skipcoder-{run.summary['kind'].replace('_', '-')}-{run.summary['width']}"
    for key, value in (("model", model_id), ("set", name)):
        if not re.fullmatch(r"[a-z0-9_.-]+", value):
            raise UserError(f"neuronpedia.{key}={value}: lower case, digits, '-', '_' and '.' alone")
    source, release = f"{layer}-{name}", cfg.release or name
    out, now = folder / model_id / source, datetime.now(UTC).isoformat()
    for part in ("features", "activations", "upload"):
        (out / part).mkdir(parents=True)
    for table, row in _tables(index, cfg, model_id, name, source, release, now).items():
        (out / f"{table}.jsonl").write_text(json.dumps(row) + "\n")
    judged, said = read_summary(run), explanations(run)
    maker = ExampleMaker(index, ExamplesConfig(window=min(WINDOW, index.store.context)))
    alive = np.nonzero(index.counts)[0]
    text = cache(partial(text_of, tokenizer))
    unembed_VE = unembedding(model, coder.d_out)
    for number, start in enumerate(range(0, len(alive), BATCH)):
        latents = alive[start : start + BATCH].tolist()
        features, activations, bodies = [], [], []
        for latent, logits in zip(latents, _logits(unembed_VE, coder.W_dec[torch.tensor(latents)]), strict=True):
            firing = index.of(latent)
            top, spread = maker.shown(latent, firing, TOP, PARTS)
            rows = [
                _activation(place, window, float(firing.value.max()), text)
                for place, window in enumerate([*top, *spread])
            ]
            feature = _feature(latent, index, firing.value, logits, text)
            common = {"modelId": model_id, "layer": source, "creatorId": cfg.creator_id}
            features.append({**common, **feature, "createdAt": now, "sourceSetName": name})
            for place, row in enumerate(rows):
                activations.append({"id": _id(model_id, source, latent, place), "index": str(latent), **common, **row})
            bodies.append(_body(latent, feature, rows, said.get(latent), judged))
        _write(out / "features" / f"batch-{number}.jsonl.gz", features)
        _write(out / "activations" / f"batch-{number}.jsonl.gz", activations)
        body = {"modelId": model_id, "source": source, "features": bodies}
        (out / "upload" / f"batch-{number}.json").write_text(json.dumps(body))
        advance(len(latents))
    return out


def _feature(
    latent: int, index: LatentIndex, value: np.ndarray, logits: Mapping[str, Any], text: Callable[[int], str]
) -> dict[str, Any]:
    heights, edges = np.histogram(value, BINS)
    found: dict[str, Any] = {
        "index": str(latent),
        "maxActApprox": round(float(value.max()), 4),
        "hasVector": False,
        "vector": [],
        "hookName": index.run.summary["hookpoint"],
        "frac_nonzero": float(f"{len(value) / index.tokens.size:.4g}"),
        "freq_hist_data_bar_heights": heights.tolist(),
        "freq_hist_data_bar_values": _rounded((edges[:-1] + edges[1:]) / 2),
        "decoder_weights_dist": [],
    }
    for name in (
        "neuron_alignment",
        "correlated_neurons",
        "correlated_features",
    ):  # they compare with a basis of neurons
        for part in ("indices", "values" if name == "neuron_alignment" else "pearson", "l1"):
            found[f"{name}_{part}"] = []
    for sign in ("pos", "neg"):
        found[f"{sign}_str"] = [text(token) for token in logits[f"{sign}_tokens"]]
        found[f"{sign}_values"] = _rounded(logits[f"{sign}_values"])
    found["logits_hist_data_bar_heights"] = logits["heights"]
    found["logits_hist_data_bar_values"] = _rounded(logits["centres"])
    return found


@torch.no_grad()
def _logits(unembed_VE: torch.Tensor | None, rows_NE: torch.Tensor) -> Iterable[dict[str, Any]]:
    """Of each decoder row: the tokens it raises and lowers most, and the histogram of what it adds to all logits."""
    if unembed_VE is None:
        empty: dict[str, list[Any]] = {key: [] for key in ("pos_tokens", "pos_values", "neg_tokens", "neg_values")}
        yield from ({**empty, "heights": [], "centres": []} for _ in rows_NE)
        return
    for logits in rows_NE.to(unembed_VE.device) @ unembed_VE.T:
        found: dict[str, Any] = {}
        for sign, largest in (("pos", True), ("neg", False)):
            values, tokens = logits.topk(LOGITS, largest=largest)
            found[f"{sign}_values"], found[f"{sign}_tokens"] = values.cpu().numpy(), tokens.tolist()
        low, high = float(logits.min()), float(logits.max())
        found["heights"] = [int(n) for n in torch.histc(logits.cpu(), BINS, low, high)]
        step = (high - low) / BINS
        found["centres"] = low + step * (np.arange(BINS) + 0.5)
        yield found


def _activation(place: int, window: Window, largest: float, text: Callable[[int], str]) -> dict[str, Any]:
    values = window.activations
    highest = round(float(values.max()), 4)
    top = window.kind == "top"
    return {
        "tokens": [text(int(token)) for token in window.tokens], "values": _rounded(values),
        "maxValue": highest, "maxValueTokenIndex": int(values.argmax()), "minValue": round(float(values.min()), 4),
        "binMin": -1 if top else highest, "binMax": round(largest, 4) if top else highest,
        "binContains": -1 if top else 1 / PARTS, "qualifyingTokenIndex": int(values.argmax()),
        "dataIndex": str(window.number), "dataSource": None, "dfaValues": [], "dfaTargetIndex": None,
        "dfaMaxValue": None, "lossValues": [], "logitContributions": None,
    }  # fmt: skip


def _body(
    latent: int, feature: Mapping[str, Any], rows: Iterable[Mapping[str, Any]], explanation: str | None, judged: Any
) -> dict[str, Any]:
    """A latent in the body of an upload."""
    said = [] if not explanation else [{
        "text": explanation[:LONGEST], "methodName": "skipcoder", "modelName": judged["judge"],
    }]  # fmt: skip
    return {
        "index": latent,
        "density": feature["frac_nonzero"],
        "activations": [
            {
                "tokens": row["tokens"], "values": row["values"], "quantileMax": row["binMax"],
                "quantileMin": row["binMin"],
                "quantileFraction": row["binContains"] if row["binContains"] >= 0 else None,
            }
            for row in rows
        ],
        "explanations": said,
        **{
            side: [{"token": t, "value": v} for t, v in zip(feature[f"{s}_str"], feature[f"{s}_values"], strict=True)]
            for side, s in (("topLogits", "pos"), ("bottomLogits", "neg"))
        },
    }  # fmt: skip


def _tables(
    index: LatentIndex, cfg: NeuronpediaConfig, model_id: str, name: str, source: str, release: str, now: str
) -> dict[str, dict[str, Any]]:
    """The tables of one row each."""
    creator = {"creatorId": cfg.creator_id, "createdAt": now}
    described = cfg.description or f"{index.run.summary['kind'].replace('_', ' ')}s trained with skipcoder"
    return {
        "release": {
            "name": release, "description": described, "descriptionShort": described, "urls": [],
            "creatorName": cfg.creator, "creatorNameShort": cfg.creator, "visibility": "PUBLIC", **creator,
        },
        "model": {
            "id": model_id, "instruct": "instruct" in model_id or model_id.endswith("-it"), "displayName": model_id,
            "displayNameShort": model_id, "layers": 0, "neuronsPerLayer": 0, "owner": "", "updatedAt": now, **creator,
        },
        "sourceset": {
            "modelId": model_id, "name": name, "creatorName": cfg.creator, "releaseName": release,
            "description": described, "type": "", "visibility": "PUBLIC", "hasDashboards": True, **creator,
        },
        "source": {
            "id": source, "modelId": model_id, "setName": name, "visibility": "PUBLIC", "hasDashboards": True,
            "dataset": str(index.store.attrs["identity"]["data"]["kind"]), "num_prompts": len(index.tokens),
            "num_tokens_in_prompt": index.store.context, "hfRepoId": None, "hfFolderId": None, **creator,
        },
    }  # fmt: skip


def _id(*parts: object) -> str:
    """25 characters, as their database's ids have: the same for the same row."""
    return "c" + hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 3) for value in values]


def _write(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_bytes(gzip.compress(lines.encode(), 5, mtime=0))
