"""Edges are exact: they add up, they are what a naive implementation finds, and they find a planted circuit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.evals.circuits.attribution import Attribution, attribute
from skipcoder.evals.circuits.frozen import Frozen
from skipcoder.evals.circuits.replacement import Replacement, layers_of
from skipcoder.trainer.coder.coder import make_coder
from skipcoder.trainer.config import CoderConfig
from tests.evals.circuits.families import FAMILIES, LAYERS, VOCABULARY, D, K, coders_of, model_of

T = 9
IDS = torch.arange(T) * 5 % VOCABULARY
LEFT_OUT = torch.arange(T) == 0
DTYPES = {torch.float64: 1e-12, torch.float32: 1e-5}


def replacement_of(family: str, dtype: torch.dtype, kind: str = "skip_transcoder", ids: Tensor = IDS) -> Replacement:
    model = model_of(family, dtype)
    return Replacement(model, layers_of(coders_of(family, dtype, kind), model), ids, LEFT_OUT[: len(ids)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_edges_and_constants_add_up(family: str, dtype: torch.dtype) -> None:
    """Into every active latent and every logit; the constants come from a pass of their own."""
    replacement = replacement_of(family, dtype)
    found = attribute(replacement, batch=7)
    assert len(found.latents) == len(found.visited) == LAYERS * (T - 1) * K
    assert found.departure() < DTYPES[dtype]
    assert bool((found.constants_R.abs() > 0).all()) and found.edges_RC.abs().sum() > 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_linear_pass_gives_the_model_s_own_logits(family: str, dtype: torch.dtype) -> None:
    """Gemma-2 caps them afterwards. Norms of transformers compute in float32, also in a float64 model."""
    replacement = replacement_of(family, dtype)
    model = replacement.model
    logits = replacement.head(replacement.run(replacement.embedding_TD, replacement.writes).final)
    if family == "gemma2":
        logits = 30 * torch.tanh(logits / 30)
    expected = model(IDS[None]).logits[0]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    torch.testing.assert_close(replacement.logits_V, expected[-1], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_a_model_is_left_as_it_was() -> None:
    model = model_of("gemma3", torch.float32)
    before = model(IDS[None]).logits
    Replacement(model, layers_of(coders_of("gemma3", torch.float32), model), IDS, LEFT_OUT)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model(IDS[None]).logits, before)


def naive(model: Any, coders: list[Any], embedding: Tensor, writes: list[Tensor], record: list[Any]) -> list[Tensor]:
    """A Llama written out, for float64: what each MLP and, at last, the unembedding read. `record`: norm factors of the
    prompt, filled by the first pass, in which the MLPs themselves run."""
    first, factors, x, reads = not record, iter(list(record)), embedding, []
    patterns = model(IDS[None], output_attentions=True).attentions

    def norm(weight: Tensor, x: Tensor) -> Tensor:
        if first:
            record.append((x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt())
        return x * (record[-1] if first else next(factors)) * weight

    for number, layer in enumerate(model.model.layers):
        h, attention = norm(layer.input_layernorm.weight, x), layer.self_attn
        v = (h @ attention.v_proj.weight.T).view(T, 2, 6).repeat_interleave(2, 1)
        x = x + torch.einsum("hts,shd->thd", patterns[number][0], v).reshape(T, D) @ attention.o_proj.weight.T
        h = norm(layer.post_attention_layernorm.weight, x)
        reads.append(h)
        skip = (h @ coders[number].W_skip.T) * ~LEFT_OUT[:, None]
        x = x + (layer.mlp(h) if first else writes[number] + skip)
    return [*reads, norm(model.model.norm.weight, x)]


def test_edges_are_those_of_a_naive_implementation() -> None:
    """By taking sources away, one after another."""
    replacement = replacement_of("llama", torch.float64)
    found = attribute(replacement)
    model: Any = replacement.model
    model.set_attn_implementation("eager")
    coders = [layer.coder for layer in replacement.layers]
    factors: list[Any] = []
    naive(model, coders, replacement.embedding_TD, [], factors)
    whole = naive(model, coders, replacement.embedding_TD, replacement.writes, factors)

    def targets(reads: list[Tensor]) -> Tensor:
        head = model.lm_head.weight
        logits = reads[-1][-1] @ (head[found.logits] - head.mean(0)).T
        some = zip(found.latents.layer, found.latents.position, found.latents.latent, strict=True)
        latents = [reads[s][p] @ coders[s].W_enc[i] for s, p, i in some]
        return torch.cat([logits, torch.stack(latents)])

    columns = {0: 3, 1: len(found.latents) // 2, 2: found.error_column + T + 4, 3: found.token_column + 2}
    for column in columns.values():
        embedding, writes = replacement.embedding_TD.clone(), [w.clone() for w in replacement.writes]
        if column < found.error_column:
            s, p = int(found.latents.layer[column]), int(found.latents.position[column])
            coder = coders[s]
            assert coder is not None
            writes[s][p] -= found.latents.activation[column] * coder.W_dec[found.latents.latent[column]]
        elif column < found.token_column:
            s, p = divmod(column - found.error_column, T)
            writes[s][p] -= replacement.errors[s][p]
        else:
            embedding[column - found.token_column] = 0
        change = targets(whole) - targets(naive(model, coders, embedding, writes, factors))
        size = float(change.abs().max())
        assert size > 1e-3
        torch.testing.assert_close(found.edges_RC[:, column], change, rtol=1e-5, atol=1e-6 * size)


def test_batches_change_nothing() -> None:
    replacement = replacement_of("neox", torch.float64)
    one, other = attribute(replacement, batch=1), attribute(replacement, batch=50)
    torch.testing.assert_close(one.edges_RC, other.edges_RC)


def test_layers_without_a_coder() -> None:
    """Refused by name or, on request, left as they are: all of their output is an error."""
    model, coders = model_of("llama", torch.float64), coders_of("llama", torch.float64)
    del coders["layers.1.mlp"]
    with pytest.raises(UserError, match="layers 1 of 3 have no coder"):
        layers_of(coders, model)
    replacement = Replacement(model, layers_of(coders, model, keep_missing=True), IDS, LEFT_OUT)
    found: Attribution = attribute(replacement)
    assert found.departure() < 1e-12
    assert set(found.latents.layer.tolist()) == {0, 2}
    assert float(found.edges_RC[:, found.error_column + T : found.error_column + 2 * T].abs().max()) > 0


def test_what_cannot_be_followed_is_refused() -> None:
    model, coders = model_of("llama", torch.float32), coders_of("llama", torch.float32)
    sae = make_coder(CoderConfig(kind="sae", k=2, width=20), D, D)
    with pytest.raises(UserError, match="is an SAE"):
        layers_of(coders | {"layers.2.mlp": sae}, model)
    narrow = make_coder(CoderConfig(kind="transcoder", k=2, width=20), 8, 8)
    with pytest.raises(UserError, match="of another model"):
        Replacement(model, layers_of(coders | {"layers.2.mlp": narrow}, model), IDS, LEFT_OUT)

    class Gated(nn.Module):  # a part of the stream that no rule makes linear
        def forward(self, x: Tensor, **_: Any) -> tuple[Tensor, None]:
            return x * x.sigmoid(), None

    class Block(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.gate = inner, Gated()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.gate(self.inner(*args, **kwargs))[0]

    layers = layers_of(coders, model)
    model.model.layers[1].mlp.gate_proj.weight.mul_(1)  # the MLP itself may be what it likes
    model.model.norm = Block(model.model.norm)
    with pytest.raises(UserError, match="LlamaForCausalLM: what the unembedding reads is not linear"):
        Replacement(model, layers, IDS, LEFT_OUT)


def test_a_model_that_overflows_is_refused() -> None:
    model, coders = model_of("llama", torch.float32), coders_of("llama", torch.float32)
    model.model.layers[1].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(UserError, match=r"what layers\.2\.mlp reads is not linear|does not scale its input"):
        Replacement(model, layers_of(coders, model), IDS, LEFT_OUT)


def test_a_model_that_attends_in_its_own_way_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(hidden_size=D, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY)
    model = BloomForCausalLM(config).eval().requires_grad_(False)
    coders = {name.replace("layers", "h"): coder for name, coder in coders_of("llama", torch.float32).items()}
    with pytest.raises(UserError, match="BloomForCausalLM: 0 of its 3 layers attend through"):
        Replacement(model, layers_of(coders, model), IDS, LEFT_OUT)


def test_one_prompt_within_another_and_after_an_error() -> None:
    """What was patched is as before, innermost first."""
    model = model_of("llama", torch.float32)
    own = model.model.norm.forward
    model.model.norm.forward = own  # as another tool would patch it
    one, other = Frozen(model), Frozen(model)
    with pytest.raises(RuntimeError, match="stop"), one.held():
        model(IDS[None])
        with other.held():
            model(IDS[None])
        assert model.config._attn_implementation == "skipcoder_frozen"
        again = model(IDS[None]).logits
        raise RuntimeError("stop")
    assert model.model.norm.__dict__["forward"] == own and model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(IDS[None]).logits, again, rtol=1e-3, atol=1e-4)
    assert all("forward" not in layer.input_layernorm.__dict__ for layer in model.model.layers)


def test_rules_are_for_norms_that_scale_each_token() -> None:
    class OddRMSNorm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.tanh()

    model = model_of("llama", torch.float32)
    model.model.norm = OddRMSNorm()
    frozen = Frozen(model)
    with pytest.raises(UserError, match=r"model\.norm \(OddRMSNorm\) does not scale"), frozen.held():
        model(IDS[None])
