"""What is found: a planted circuit, the most influential latents, scores."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.evals.circuits.attribution import Attribution, attribute
from skipcoder.evals.circuits.graph import circuit_of
from skipcoder.evals.circuits.influence import partial_influence
from skipcoder.evals.circuits.replacement import Replacement, layers_of
from skipcoder.trainer.coder.coder import make_coder
from skipcoder.trainer.config import CoderConfig
from tests.conftest import REPO
from tests.evals.circuits.families import VOCABULARY, D, coders_of, model_of
from tests.evals.circuits.test_attribution import IDS, T, replacement_of


class Planted(nn.Module):
    """An MLP that is its coder."""

    def __init__(self, coder: Any) -> None:
        super().__init__()
        self.coder = coder

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.coder(x).y_hat
        return result


def planted() -> tuple[Any, dict[str, Any]]:
    """A Llama without attention, whose first MLP turns direction 0 into 5 and whose second turns 5 into 9, which raises
    token 9. A distractor fires on 0, too, and writes what nothing reads."""
    model = model_of("llama", torch.float64)
    coders: dict[str, Any] = {}
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight.zero_()
        layer.input_layernorm.weight.fill_(1)
        layer.post_attention_layernorm.weight.fill_(1)
        coder = make_coder(CoderConfig(kind="transcoder", k=2, width=10), D, D).double().requires_grad_(False)
        for parameter in coder.parameters():
            parameter.zero_()
        coder.b_enc.fill_(-0.25)
        name = f"layers.{number}.mlp"
        coder.meta = {
            "hookpoint": name,
            "read": {"module": name, "side": "input"},
            "write": {"module": name, "side": "output"},
        }
        coders[name] = coder
        layer.mlp = Planted(coder)
    first, second = coders["layers.0.mlp"], coders["layers.1.mlp"]
    first.W_enc[3, 0], first.W_dec[3, 5] = 1.0, 2.0
    first.W_enc[4, 0], first.W_dec[4, 15] = 1.0, 2.0
    second.W_enc[7, 5], second.W_dec[7, 9] = 1.5, 3.0
    model.model.norm.weight.fill_(1)
    model.model.embed_tokens.weight.zero_()
    model.model.embed_tokens.weight[:D] = torch.eye(D, dtype=torch.float64)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, D, dtype=torch.float64), requires_grad=False)
    model.lm_head.weight[9, 9] = 4.0
    return model, coders


def test_a_planted_circuit_is_found() -> None:
    model, coders = planted()
    ids = torch.tensor([1, 2, 0])
    replacement = Replacement(model, layers_of(coders, model), ids, torch.tensor([True, False, False]))
    found = attribute(replacement, targets=torch.tensor([9]))
    assert found.departure() < 1e-12
    assert max(float(error.abs().max()) for error in replacement.errors) == 0
    layers: Any = [{"hookpoint": n, "number": i, "width": 10, "run": None} for i, n in enumerate(coders)]
    circuit = circuit_of(
        found, prompt="", ids=ids.tolist(), tokens=["a", "b", "c"], left_out=[0], model="", layers=layers,
        node_threshold=0.99, edge_threshold=0.999,
    )  # fmt: skip
    names = [node["id"] for node in circuit["nodes"]]
    assert sorted(names) == sorted(["0_3_2", "1_7_2", "E_1_0", "E_2_1", "E_0_2", "4_9_2"])  # and no 0_4_2
    assert sum(found.latents.latent == 4) == 1  # the distractor is active
    edges = {(names[s], names[t]): weight for s, t, weight in circuit["edges"]}
    f = float((torch.tensor(1 / D) + 1e-6).rsqrt())  # the norm of one direction
    a = f - 0.25
    g = float((torch.tensor((1 + 8 * a * a) / D) + 1e-6).rsqrt())
    b = 1.5 * g * 2 * a - 0.25
    h = float((torch.tensor((1 + 8 * a * a + 9 * b * b) / D) + 1e-6).rsqrt())
    expected = {
        ("E_0_2", "0_3_2"): f,
        ("0_3_2", "1_7_2"): 1.5 * g * 2 * a,
        ("1_7_2", "4_9_2"): 4 * (1 - 1 / 50) * h * 3 * b,
    }
    assert edges == pytest.approx(expected, rel=1e-4)
    assert circuit["replacement"] == 1 and circuit["completeness"] == 1


def test_the_most_influential_latents_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for fewer, rows are those of the whole, and hold more influence than the first ones in order."""
    replacement = replacement_of("qwen3", torch.float64)
    whole, some = attribute(replacement), attribute(replacement, max_latents=30)
    assert len(some.latents) == len(whole.latents) and len(set(some.visited.tolist())) == 30
    logits = len(whole.logits)
    torch.testing.assert_close(some.edges_RC[:logits], whole.edges_RC[:logits])
    torch.testing.assert_close(some.edges_RC[logits:], whole.edges_RC[logits:][some.visited])
    weights = whole.probabilities.double()
    influence = partial_influence(whole.edges_RC, whole.visited, weights)
    assert influence[some.visited].sum() > 1.5 * influence[:30].sum()
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("", (), {"available": 1000})())
    with pytest.raises(UserError, match="lower max_latents"):
        attribute(replacement)


