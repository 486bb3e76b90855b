"""Neuronpedia's files: keys and limits of what reads them (sources: evals/export/neuronpedia.py)."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcoder.errors import UserError
from skipcoder.evals.export.export import export
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train
from skipcoder.trainer.formats.config import ExportConfig, NeuronpediaConfig, Target
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow
FEATURE: dict[str, Any] = {
    "modelId": str, "layer": str, "index": str, "creatorId": str, "createdAt": str, "maxActApprox": float,
    "hasVector": bool, "vector": list, "hookName": str, "neuron_alignment_indices": list,
    "neuron_alignment_values": list, "neuron_alignment_l1": list, "correlated_neurons_indices": list,
    "correlated_neurons_pearson": list, "correlated_neurons_l1": list, "correlated_features_indices": list,
    "correlated_features_pearson": list, "correlated_features_l1": list, "neg_str": list, "neg_values": list,
    "pos_str": list, "pos_values": list, "frac_nonzero": float, "freq_hist_data_bar_heights": list,
    "freq_hist_data_bar_values": list, "logits_hist_data_bar_heights": list, "logits_hist_data_bar_values": list,
    "decoder_weights_dist": list, "sourceSetName": str,
}  # fmt: skip
ACTIVATION: dict[str, Any] = {
    "id": str, "tokens": list, "index": str, "layer": str, "modelId": str, "maxValue": float,
    "maxValueTokenIndex": int, "minValue": float, "values": list, "creatorId": str, "dfaValues": list,
    "lossValues": list, "binMin": (int, float), "binMax": float, "binContains": (int, float), "dataIndex": str,
}  # fmt: skip


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in gzip.decompress(file.read_bytes()).decode().splitlines()]


def written(store: ActivationStore, folder: Path, **names: str) -> Path:
    """The export of a run that is trained first."""
    run = folder / "run"
    train(config(store), run)
    named = NeuronpediaConfig(**names)
    return export(
        ExportConfig(run=str(run), format=Target.neuronpedia, out=str(folder / "np"), neuronpedia=named), [run]
    )


def test_files(store: ActivationStore, tmp_path: Path) -> None:
    folder = written(store, tmp_path, model="tiny-llama", set="mine") / "tiny-llama" / "1-mine"
    index = LatentIndex(Run.open(tmp_path / "run"), store)
    alive = np.nonzero(index.counts)[0].tolist()
    tables = {
        name: json.loads((folder / f"{name}.jsonl").read_text()) for name in ("release", "model", "sourceset", "source")
    }
    assert tables["source"]["id"] == "1-mine" and tables["source"]["setName"] == tables["sourceset"]["name"] == "mine"
    assert tables["sourceset"]["releaseName"] == tables["release"]["name"]
    assert {row["creatorId"] for row in tables.values()} == {NeuronpediaConfig().creator_id}
    features = [row for file in sorted(folder.glob("features/*")) for row in rows(file)]
    activations = [row for file in sorted(folder.glob("activations/*")) for row in rows(file)]
    assert sorted(int(row["index"]) for row in features) == alive
    assert len({tuple(row) for row in features}) == len({tuple(row) for row in activations}) == 1  # keys, in order
    for row, keys in [(row, FEATURE) for row in features] + [(row, ACTIVATION) for row in activations]:
        assert all(isinstance(row[key], kind) for key, kind in keys.items()), row
        assert row["modelId"] == "tiny-llama" and row["layer"] == "1-mine"
    assert len({row["id"] for row in activations}) == len(activations) and {len(r["id"]) for r in activations} == {25}
    latent = alive[0]
    firing, mine = index.of(latent), [row for row in activations if row["index"] == str(latent)]
    assert mine[0]["maxValue"] == pytest.approx(float(firing.value.max()), abs=1e-3) == features[0]["maxActApprox"]
    assert max(mine[0]["values"]) == pytest.approx(mine[0]["maxValue"], abs=1e-3)
    assert mine[0]["values"][mine[0]["maxValueTokenIndex"]] == max(mine[0]["values"])
    assert features[0]["frac_nonzero"] == pytest.approx(len(firing.value) / index.tokens.size, rel=1e-3)
    assert sum(features[0]["logits_hist_data_bar_heights"]) == 400 and len(features[0]["pos_str"]) == 10
    assert features[0]["pos_values"] == sorted(features[0]["pos_values"], reverse=True)
    bodies = [json.loads(file.read_text()) for file in folder.glob("upload/*")]
    uploaded = [feature for body in bodies for feature in body["features"]]
    assert all(len(body["features"]) <= 128 and body["source"] == "1-mine" for body in bodies)
    assert len({feature["index"] for feature in uploaded}) == len(uploaded) == len(alive)
    for feature in uploaded:
        assert feature["activations"] and len(feature["topLogits"]) <= 20 and len(feature["bottomLogits"]) <= 20
        for activation in feature["activations"]:
            assert 1 <= len(activation["tokens"]) == len(activation["values"]) <= 1024
            assert activation["quantileFraction"] is None or 0 <= activation["quantileFraction"] <= 1


def test_names_that_it_refuses(store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neuronpedia\.set=Mine, again: lower case"):
        written(store, tmp_path, set="Mine, again")
    assert not (tmp_path / "np").exists()


def test_the_package_s_own_types_take_the_bodies(store: ActivationStore, tmp_path: Path) -> None:
    """Opt-in: pip install neuronpedia."""
    types = pytest.importorskip("neuronpedia.np_activation")
    for file in written(store, tmp_path).rglob("upload/*.json"):
        for feature in json.loads(file.read_text())["features"]:
            for activation in feature["activations"]:
                types.Activation("m", "s", feature["index"], **activation)
