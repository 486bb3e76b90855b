"""Many replacements in one pass are what each would be by itself; and what is made of the losses."""

from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from skipcoder.evals.core.ce_kl import by_position, summary
from skipcoder.evals.core.passes import Part, TokenLosses, ablation, token_losses
from skipcoder.pipeline.model.hookpoints import resolve
from skipcoder.pipeline.model.sites import Site, replacing
from tests.pipeline.capture.test_capture import ARCHITECTURES

IN, OUT = Site("layers.1.mlp", "input"), Site("layers.1.mlp", "output")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 400, (12, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_layers_below_are_not_run_and_change_nothing(name: str) -> None:
    """On every architecture, for single layers and for two at once, twice each: bit for bit the whole forward pass."""
    config, pattern, write_modules = ARCHITECTURES[name]
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    modules = [n for n, _ in lm.base_model.named_modules()]
    sites = [(Site(h.read, "input"), Site(h.write, "output"), 32) for h in resolve([pattern], write_modules, modules)]
    tokens = torch.randint(3, 99, (4, 7))
    parts = [Part(read, write, ablation(torch.linspace(-1, 1, d)), None) for read, write, d in sites]
    replacements = {"two": [parts[2], parts[3]], "third": [parts[2]], "again": [parts[2]], "first": [parts[0]]}
    ran = [0] * 4
    for i, (read, _, _) in enumerate(sites):
        lm.base_model.get_submodule(read.module).register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1))
    found = token_losses(lm, tokens, 4, replacements)
    assert ran == [2, 2, 6, 6]  # for the model as it is and for "first"; the others above only, once more to try
    for key, chosen in replacements.items():
        with replacing(lm, *chosen[0][:3]):
            if len(chosen) > 1:
                with replacing(lm, *chosen[1][:3]):
                    logits = lm(tokens, use_cache=False).logits
            else:
                logits = lm(tokens, use_cache=False).logits
        wanted = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
        assert torch.equal(found[key].ce_BT, wanted.double()), key


class Careless(torch.nn.Module):
    """Layers that write into what they are given, or hand on more than their output."""

    def __init__(self, aside: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 8)
        self.layers = torch.nn.ModuleList(torch.nn.ModuleDict({"mlp": torch.nn.Linear(8, 8)}) for _ in range(3))
        for layer in self.layers:
            assert isinstance(layer, torch.nn.ModuleDict)
            layer.forward = partial(self.run, layer["mlp"])
        self.aside, self.kept = aside, torch.zeros(())

    def run(self, mlp: torch.nn.Module, h: torch.Tensor) -> torch.Tensor:
        h += mlp(h)
        if self.aside:
            h, self.kept = h + self.kept, h.clone()
        return h

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> Any:
        h, self.kept = self.embed(tokens), torch.zeros(())
        for layer in self.layers:
            h = layer(h)
        return SimpleNamespace(logits=h @ self.embed.weight.T)


