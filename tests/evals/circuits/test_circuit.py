"""`python evals/circuit.py`: files, bad input, ablations, what recurs, and the page in a browser."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import skipcoder
from skipcoder import UserError
from skipcoder.evals.circuit import circuit
from skipcoder.evals.circuits import interventions
from skipcoder.evals.circuits.attribution import attribute
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.circuits.contexts import shown_latents
from skipcoder.evals.circuits.graph import cantor, circuit_tracer_form
from skipcoder.evals.circuits.influence import total_effects
from skipcoder.evals.circuits.interventions import Ablation, logit_changes, verify
from skipcoder.evals.circuits.recurring import recurring
from skipcoder.evals.circuits.trace import Tracer
from skipcoder.pipeline.store.reader import ActivationStore
from tests.conftest import REPO
from tests.evals.circuits.conftest import PROMPT
from tests.evals.circuits.test_attribution import LEFT_OUT, T, replacement_of

pytestmark = pytest.mark.slow


def test_what_is_written(traced: Path, coders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads((traced / "circuit.json").read_text())
    assert found["format"] == "skipcoder.circuit" and "".join(found["tokens"]).endswith(PROMPT)
    assert found["left_out"] == [0] and found["ids"][0] == 0  # BOS, as rows of the store begin
    assert found["departure"] < 1e-5 and 0 < found["replacement"] < 1 and 0 < found["completeness"] < 1
    assert [layer["run"] for layer in found["layers"]] == [str(coders / f"layers.{i}.mlp") for i in range(3)]
    assert not any(n["position"] == 0 and n["kind"] in ("latent", "error") for n in found["nodes"])
    assert {node["kind"] for node in found["nodes"]} == {"latent", "error", "token", "logit"}
    order = {(n["layer"], n["kind"] == "logit") for n in found["nodes"]}
    assert (-1, False) in order and (3, True) in order
    for source, target, weight in found["edges"]:
        a, b = found["nodes"][source], found["nodes"][target]
        assert a["layer"] < b["layer"] and a["position"] <= b["position"] and weight != 0
    assert found["verified"]["influential"] == 4 and found["verified"]["random"] == 4


def test_circuit_tracer_s_form(traced: Path) -> None:
    """Keys and types of Neuronpedia's graph-schema.json (commit b8efe84) and circuit-tracer's nodes (4bb8c0e)."""
    found, own = (json.loads((traced / f"{name}.json").read_text()) for name in ("circuit_tracer", "circuit"))
    metadata: dict[str, type] = {"slug": str, "scan": str, "prompt": str, "prompt_tokens": list, "schema_version": int}
    assert all(isinstance(found["metadata"][key], kind) for key, kind in metadata.items())
    keys = {
        "node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "jsNodeId": str,
        "clerp": str, "token_prob": float, "is_target_logit": bool, "run_idx": int,
        "reverse_ctx_idx": int,
    }  # fmt: skip
    for node in found["nodes"]:
        assert all(isinstance(node[key], kind) for key, kind in keys.items()), node
    ids = [node["node_id"] for node in found["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all(link["source"] in ids and link["target"] in ids for link in found["links"])
    assert len(found["links"]) == len(own["edges"])
    latent = next(node for node in found["nodes"] if node["feature_type"] == "cross layer transcoder")
    layer, number, position = latent["node_id"].split("_")
    assert latent["feature"] == cantor(int(layer), int(number)) and latent["jsNodeId"] == f"{layer}_{number}-0"
    assert latent["layer"] == layer and latent["ctx_idx"] == int(position)
    logit = next(node for node in found["nodes"] if node["feature_type"] == "logit")
    assert logit["layer"] == "4" and logit["influence"] is None and latent["influence"] <= 1
    assert sum(node["is_target_logit"] for node in found["nodes"]) == 1
    assert logit["clerp"].startswith('Output "') and "(p=0." in logit["clerp"]
    assert cantor(1, 2) == 8 and len({cantor(a, b) for a in range(30) for b in range(30)}) == 900


def test_ablations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacement model's change is that of a run in which it was computed by hand; the graph's prediction is
    exact where everything that it holds fixed is held fixed."""
    replacement = replacement_of("llama", torch.float64)
    found = attribute(replacement)
    lat, logits = found.latents, len(found.logits)
    total = total_effects(found.edges_RC[:logits], found.edges_RC[logits:], found.visited, found.values_R[logits:])

    def responding(writes: list[Any], without: int) -> torch.Tensor:
        """Layer by layer, with the choice of latents and everything frozen: activations follow what is read."""
        values = [v.clone() for v in replacement.values]
        for s in range(len(values)):
            reads = replacement.run(replacement.embedding_TD, writes).reads[s]
            coder = replacement.layers[s].coder
            assert coder is not None
            pre = (
                torch.einsum("td,tkd->tk", reads, coder.W_enc[replacement.indices[s]])
                + coder.b_enc[replacement.indices[s]]
            )
            new = torch.where(values[s] > 0, pre, 0)
            if int(lat.layer[without]) == s:
                new[int(lat.position[without])] *= (
                    replacement.indices[s][int(lat.position[without])] != lat.latent[without]
                )
            written = (new[:, :, None] * coder.W_dec[replacement.indices[s]]).sum(1)
            writes[s] = replacement.constants[s] + written + replacement.errors[s]
        final = replacement.run(replacement.embedding_TD, writes).final[-1]
        values_V = replacement.head(final)
        return (values_V - values_V.mean())[found.logits]

    for without in (1, 17, len(lat) - 1):
        expected = found.values_R[:logits] - responding(list(replacement.writes), without)
        torch.testing.assert_close(total[:, without], expected, rtol=1e-6, atol=1e-9)

    own = replacement.logits_V - replacement.logits_V.mean()
    every = torch.arange(len(own))
    for real in (True, False):  # with their errors, the coders give the model's own logits
        plain = interventions._logits(replacement, [None], every, real)[0]
        torch.testing.assert_close(plain, own, rtol=1e-4, atol=1e-5)
    nothing = Ablation(1, 3, 39, 0.0)  # a latent that is silent there
    assert not bool((replacement.indices[1][3] == 39).any())
    assert float(logit_changes(replacement, [nothing], every, real=False).abs().max()) < 1e-9
    some = [
        Ablation(int(lat.layer[i]), int(lat.position[i]), int(lat.latent[i]), float(lat.activation[i])) for i in (1, 60)
    ]
    for real in (True, False):
        one_by_one = torch.cat([logit_changes(replacement, [one], every, real) for one in some])
        torch.testing.assert_close(logit_changes(replacement, some, every, real, batch=2), one_by_one)
        assert float(one_by_one.abs().max()) > 1e-3
    coders = {layer.hookpoint: layer.coder for layer in replacement.layers if layer.coder is not None}
    with skipcoder.splice(replacement.model, coders, keep_error=True) as spliced:  # the same by public means
        s, p, i, _ = some[1]
        spliced[f"layers.{s}.mlp"].ablate(i, position=p)
        edited = replacement.model(replacement.ids_T[None]).logits[0, -1]
    change = (edited - edited.mean()) - own
    torch.testing.assert_close(logit_changes(replacement, [some[1]], every, real=True)[0], change, rtol=1e-3, atol=1e-4)
    fit = verify(replacement, found, 15)
    low, high = fit["replacement"]["correlation_ci"]
    assert low < fit["replacement"]["correlation"] < high and fit["influential"] == fit["random"] == 15
    shuffled = torch.randperm(found.edges_RC.shape[1], generator=torch.Generator().manual_seed(0))
    wrong = verify(replacement, _with(found, found.edges_RC[:, shuffled]), 15)
    assert abs(wrong["replacement"]["correlation"]) < fit["replacement"]["correlation"]
    monkeypatch.setattr(interventions, "ALIKE", 1)
    assert verify(replacement, found, 15)["random"] == 15
    for few in (0, 1):
        assert verify(replacement, found, few)["real"]["correlation"] is None


