"""y is what the residual stream gains, on tiny models of many families with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel

from skipcoder.pipeline.config import ModelConfig
from skipcoder.pipeline.model.gains import gaining_modules
from skipcoder.pipeline.model.hooks import capture, first_tensor
from skipcoder.pipeline.model.load import describe

pytestmark = pytest.mark.slow

COMMON: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 64, "vocab_size": 50,
}  # fmt: skip
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}
WIDE_HEADS: dict[str, Any] = {**COMMON, "head_dim": 8}
NORM = "post_feedforward_layernorm"
FAMILIES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "bloom": ({"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50}, "h.1.mlp", "h.1.mlp.dense_4h_to_h"),
    "codegen": (GPT | {"rotary_dim": 4}, "h.1.mlp", "h.1.mlp"),
    "cohere": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "exaone4": (COMMON, "layers.1.mlp", f"layers.1.{NORM}"),
    "falcon": (
        {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 50}, "h.1.mlp", "h.1.mlp",
    ),
    "gemma": (WIDE_HEADS, "layers.1.mlp", "layers.1.mlp"),
    "gemma2": (WIDE_HEADS, "layers.1.mlp", f"layers.1.{NORM}"),
    "gemma3_text": (WIDE_HEADS, "layers.1.mlp", f"layers.1.{NORM}"),
    "glm4": (WIDE_HEADS | {"pad_token_id": 0}, "layers.1.mlp", "layers.1.post_mlp_layernorm"),
    "gpt2": (GPT, "h.1.mlp", "h.1.mlp"),
    "gpt_neox": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "gpt_oss": (WIDE_HEADS | {"num_local_experts": 4}, "layers.1.mlp", "layers.1.mlp"),
    "gptj": (GPT | {"rotary_dim": 4}, "h.1.mlp", "h.1.mlp"),
    "granite": (COMMON | {"residual_multiplier": 0.22}, "layers.1.mlp", None),  # the stream gains 0.22 times its output
    "llama": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "mamba": ({"hidden_size": 32, "num_hidden_layers": 3, "vocab_size": 50}, "layers.1.mixer", "layers.1.mixer"),
    "mistral": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "mixtral": (COMMON | {"num_local_experts": 4}, "layers.1.mlp", "layers.1.mlp"),
    "mpt": ({"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": 50}, "blocks.1.ffn", "blocks.1.ffn.down_proj"),
    "nemotron": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "olmo": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "olmo2": (COMMON, "layers.1.mlp", f"layers.1.{NORM}"),
    "opt": (COMMON | {"ffn_dim": 64, "word_embed_proj_dim": 32}, "decoder.layers.1.fc2", "decoder.layers.1.fc2"),
    "phi": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "phi3": (COMMON | {"pad_token_id": 0}, "layers.1.mlp", "layers.1.mlp"),
    "qwen2": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "qwen3": (WIDE_HEADS, "layers.1.mlp", "layers.1.mlp"),
    "smollm3": (COMMON | {"pad_token_id": 0}, "layers.1.mlp", "layers.1.mlp"),
    "stablelm": (COMMON, "layers.1.mlp", "layers.1.mlp"),
    "starcoder2": (COMMON, "layers.1.mlp", "layers.1.mlp"),
}  # fmt: skip


def config_of(family: str, **options: Any) -> Any:
    """A configuration of the family."""
    return CONFIG_MAPPING[family](**options)


def model_of(family: str, folder: Path) -> Any:
    """A random model of the family, saved in a folder."""
    torch.manual_seed(1)
    model = AutoModel.from_config(config_of(family, **FAMILIES[family][0]), attn_implementation="eager").eval()
    with torch.no_grad():
        for p in model.parameters():  # norms and biases, too, are no longer trivial
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_y_is_what_the_stream_gains(family: str, tmp_path: Path) -> None:
    """The layer's output with the captured module's at zero, plus y, is the layer's output; nothing else was lost."""
    _, name, expected = FAMILIES[family]
    model = model_of(family, tmp_path)
    found = describe(ModelConfig(name=family, id=str(tmp_path), attention="eager"), [name], 8)
    assert found.gained[name] == expected
    if expected is None:
        return
    (hookpoint,) = found.hookpoints
    assert (hookpoint.read, hookpoint.write) == (name, expected)
    tokens = torch.randint(50, (2, 8))
    _, y = capture(model, [hookpoint], tokens)[name]
    modules = dict(model.named_modules())
    layer = modules[name.rpartition(".")[0]]

    def after(silent: bool) -> Tensor:
        seen: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
        ]
        if silent:
            hooks.append(modules[expected].register_forward_hook(zeros))
        with torch.no_grad():
            model(tokens, use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen[0].reshape(-1, 32)

    stream, rest = after(silent=False), after(silent=True)
    torch.testing.assert_close(rest + y, stream, rtol=1e-4, atol=1e-4)
    assert rest.norm() > 0.01 * stream.norm()


def zeros(_: Any, args: Any, output: Any) -> Any:
    none = torch.zeros_like(first_tensor(output))
    return none if isinstance(output, Tensor) else (none, *output[1:])


DIRECT: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "bloom": lambda layer, x: layer.mlp(x, torch.zeros_like(x)),
    "mpt": lambda layer, x: layer.ffn(x, torch.zeros_like(x)),
    "gptj": lambda layer, x: layer.mlp(x),
    "olmo2": lambda layer, x: layer.post_feedforward_layernorm(layer.mlp(x)),
}


