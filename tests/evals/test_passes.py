"""Many replacements in one pass are what each would be by itself; and what is made of the losses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from skipcoder.evals import bootstrap
from skipcoder.evals.behaviour import by_position, recovered, summary
from skipcoder.evals.bootstrap import interval
from skipcoder.evals.passes import Part, TokenLosses, ablation, token_losses
from skipcoder.evals.splice import Site, splice
from skipcoder.pipeline import model as models
from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.hookpoints import resolve

from tests.pipeline.test_capture import ARCHITECTURES

IN, OUT = Site("layers.1.mlp", "input"), Site("layers.1.mlp", "output")


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> Any:
    return models.load_causal_lm(ModelConfig(name="tiny", id=str(tiny_model)), "cpu")


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
    assert ran == [2, 2, 5, 5]  # once for the model as it is; below the replaced layers no more
    for key, chosen in replacements.items():
        handles = []
        with splice(lm, *chosen[0][:3]):
            if len(chosen) > 1:
                with splice(lm, *chosen[1][:3]):
                    logits = lm(tokens, use_cache=False).logits
            else:
                logits = lm(tokens, use_cache=False).logits
        wanted = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
        assert torch.equal(found[key].ce_BT, wanted.double()), (key, handles)


@torch.no_grad()
def test_cross_entropy_is_transformers_own_and_kl_is_the_formula(lm: Any, tokens: torch.Tensor) -> None:
    theirs = float(lm(tokens, labels=tokens).loss)
    zero = {"zero": [Part(IN, OUT, ablation(torch.zeros(24)))]}
    for batch_rows in (1, 5, 12):
        found = token_losses(lm, tokens, batch_rows, zero)
        assert float(found[None].ce_BT.mean()) == pytest.approx(theirs, rel=1e-3)  # bf16 model
        assert found[None].kl_BT.abs().max() == 0 and found["zero"].kl_BT.min() >= -1e-6
    log_p = lm(tokens).logits[:, :-1].double().log_softmax(-1)
    with splice(lm, IN, OUT, ablation(torch.zeros(24))):
        log_q = lm(tokens).logits[:, :-1].double().log_softmax(-1)
    wanted = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(found["zero"].kl_BT, wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_identity_recovers_all_and_zero_nothing(lm: Any, tokens: torch.Tensor) -> None:
    mlp = lm.base_model.layers[1].mlp
    ways = {
        "zero": ablation(torch.zeros(24)),
        "mean": ablation(torch.ones(24)),
        "identity": lambda x: type(mlp).forward(mlp, x),
    }
    losses = token_losses(lm, tokens, 12, {way: [Part(IN, OUT, replace)] for way, replace in ways.items()})

    def of(way: str) -> dict[str, Any]:
        named = {"spliced": losses[way], "zero": losses["zero"], "mean": losses["mean"]}
        return summary(losses[None], {f"{n}{suffix}": v for n, v in named.items() for suffix in ("", "_all")})

    assert of("identity")["ce_recovered_zero"] == 1 and of("identity")["ce_recovered_zero_ci"] == [1, 1]
    assert of("identity")["kl_spliced"] == 0 and all(b["ce"] == 0 for b in of("identity")["by_position"])
    assert of("zero")["ce_recovered_zero"] == 0 and of("mean")["ce_recovered_mean_all"] == 0
    assert recovered(clean=2.0, spliced=2.0, ablated=2.0) is None


def test_positions() -> None:
    zero, cost = torch.zeros(2, 21, dtype=torch.float64), torch.arange(21.0, dtype=torch.float64).expand(2, 21)
    ranges = by_position(TokenLosses(zero, zero), TokenLosses(cost, 2 * cost))
    assert [(r["first"], r["last"]) for r in ranges] == [(0, 0), (1, 1), (2, 3), (4, 15), (16, 20)]
    assert [r["ce"] for r in ranges] == [0, 1, 2.5, 9.5, 18] and ranges[-1]["kl"] == 36


def test_intervals_cover_what_they_promise() -> None:
    """Of 300 samples of 200 normal numbers, the mean is inside in 95 %, give or take four binomial deviations (5 %)."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        sample = rng.normal(3.0, 2.0, 200)
        low, high = interval(lambda s, n: s / n, sample, np.ones(200)) or (0, 0)
        inside += low <= 3.0 <= high
        assert high - low == pytest.approx(4 * 1.96 / 200**0.5 * (sample.std() / 2), rel=0.2)
    assert 0.90 <= inside / 300 <= 1
    assert interval(lambda s: s, np.ones(bootstrap.MIN_ROWS - 1)) is None