@pytest.mark.parametrize("aside", [False, True])
@torch.no_grad()
def test_layers_that_write_into_their_input_or_hand_on_more(aside: bool) -> None:
    lm, tokens = Careless(aside), torch.arange(40).view(4, 10)
    read, write = Site("layers.2.mlp", "input"), Site("layers.2.mlp", "output")
    found = token_losses(lm, tokens, 2, {"zero": [Part(read, write, ablation(torch.zeros(8)))]})
    with replacing(lm, read, write, ablation(torch.zeros(8))):
        log_q = lm(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    torch.testing.assert_close(found["zero"].ce_BT, -log_q.gather(2, tokens[:, 1:, None]).squeeze(2).double())


@torch.no_grad()
def test_cross_entropy_is_transformers_own_and_kl_is_the_formula(lm: Any, tokens: torch.Tensor) -> None:
    theirs = float(lm(tokens, labels=tokens).loss)
    zero = {"zero": [Part(IN, OUT, ablation(torch.zeros(24)))]}
    for batch_rows in (1, 5, 12):
        found = token_losses(lm, tokens, batch_rows, zero)
        assert float(found[None].ce_BT.mean()) == pytest.approx(theirs, rel=1e-3)  # bf16 model
        assert found[None].kl_BT.abs().max() == 0 and found["zero"].kl_BT.min() >= -1e-6
    log_p = lm(tokens).logits[:, :-1].double().log_softmax(-1)
    with replacing(lm, IN, OUT, ablation(torch.zeros(24))):
        log_q = lm(tokens).logits[:, :-1].double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found["zero"].kl_BT, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_identity_recovers_all_and_zero_nothing(lm: Any, tokens: torch.Tensor) -> None:
    mlp = lm.base_model.layers[1].mlp
    for i in range(1, 16):  # what the model itself would say: ablation costs then
        tokens[:, i] = lm(tokens[:, :i]).logits[:, -1].argmax(1)
    ways = {
        "zero": ablation(torch.linspace(-50, 50, 24)),
        "mean": ablation(torch.full((24,), 50.0)),
        "identity": lambda x: type(mlp).forward(mlp, x),
    }
    losses = token_losses(lm, tokens, 12, {way: [Part(IN, OUT, replace)] for way, replace in ways.items()})

    assert (losses["zero"].ce_BT.mean(1) > losses[None].ce_BT.mean(1)).all()

    def of(way: str) -> dict[str, Any]:
        named = {"spliced": losses[way], "zero": losses["zero"], "mean": losses["mean"]}
        every = {f"{n}{suffix}": v for n, v in named.items() for suffix in ("", "_all")}
        return summary(losses[None], every, np.arange(12 * 15).reshape(12, 15))

    assert of("identity")["ce_recovered_zero"] == 1 and of("identity")["ce_recovered_zero_ci"] == [1, 1]
    assert of("identity")["kl_spliced"] == 0 and all(b["ce"] == 0 for b in of("identity")["by_position"])
    assert of("zero")["ce_recovered_zero"] == 0 and of("mean")["ce_recovered_mean_all"] == 0


def test_positions() -> None:
    zero, cost = torch.zeros(2, 21, dtype=torch.float64), torch.arange(21.0, dtype=torch.float64).expand(2, 21)
    ranges = by_position(TokenLosses(zero, zero), TokenLosses(cost, 2 * cost))
    assert [(r["first"], r["last"]) for r in ranges] == [(0, 0), (1, 1), (2, 3), (4, 15), (16, 20)]
    assert [r["ce"] for r in ranges] == [0, 1, 2.5, 9.5, 18] and ranges[-1]["kl"] == 36


def test_a_share_of_a_cost_that_may_be_none_is_not_given() -> None:
    noise = torch.randn(40, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean, ablated = (TokenLosses(z, z.abs()) for z in (noise, noise.flip(0)))
    names = ("spliced", "zero", "mean", "spliced_all", "zero_all", "mean_all")
    documents = np.indices((40, 5))[0]
    result = summary(clean, dict.fromkeys(names, ablated), documents)
    assert result["ce_recovered_zero"] is result["ce_recovered_zero_ci"] is None
    assert result["ce_increase_ci"] is not None and result["ce_documents"] == 40
    assert summary(clean, dict.fromkeys(names, clean))["ce_recovered_zero"] is None


def test_what_splicing_costs_is_told_by_document_and_in_pairs() -> None:
    """Documents differ much more than what splicing does to each: clean and spliced intervals would overlap."""
    rng = torch.Generator().manual_seed(0)
    documents = np.sort(np.random.default_rng(0).integers(0, 60, (30, 20)).ravel()).reshape(30, 20)
    level = 2 * torch.randn(60, generator=rng, dtype=torch.float64)[torch.from_numpy(documents)]
    cost = 0.05 + 0.02 * torch.randn(30, 20, generator=rng, dtype=torch.float64)
    clean, spliced, zero = (TokenLosses(level + z, (level + z).exp()) for z in (0, cost, cost + 1))
    losses = {f"{n}{s}": v for n, v in (("spliced", spliced), ("zero", zero), ("mean", zero)) for s in ("", "_all")}
    result = summary(clean, losses, documents)
    assert result["ce_increase"] == pytest.approx(float(cost.mean()))
    low, high = result["ce_increase_ci"]
    assert 0.03 < low < result["ce_increase"] < high < 0.07
    assert result["ce_recovered_zero"] == pytest.approx(1 / (1 + float(cost.mean())))
    assert summary(clean, losses)["ce_increase_ci"] is None  # without documents
