"""Spliced models equal models with a plain forward hook, bit for bit."""

from typing import Any

import pytest
import torch
import transformers as tf

from skipcoder.evals.core.passes import ablation
from skipcoder.pipeline.model.sites import Site, replacing

IN, OUT = Site("layers.1.mlp", "input"), Site("layers.1.mlp", "output")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 400, (5, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_identity_splice_changes_nothing(lm: Any, tokens: torch.Tensor) -> None:
    plain = lm(tokens).logits
    mlp = lm.base_model.layers[1].mlp
    forward = type(mlp).forward
    for read, write, replace in (
        (OUT, OUT, lambda y: y),
        (IN, IN, lambda x: x),
        (IN, OUT, lambda x: forward(mlp, x)),
    ):
        with replacing(lm, read, write, replace):
            assert torch.equal(lm(tokens).logits, plain)
    assert torch.equal(lm(tokens).logits, plain)  # the hooks are gone
    assert not mlp._forward_hooks and not mlp._forward_pre_hooks


@torch.no_grad()
def test_equals_a_plain_forward_hook(lm: Any, tokens: torch.Tensor) -> None:
    W = torch.randn(24, 24)
    handle = lm.base_model.layers[1].mlp.register_forward_hook(lambda _, args, out: (args[0].float() @ W).to(out.dtype))
    wanted = lm(tokens).logits
    handle.remove()
    with replacing(lm, IN, OUT, lambda x: x.float() @ W):
        assert torch.equal(lm(tokens).logits, wanted)


@torch.no_grad()
def test_kept_positions_pass_unchanged(lm: Any, tokens: torch.Tensor) -> None:
    plain = lm(tokens).logits
    keep = torch.ones(tokens.shape, dtype=torch.bool)
    with replacing(lm, IN, OUT, ablation(torch.zeros(24)), keep):
        assert torch.equal(lm(tokens).logits, plain)
    keep[:, 7:] = False
    with replacing(lm, IN, OUT, ablation(torch.zeros(24)), keep):
        logits = lm(tokens).logits
    assert torch.equal(logits[:, :7], plain[:, :7]) and not torch.equal(logits[:, 7:], plain[:, 7:])


@torch.no_grad()
def test_a_module_that_only_gemma_has() -> None:
    """Reads the MLP's input, writes behind the norm that follows it."""
    config = tf.Gemma2Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, vocab_size=50,
    )  # fmt: skip
    lm = tf.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(10)[None]
    layer = lm.base_model.layers[1]
    with replacing(
        lm,
        Site("layers.1.mlp", "input"),
        Site("layers.1.post_feedforward_layernorm", "output"),
        lambda x: layer.post_feedforward_layernorm.forward(layer.mlp.forward(x)),
    ):
        spliced = lm(tokens).logits
    torch.testing.assert_close(spliced, lm(tokens).logits)
    with (
        pytest.raises(ValueError, match=r"no module 'layers.9.mlp'"),
        replacing(lm, Site("layers.9.mlp", "input"), OUT, lambda x: x),
    ):
        pass
