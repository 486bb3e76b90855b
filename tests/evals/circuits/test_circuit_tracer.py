"""circuit-tracer finds the same edges. Skipped unless SKIPCODER_CIRCUIT_TRACER names a Python that has it:

    python3.11 -m venv ct && ct/bin/pip install torch==2.13.0 git+https://github.com/decoderesearch/circuit-tracer@4bb8c0e
    SKIPCODER_CIRCUIT_TRACER=ct/bin/python pytest tests/evals/circuits/test_circuit_tracer.py

(The package of that name on PyPI is another one.) TransformerLens, on which it stands, takes Gemma's settings from the
Hub, so Gemma is not compared.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from skipcoder.evals.circuits.attribution import attribute
from skipcoder.evals.circuits.graph import circuit_of, circuit_tracer_form
from skipcoder.evals.circuits.replacement import Replacement, layers_of
from skipcoder.trainer.formats import circuit_tracer
from tests.evals.circuits.families import VOCABULARY, WIDTH, coders_of, model_of
from tests.evals.circuits.test_attribution import IDS, LEFT_OUT, T

PYTHON = os.environ.get("SKIPCODER_CIRCUIT_TRACER")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="SKIPCODER_CIRCUIT_TRACER is not set")
SKIP = "skip_transcoder"
CASES = [("llama", SKIP), ("llama", "transcoder"), ("qwen3", SKIP), ("gpt2", SKIP)]


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_circuit_tracer_finds_the_same_edges(family: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "case"  # TransformerLens takes a model's kind from its path: no "llama" in it
    folder.mkdir()
    model, coders = model_of(family, torch.float32), coders_of(family, torch.float32, kind)
    for coder in coders.values():
        coder.meta["model"] = {"id": "case"}  # type: ignore[typeddict-item]
    found = attribute(Replacement(model, layers_of(coders, model), IDS, LEFT_OUT))
    words = [f"t{i}" for i in range(VOCABULARY)]
    layers: Any = [{"hookpoint": name, "number": i, "width": WIDTH, "run": None} for i, name in enumerate(coders)]
    circuit = circuit_of(
        found, prompt="", ids=IDS.tolist(), tokens=[words[i] for i in IDS], left_out=[0], model="case", layers=layers,
        node_threshold=0.8, edge_threshold=0.98,
    )  # fmt: skip
    if hasattr(model.config, "n_positions"):
        model.config.n_ctx = model.config.n_positions  # TransformerLens wants this older name
    model.save_pretrained(folder / "model")
    Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[-1])).save(
        str(folder / "model" / "tokenizer.json")
    )
    # It puts a special token before a prompt that does not begin with one.
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": words[int(IDS[0])], "unk_token": words[-1]}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(facts))
    circuit_tracer.write(list(coders.values()), folder / "coders")
    form = circuit_tracer_form(circuit, "case", "case", dict(enumerate(words)), {})
    (folder / "graph.json").write_text(json.dumps(form))
    (folder / "ids.json").write_text(json.dumps(IDS.tolist()))
    script = Path(__file__).with_name("in_circuit_tracer.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(PYTHON), str(script), str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = np.load(folder / "theirs.npz")

    latents = found.latents
    mine = list(zip(latents.layer.tolist(), latents.position.tolist(), latents.latent.tolist(), strict=True))
    place = {tuple(node): i for i, node in enumerate(theirs["latents"].tolist())}
    assert set(mine) == set(place) and found.logits.tolist() == theirs["logits"].tolist()
    order = [place[node] for node in mine]
    np.testing.assert_allclose(theirs["activations"][order], latents.activation, rtol=1e-4, atol=1e-6)
    n, others = len(order), found.layers * T + T
    rows = [*range(n + others, n + others + len(found.logits)), *(order[i] for i in found.visited.tolist())]
    edges, own = theirs["edges"][rows][:, [*order, *range(n, n + others)]], found.edges_RC.numpy()
    np.testing.assert_allclose(own, edges, rtol=0, atol=2e-5 * float(np.abs(edges).max()))
    np.testing.assert_allclose(theirs["scores"], [circuit["replacement"], circuit["completeness"]], atol=1e-5)
    assert theirs["kept"].tolist() == [len(circuit["nodes"]), len(circuit["edges"])]
