"""Captured activations are, bit for bit, what plain PyTorch hooks give; on every architecture."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.pipeline.capture.worker import Worker
from skipcoder.pipeline.config import CacheConfig, ModelConfig
from skipcoder.pipeline.model.hookpoints import Hookpoint, layers_needed, resolve
from skipcoder.pipeline.model.hooks import argument, capture
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.attrs import model_config

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=99,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GEMMA = {"layers.*.mlp": "layers.*.post_feedforward_layernorm"}
ARCHITECTURES: dict[str, tuple[Any, str, dict[str, str]]] = {
    "llama": (tf.LlamaConfig(**SMALL), "layers.*.mlp", {}),
    "qwen3": (tf.Qwen3Config(**SMALL), "layers.*.mlp", {}),
    "gemma2": (tf.Gemma2Config(**SMALL), "layers.*.mlp", GEMMA),
    "gemma3": (tf.Gemma3TextConfig(**SMALL), "layers.*.mlp", GEMMA),
    "mixtral": (tf.MixtralConfig(**SMALL, num_local_experts=4), "layers.*.mlp", {}),
    "gpt_neox": (
        tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}),
        "layers.*.mlp",
        {},
    ),
    "gpt2": (
        tf.GPT2Config(n_embd=32, n_layer=4, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
        "h.*.mlp",
        {},
    ),
    "opt": (
        tf.OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4, vocab_size=99,
                     word_embed_proj_dim=32),
        "decoder.layers.*.fc1",
        {"decoder.layers.*.fc1": "decoder.layers.*.fc2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_plain_hooks(name: str) -> None:
    config, pattern, write_modules = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = tf.AutoModel.from_config(config, dtype=torch.bfloat16).eval()
    hookpoints = resolve([pattern], write_modules, [n for n, _ in model.named_modules()])
    assert len(hookpoints) == 4
    tokens = torch.randint(3, 99, (3, 7))
    seen: dict[str, Tensor] = {}
    handles = []
    for h in hookpoints:
        read, write = model.get_submodule(h.read), model.get_submodule(h.write)
        handles += [
            read.register_forward_hook(lambda _, args, out, n=h.name: seen.update({n + "/in": args[0].clone()})),
            write.register_forward_hook(
                lambda _, args, out, n=h.name: seen.update({n + "/out": (out[0] if isinstance(out, tuple) else out)})
            ),
        ]
    with torch.no_grad():
        model(tokens)
    for handle in handles:
        handle.remove()
    wanted = hookpoints[1:3]  # stops before the last layer
    pairs = capture(model, wanted, tokens)
    assert list(pairs) == [h.name for h in wanted]
    for name_, (x, y) in pairs.items():
        assert x.dtype == torch.bfloat16
        assert torch.equal(x, seen[name_ + "/in"].flatten(0, -2))
        assert torch.equal(y, seen[name_ + "/out"].flatten(0, -2))


def test_forward_stops_after_the_last_hooked_module() -> None:
    model = tf.AutoModel.from_config(tf.LlamaConfig(**SMALL)).eval()
    ran = []
    model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    capture(model, [Hookpoint("layers.1.mlp", "layers.1.mlp", "layers.1.mlp")], torch.ones(1, 3, dtype=torch.long))
    assert not ran


class _Odd(nn.Module):
    """Calls its block by keyword and gets a tuple; its widths differ."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.lin = lin = nn.Linear(4, 6)
        self.block.forward = lambda *, hidden, flag: (lin(hidden), flag)

    def forward(self, tokens: Tensor, use_cache: bool) -> Tensor:
        return self.block(flag=True, hidden=tokens[..., None].float().expand(-1, -1, 4))[0]


def test_keyword_calls_tuple_outputs_and_unequal_widths() -> None:
    x, y = capture(_Odd(), [Hookpoint("block", "block", "block")], torch.ones(2, 3, dtype=torch.long))["block"]
    assert (x.shape, y.shape) == ((6, 4), (6, 6))
    with pytest.raises(TypeError, match="without a tensor"):
        argument((), {"flag": True})


def test_globs_are_resolved_in_natural_order_without_repeats() -> None:
    modules = [f"layers.{i}.mlp" for i in range(12)] + ["layers"]
    found = resolve(["layers.1*.mlp", "layers.2.mlp", "layers.10.mlp"], {}, modules)
    assert [h.name for h in found] == ["layers.1.mlp", "layers.2.mlp", "layers.10.mlp", "layers.11.mlp"]
    assert layers_needed(found) == 12
    assert layers_needed([Hookpoint("mlp", "mlp", "mlp")]) is None


def test_a_pattern_that_matches_nothing_lists_what_is_there() -> None:
    with pytest.raises(
        UserError, match=r"'layers.7.mpl' matches no module.*did you mean .*layers.7.mlp.*layers.\*.mlp"
    ):
        resolve(["layers.7.mpl"], {}, [f"layers.{i}.mlp" for i in range(12)])
    with pytest.raises(UserError, match=r"leads from 'a.0' to 'b.0', which does not exist"):
        resolve(["a.*"], {"a.*": "b.*"}, ["a.0"])


@pytest.mark.cli
def test_memory_of_a_worker_does_not_grow_with_its_units(
    tmp_path: Path, cache_config: Callable[..., CacheConfig], capture_here: Callable
) -> None:
    """A hundred units of 0.4 MB of activations each: had they been kept, it would be 40 MB."""
    store = capture_here(cache_config(tmp_path / "s.zarr", ("layers.*.mlp",), rows=200, unit_rows=100))
    worker = Worker(store.place.address, model_config(store.attrs), 1, "cpu")
    sizes = []
    for _ in range(100):
        commit.withdraw(store.place, 1)
        assert worker({"item": np.array([1])})["error"] == [""]
        sizes.append(psutil.Process().memory_info().rss)
    assert max(sizes[50:]) - max(sizes[:50]) < 10e6


def test_a_model_without_sdpa_runs_with_eager_attention(
    tiny_model: Path, cache_config: Any, capture_here: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Gemma-2 needs no setting: eager attention, and y behind its norm; the store remembers both."""
    shutil.copytree(tiny_model, tmp_path / "model")
    torch.manual_seed(0)
    gemma: Any = tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL | {"vocab_size": 400}))
    gemma.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    cfg = cache_config(tmp_path / "gemma.zarr", rows=8)
    cfg.model = ModelConfig(name="gemma", id=str(tmp_path / "model"))
    store = capture_here(cfg)
    assert store.attrs["identity"]["model"]["attention"] == store.attrs["model"]["attention"] == "eager"
    assert store.attrs["hookpoints"]["layers.1.mlp"]["write"] == "layers.1.post_feedforward_layernorm"
    said = capsys.readouterr().out
    assert "no sdpa" in said and "layers.1.mlp: y is the output of layers.1.post_feedforward_layernorm" in said
    cfg.model.attention = None
    capture_here(cfg)
    assert "complete, nothing to do" in capsys.readouterr().out