@pytest.mark.parametrize("family", DIRECT)
def test_y_is_the_mlp_of_x(family: str, tmp_path: Path) -> None:
    """By the layer's own modules: without the residual, behind the norm."""
    name, model = FAMILIES[family][1], model_of(family, tmp_path)
    (hookpoint,) = describe(ModelConfig(name=family, id=str(tmp_path), attention="eager"), [name], 8).hookpoints
    x, y = capture(model, [hookpoint], torch.randint(50, (1, 8)))[name]
    with torch.no_grad():
        wanted = DIRECT[family](dict(model.named_modules())[name.rpartition(".")[0]], x[None])[0]
    torch.testing.assert_close(y, wanted)


def test_what_is_no_contribution_is_left_as_it_is() -> None:
    """Attention's output reaches the stream, but the MLP reads it there; parts of an MLP have other widths or are not
    what is hooked; norms before an MLP give nothing to the stream; a pattern without layers is not understood."""
    config = config_of("llama", **COMMON | {"intermediate_size": 96})
    asked = [
        "layers.1.self_attn",
        "layers.2.mlp.up_proj",
        "layers.2.mlp.down_proj",
        "layers.1.post_attention_layernorm",
    ]
    found = gaining_modules(config, [*asked, "norm"])
    assert found == dict.fromkeys([*asked, "norm"]) | {"layers.2.mlp.down_proj": "layers.2.mlp.down_proj"}
    assert config.num_hidden_layers == 3 and config.vocab_size == 50
    parallel = config_of("gptj", **FAMILIES["gptj"][0])
    assert gaining_modules(parallel, ["h.1.ln_1", "h.1.attn"]) == {"h.1.ln_1": None, "h.1.attn": "h.1.attn"}
    sandwich = config_of("gemma2", **WIDE_HEADS)
    assert gaining_modules(sandwich, ["layers.1.mlp.down_proj"]) == {"layers.1.mlp.down_proj": None}


def test_the_text_part_of_a_larger_model() -> None:
    config = config_of("gemma3", text_config=WIDE_HEADS)
    found = gaining_modules(config, ["language_model.layers.2.mlp"])
    assert found == {"language_model.layers.2.mlp": f"language_model.layers.2.{NORM}"}


def test_what_cannot_be_tried_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of("bloom", hidden_size=8192, n_head=64)
    assert gaining_modules(config, ["h.1.mlp"]) == {"h.1.mlp": None}
    assert "could not be tried (ValueError: it has" in capsys.readouterr().out


@pytest.mark.parametrize("written", ["post_attention_layernorm", "mlp"])
def test_a_named_module_stays(written: str, tmp_path: Path) -> None:
    model_of("olmo2", tmp_path)
    cfg = ModelConfig(name="o", id=str(tmp_path), write_modules={"layers.*.mlp": f"layers.*.{written}"})
    found = describe(cfg, ["layers.1.mlp"], 8)
    assert found.hookpoints[0].write == f"layers.1.{written}" != found.gained["layers.1.mlp"]