def test_where_many_latents_fire_at_a_position_left_out() -> None:
    """They cost no room."""
    model, coders = model_of("llama", torch.float32), coders_of("llama", torch.float32)
    for name, coder in coders.items():
        many = make_coder(CoderConfig(kind="transcoder", k=5, width=500, activation="jumprelu"), D, D)
        many.meta, many.b_enc.data = coder.meta, torch.full((500,), 1e-3)
        for weight in (many.W_enc, many.W_dec):
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        assert many.threshold is not None
        many.threshold.data.fill_(1.0)
        coders[name] = many.requires_grad_(False)
    layers = layers_of(coders, model)
    few = Replacement(model, layers, IDS, torch.arange(T) < T - 1)
    assert all(values.shape[1] <= int((values[-1] > 0).sum()) + 1 < 400 for values in few.values)
    assert attribute(few).departure() < 1e-5


def test_unlikely_targets_have_the_scores_of_likely_ones() -> None:
    replacement = replacement_of("llama", torch.float64)
    token = torch.tensor([7])
    found = [circuit(attribute(replacement, targets=token), replacement)]
    replacement.logits_V[7] -= 60
    found.append(circuit(attribute(replacement, targets=token), replacement))
    assert found[1]["nodes"][-1]["probability"] < 1e-20
    assert found[0]["replacement"] == found[1]["replacement"] and found[0]["completeness"] == found[1]["completeness"]
    assert max(node["influence"] for node in found[1]["nodes"]) > 0.5


def test_more_logits_than_the_vocabulary_has() -> None:
    assert (
        len(attribute(replacement_of("llama", torch.float64), max_logits=10**4, probability=1.0).logits) == VOCABULARY
    )


def circuit(found: Attribution, replacement: Replacement) -> Any:
    names = [layer.hookpoint for layer in replacement.layers]
    layers: Any = [{"hookpoint": n, "number": i, "width": 40, "run": None} for i, n in enumerate(names)]
    return circuit_of(
        found, prompt="", ids=IDS.tolist(), tokens=["w"] * T, left_out=[0], model="", layers=layers,
        node_threshold=0.8, edge_threshold=0.98,
    )  # fmt: skip


def test_the_numbers_of_the_page_are_those_measured() -> None:
    page = (REPO / "docs" / "circuits.md").read_text()
    facts = json.loads((REPO / "benchmarks" / "circuits-2-cores-2026-11-27.json").read_text())
    for one in facts["prompts"]:
        row = f"| `{one['prompt']}` | {one['replacement']:.2f} | {one['completeness']:.2f} "
        for where in ("real", "replacement"):
            low, high = one["verified"][where]["correlation_ci"]
            row += f"| {one['verified'][where]['correlation']:.2f} [{low:.2f}, {high:.2f}] "
        assert row + "|" in page
    of_set = facts["set"]
    assert f"FVU {min(of_set['fvu_by_layer']):.2f}\nto {max(of_set['fvu_by_layer']):.2f}" in page
    assert f"from {of_set['ce_clean']:.2f} to {of_set['ce_spliced']:.2f} nats" in page
    assert f"alone it is {of_set['ce_skip_only']:.2f}, with\nno MLPs {of_set['ce_zero']:.2f}" in page
    assert f"{facts['linear_seconds'] + facts['edges_seconds']:.1f} s, {facts['ratio']:.1f} times as fast" in page
    assert f"after {facts['page_seconds']:.1f} s" in page
