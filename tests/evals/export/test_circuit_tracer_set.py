"""A set of coders for circuit-tracer, and what its viewer shows of them."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from skipcoder.errors import UserError
from skipcoder.evals.export import export as exporting
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.coder.coder_set import SparseCoderSet
from skipcoder.trainer.config import Kind
from skipcoder.trainer.formats.config import ExportConfig, Target, TopK
from skipcoder.trainer.run.run import Run
from tests.evals.export.conftest import export

pytestmark = pytest.mark.slow


def test_what_circuit_tracer_s_viewer_shows(runs: dict[Any, Path], tmp_path: Path) -> None:
    """A latent is read by the range that its layer's offsets give, as the viewer does."""
    paths = [runs[2], runs[Kind.skip_transcoder], runs[0]]
    out = export(paths, Target.circuit_tracer, tmp_path / "set", topk=TopK.thresholds, features=True)
    table = json.loads(gzip.decompress((out / "features" / "index.json.gz").read_bytes()))
    assert len(table) == 3
    run = Run.open(paths[1])
    index = LatentIndex(run, ActivationStore.open(run.store_path))
    latent = int(index.counts.argmax())
    entry = table[1]
    assert len(entry["offsets"]) == index.width + 1
    data = (out / "features" / entry["filename"]).read_bytes()[entry["offsets"][latent] : entry["offsets"][latent + 1]]
    assert int.from_bytes(data[:4], "little") == len(data) - 4
    facts = json.loads(zlib.decompress(data[4:]))
    value = index.of(latent).value
    assert facts["index"] == latent and facts["act_max"] == pytest.approx(float(value.max()))
    first = facts["examples_quantiles"][0]["examples"][0]
    assert len(first["tokens"]) == len(first["tokens_acts_list"])
    assert first["tokens_acts_list"][first["train_token_ind"]] == pytest.approx(float(value.max()), abs=1e-3)
    assert facts["activation_frequency"] == len(value) / index.tokens.size and sum(facts["histogram"]) == len(value)
    assert len(facts["top_logits"]) == 10
    with pytest.raises(UserError, match="features=true is for format=circuit_tracer"):
        ExportConfig(run="r", out="o", features=True)


def test_circuit_tracer_takes_a_run_for_each_layer(runs: dict[Any, Path], tmp_path: Path) -> None:
    layers = [runs[2], runs[0], runs[Kind.skip_transcoder]]
    out = export(layers, Target.circuit_tracer, tmp_path / "set", topk=TopK.thresholds)
    assert {p.name for p in out.iterdir() if p.suffix != ".png"} == {
        "README.md", "config.yaml", *(f"layer_{i}.safetensors" for i in range(3))}  # fmt: skip
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["feature_input_hook"] == "mlp.hook_in" and "activation" not in config
    with pytest.raises(UserError, match=r"not of layers \[0, 2\]"):
        export([runs[0], runs[2]], Target.circuit_tracer, tmp_path / "gap", topk=TopK.thresholds)
    few = SparseCoder.load(runs[0])
    few.b_enc.sub_(100)  # no latent is ever positive
    run = Run.open(runs[0])
    item = exporting.Export(run, ActivationStore.open(run.store_path), few, {})
    with pytest.raises(UserError, match=r"on (\d+) of \1 held-out tokens fewer than k=4 latents are positive"):
        exporting._suited_to_circuit_tracer(item, None)


def test_a_plain_export_of_all_layers_is_a_set(runs: dict[Any, Path], tmp_path: Path) -> None:
    out = export([runs[2], runs[Kind.skip_transcoder], runs[0]], Target.plain, tmp_path / "plain")
    assert list(SparseCoderSet.load(out)) == [f"layers.{i}.mlp" for i in range(3)]
    assert repr(SparseCoderSet.from_pretrained(str(out))).startswith("<SparseCoderSet of 3: layers.0.mlp to layers.2")
