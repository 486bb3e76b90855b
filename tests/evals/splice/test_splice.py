"""Coders in place of MLPs: nothing changes where nothing should, edits do what they say, attributions are gradients."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import skipcoder
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind
from tests.trainer.coders import meta, random_coder

NAMES = ("layers.0.mlp", "layers.1.mlp")
D = 24


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 400, (3, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def identity() -> SparseCoder:
    """An SAE that gives what it takes, exactly: x = ReLU(x) - ReLU(-x)."""
    coder = SparseCoder(CoderConfig(kind=Kind.sae, k=2 * D, width=2 * D), D, D)
    for weight in (coder.W_enc, coder.W_dec):
        weight.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    return coder.requires_grad_(False).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identity_generates_the_same_tokens(dtype: torch.dtype, tiny_model: Any, tokens: torch.Tensor) -> None:
    """Greedy, sampled, with and without a cache, with padding on the left; several MLPs at once."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval()
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    coders = {name: identity() for name in NAMES}
    ways: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 1.5}, {"use_cache": False}]
    for options in ways:
        options |= {"attention_mask": mask, "max_new_tokens": 12, "pad_token_id": 1}
        torch.manual_seed(0)
        plain = lm.generate(tokens, **options)
        torch.manual_seed(0)
        with skipcoder.splice(lm, coders):
            assert torch.equal(lm.generate(tokens, **options), plain)
        torch.manual_seed(0)
        with skipcoder.splice(lm, {NAMES[0]: random_coder(Kind.transcoder)}):
            assert not torch.equal(lm.generate(tokens, **options), plain)  # this test can fail


@torch.no_grad()
def test_latents_and_edits_are_those_of_the_formula(model: Any, tokens: torch.Tensor) -> None:
    coder = random_coder(Kind.skip_transcoder)
    seen: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with skipcoder.splice(model, {NAMES[1]: coder}) as spliced:
        one = spliced[NAMES[1]]
        plain = model(tokens).logits
        out = coder(seen[0])
        assert torch.equal(one.values, out.values) and torch.equal(one.indices, out.indices)
        latent = int(out.indices[0, 4, 0])
        silent = next(j for j in range(64) if not (out.indices[0, 4] == j).any())
        now = one.of(latent).flatten()
        assert float(one.of(latent)[0, 4]) == float(out.values[0, 4, 0]) > 0
        change = torch.zeros(27, 64)
        change[:, latent] = 3 * now + 1 - now
        change[:, silent] = 2.0 - one.of(silent).flatten()
        one.scale(latent, 3.0)
        one.add(latent, 1.0)
        one.set(silent, 2.0)
        edited = model(tokens).logits
        wanted = coder.skip_only(seen[0]).view(27, D)
        dense = torch.zeros(27, 64).scatter_(1, out.indices.view(27, -1), out.values.view(27, -1)) + change
        torch.testing.assert_close(one.y_hat, wanted + dense @ coder.W_dec, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(edited, plain)
        one.clear()
        assert torch.equal(model(tokens).logits, plain)
        one.ablate(latent, silent)
        one.ablate(latent)
        model(tokens)
        dense[:, [latent, silent]] = 0
        torch.testing.assert_close(one.y_hat, wanted + dense @ coder.W_dec, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="latents 0 to 63"):
            one.ablate(64)
    handle.remove()


@torch.no_grad()
def test_with_the_error_kept_only_edits_change_anything(model: Any, tokens: torch.Tensor) -> None:
    coder = random_coder(Kind.transcoder)
    plain = model(tokens).logits
    with skipcoder.splice(model, {NAMES[1]: coder}, keep_error=True) as spliced:
        assert torch.equal(model(tokens).logits, plain)
        spliced[NAMES[1]].add(5, 0.5)
        steered = model(tokens).logits
    handle = model.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out + 0.5 * coder.W_dec[5])
    torch.testing.assert_close(steered, model(tokens).logits)
    handle.remove()


@torch.no_grad()
def test_positions_left_out_of_training_pass(model: Any, tokens: torch.Tensor) -> None:
    """Also with a cache, where the model sees one token at a time, and with padding on the left."""
    coder = random_coder(Kind.transcoder)
    coder.meta = meta()
    plain, other = model(tokens).logits, None
    with skipcoder.splice(model, {NAMES[1]: coder}):
        other = model(tokens).logits
        assert torch.equal(other[:, 0], plain[:, 0]) and not torch.allclose(other[:, 1], plain[:, 1])
        steps = model(tokens[:, :4])
        rest = [model(tokens[:, i : i + 1], past_key_values=steps.past_key_values).logits for i in range(4, 9)]
        torch.testing.assert_close(torch.cat(rest, 1), other[:, 4:], rtol=1e-4, atol=1e-4)
        padded = torch.cat([torch.ones(3, 2, dtype=torch.long), tokens], 1)
        mask = (torch.arange(11) >= 2).long().expand(3, 11)
        shifted = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp_min(0)).logits
        torch.testing.assert_close(shifted[:, 2:], other, rtol=1e-4, atol=1e-4)
    with skipcoder.splice(model, {NAMES[1]: coder}, first_positions=0, special_tokens=tokens.unique().tolist()):
        assert torch.equal(model(tokens).logits, plain)


def test_attribution_is_the_gradient(model: Any, tokens: torch.Tensor) -> None:
    """Against central differences of the logit in each active latent's activation, in float64."""
    exact = copy.deepcopy(model).double()
    coders = {NAMES[0]: random_coder(Kind.skip_transcoder), NAMES[1]: random_coder(Kind.transcoder)}
    with skipcoder.splice(exact, coders) as spliced:
        one = spliced[NAMES[0]]
        logit = exact(tokens[:1]).logits[0, -1, 17]
        attribution = one.attribution(logit)
        values, indices = one.values, one.indices
        assert attribution.shape == (1, 9, 4)
        for place in range(0, 4):
            latent = int(indices[0, 8, place])
            only_here = torch.zeros(9)
            only_here[8] = 1
            h = 2e-2

            def moved(by: float, latent: int = latent, only_here: torch.Tensor = only_here) -> float:
                one.clear()
                one.edit(latent, lambda v: v + by * only_here)
                with torch.no_grad():
                    return float(exact(tokens[:1]).logits[0, -1, 17])

            slope = (moved(h) - moved(-h)) / (2 * h)
            # The later coder's choice is fixed in so small a step; coders compute in float32.
            assert float(attribution[0, 8, place]) == pytest.approx(
                slope * float(values[0, 8, place]), rel=2e-2, abs=1e-4
            )


def test_what_does_not_fit_the_model(model: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"no module 'layers\.7\.mlp'"),
        skipcoder.splice(model, {"layers.7.mlp": identity()}),
    ):
        pass
    for coder, message in (
        (random_coder(Kind.transcoder, d=12), "reads 12 dimensions, not 24"),
        (random_coder(Kind.transcoder, d_out=12), "12 dimensions cannot replace the 24 of 'layers.1.mlp'"),
    ):
        with pytest.raises(ValueError, match=message), skipcoder.splice(model, {NAMES[1]: coder}):
            model(torch.tensor([[3, 4]]))
    assert not model.model._forward_pre_hooks
