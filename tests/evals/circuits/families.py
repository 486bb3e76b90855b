"""Random models of every family whose circuits can be followed, and random coders for all of their layers."""

from typing import Any

import torch
import transformers

from skipcoder.trainer.coder.coder import SparseCoder, make_coder
from skipcoder.trainer.config import CoderConfig

D, LAYERS, VOCABULARY, WIDTH, K = 24, 3, 50, 40, 5
_COMMON: dict[str, Any] = {
    "hidden_size": D, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "vocab_size": VOCABULARY, "initializer_range": 0.3, "pad_token_id": None,
}  # fmt: skip
_GROUPED = _COMMON | {"num_key_value_heads": 2, "head_dim": 6}
_GEMMA = _GROUPED | {"query_pre_attn_scalar": 6, "sliding_window": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "llama": ("Llama", _GROUPED, "layers.{}.mlp", "layers.{}.mlp"),
    "mistral": ("Mistral", _GROUPED, "layers.{}.mlp", "layers.{}.mlp"),
    "qwen2": ("Qwen2", _GROUPED, "layers.{}.mlp", "layers.{}.mlp"),
    "qwen3": ("Qwen3", _GROUPED, "layers.{}.mlp", "layers.{}.mlp"),
    "gemma2": ("Gemma2", _GEMMA, "layers.{}.mlp", "layers.{}.post_feedforward_layernorm"),
    "gemma3": ("Gemma3Text", _GEMMA, "layers.{}.mlp", "layers.{}.post_feedforward_layernorm"),
    "neox": ("GPTNeoX", _COMMON, "layers.{}.mlp", "layers.{}.mlp"),
    "gpt2": ("GPT2", _COMMON | {"n_positions": 32}, "h.{}.mlp", "h.{}.mlp"),
}
"""Name: (transformers' configuration class, its arguments, module read, module written)."""


def model_of(family: str, dtype: torch.dtype) -> Any:
    """A random model of a family, its biases and norms at random, too."""
    name, arguments, *_ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**arguments)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def coders_of(family: str, dtype: torch.dtype, kind: str = "skip_transcoder") -> dict[str, SparseCoder]:
    """Random coders, one for each layer."""
    *_, read, write = FAMILIES[family]
    found = {}
    for layer in range(LAYERS):
        coder = make_coder(CoderConfig(kind=kind, k=K, width=WIDTH), D, D, seed=layer)
        generator = torch.Generator().manual_seed(layer)
        for parameter in coder.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
        name = read.format(layer)
        coder.meta = {
            "hookpoint": name,
            "read": {"module": name, "side": "input"},
            "write": {"module": write.format(layer), "side": "output"},
        }
        found[name] = coder.to(dtype).requires_grad_(False)
    return found