def _with(found: Any, edges: torch.Tensor) -> Any:
    import dataclasses

    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.init}
    return type(found)(**values | {"edges_RC": edges})


def test_many_prompts(coders: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("The stream of chunks is\n\nThe store of tokens is\nThe stream of tokens is\n")
    folders = circuit(CircuitConfig(str(coders), prompts=str(file), out=str(tmp_path / "out"), contexts=0))
    assert folders == [tmp_path / "out" / str(i) for i in range(3)]
    file.write_text("The stream of chunks is\nThe store of tokens is\n")
    circuit(CircuitConfig(str(coders), prompts=str(file), out=str(tmp_path / "out"), contexts=0))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1", "index.html", "recurring.json"]
    found = json.loads((tmp_path / "out" / "recurring.json").read_text())
    assert found["circuits"] == 2 and found["edges"][0]["circuits"] >= found["edges"][-1]["circuits"] >= 2
    names = {node["node"] for node in found["nodes"]}
    assert any(name.startswith("token") for name in names) and {e["source"] for e in found["edges"]} <= names
    circuits = [json.loads((f / "circuit.json").read_text()) for f in folders[:2]]
    again = recurring([circuits[0], circuits[0]])
    assert {n["circuits"] for n in again["nodes"]} == {2}
    into: dict[str, float] = {}
    for edge in again["edges"]:
        into[edge["target"]] = into.get(edge["target"], 0) + abs(edge["weight"])
    assert max(into.values()) <= 1 + 1e-9


@pytest.mark.cli
def test_bad_input(coders: Path, store: ActivationStore, tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "evals" / "circuit.py"), f"run={coders}"]

    def fails(*overrides: str) -> str:
        done = subprocess.run([*command, *overrides], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    assert "set either prompt='TEXT' or prompts=FILE" in fails()
    for prompt in ("Yes, we can, and", "[INST] go {on", '{"key": 1}', 'it\'s \\ "so"', "12"):  # whatever is in it
        assert "contexts=-1: must be at least 0" in fails(f"prompt={prompt}", "contexts=-1")
    partial = tmp_path / "partial"
    partial.mkdir()
    for name in ("layers.0.mlp", "layers.2.mlp"):
        (partial / name).symlink_to(coders / name)
    assert "layers 1 of 3 have no coder" in fails("prompt=The stream", f"run={partial}")

    def refuses(match: str, **settings: Any) -> None:
        with pytest.raises(UserError, match=match):
            circuit(CircuitConfig(**{"run": str(coders), "prompt": PROMPT, "out": str(tmp_path / "o"), **settings}))

    refuses("no such directory", run=str(tmp_path / "absent"))
    refuses("the prompt has 7,50. tokens; between 2 and 2,048", prompt="tokens " * 2500)
    refuses("the prompt has 1 tokens", prompt="")
    refuses("all 14 tokens of the prompt are at positions that .* left out", first_positions=99)
    refuses("is one coder, not a set", run=str(coders / "layers.1.mlp"))
    refuses("targets: .* is 2 tokens", targets=["zq"])
    refuses("cannot be read", prompt=None, prompts=str(tmp_path / "absent.txt"))
    (tmp_path / "empty.txt").write_text("\n")
    refuses("holds no prompt", prompt=None, prompts=str(tmp_path / "empty.txt"))
    (folder,) = circuit(
        CircuitConfig(str(partial), PROMPT, out=str(tmp_path / "kept"), keep_missing=True, contexts=0, targets=["s"])
    )
    found = json.loads((folder / "circuit.json").read_text())
    assert found["layers"][1]["run"] is None
    assert [n["probability"] is not None for n in found["nodes"] if n["kind"] == "logit"] == [True]


def test_the_page_s_python_runs(coders: Path, store: ActivationStore) -> None:
    (block,) = re.findall(r"```python\n(.+?)```", (REPO / "docs" / "circuits.md").read_text(), re.S)
    for there, here in (("stores/all.zarr", store.path), ("runs/set", coders), ("s.7.", "s.1."), ("4282", "5")):
        assert there in block
        block = block.replace(there, str(here))
    names: dict[str, Any] = {}
    exec(block.replace("position=13", "position=3"), names)
    assert names["logits"].shape[-1] == 400


def test_contexts_are_those_of_the_index(coders: Path, traced: Path) -> None:
    found = json.loads((traced / "circuit.json").read_text())
    tracer = Tracer(CircuitConfig(str(coders), PROMPT))
    shown = shown_latents(tracer, [found], 2)
    for name, one in shown.items():
        assert len(one["contexts"]) <= 2
        largest = [context[2] for context in one["contexts"]]
        assert largest == sorted(largest, reverse=True), name
    assert any(one["contexts"] for one in shown.values())
    form = circuit_tracer_form(found, "s", "m", {n["token"]: "x" for n in found["nodes"]}, {})
    assert form["metadata"]["prompt"] == found["prompt"]


def test_left_out_positions_are_constants() -> None:
    replacement = replacement_of("llama", torch.float64)
    found = attribute(replacement)
    assert bool(LEFT_OUT[0]) and 0 not in found.latents.position
    errors = found.edges_RC[:, found.error_column : found.token_column].view(len(found.edges_RC), -1, T)
    assert float(errors[:, :, 0].abs().max()) == 0
