"""Find the module whose output the residual stream gains: that is what a transcoder must write.

Mostly it is the MLP itself. Where a norm follows it (Gemma-2, OLMo-2) it is that norm; where the MLP adds the residual
itself (BLOOM, MPT) it is the last of its own layers. This is shown on one layer of the architecture, with random
weights: with the module's output at zero, the layer's output must be less by what the module gave, and not be zero.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.pipeline.model.hooks import first_tensor

POSITIONS = 5
INNER_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
LARGEST = 2**30
"""Parameters of a layer that is still built."""


def gaining_modules(config: Any, names: Iterable[str]) -> dict[str, str | None]:
    """For each module, return the one whose output the stream gains where the module contributes to it: itself, or one
    inside or after it in its layer; None if it cannot be shown for any. All layers count as the first of them does."""
    found: dict[str, str | None] = {}
    seen: dict[str, str | None] = {}
    model = None
    for name in names:
        numbered = re.match(r"(.*?\.)(\d+)(?=\.)", name)
        found[name] = None
        if numbered is None:
            continue
        layer, rest = numbered[1] + "0", name[numbered.end() :]
        if rest not in seen:
            try:
                model = model or _one_layer(config)
                seen[rest] = _gaining(model, layer, layer + rest)
            except Exception:  # an architecture that cannot be built small, or does not run like others
                seen[rest] = None
        gaining = seen[rest]
        found[name] = None if gaining is None else numbered[0] + gaining.removeprefix(layer)
    return found


def _one_layer(config: Any) -> nn.Module:
    from transformers import AutoModel

    config = copy.deepcopy(config)
    config.num_hidden_layers = 1
    if "layer_types" in vars(config) and config.layer_types:
        config.layer_types = config.layer_types[:1]
    config.vocab_size = 2 * POSITIONS
    config.pad_token_id = None
    for width in INNER_WIDTHS:
        if isinstance(getattr(config, width, None), int):
            setattr(config, width, min(getattr(config, width), 64))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModel.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"a layer has {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager")
        return model.eval()


@torch.no_grad()
def _gaining(model: nn.Module, layer: str, name: str) -> str | None:
    outputs, silenced = _outputs(model, layer), _outputs(model, layer, name)
    after = outputs[layer]
    if outputs[name].numel() != after.numel():
        return None

    def passes_on(other: str) -> bool:
        """Whether a module outside gives what it was given by `name`: then it gives the same everywhere without it."""
        return torch.allclose(silenced[other], silenced[other][:, :1], atol=1e-6)

    inside = [other for other in outputs if other.startswith(f"{name}.")]
    later = list(outputs)[list(outputs).index(name) + 1 :]
    for candidate in [name, *inside, *filter(passes_on, later)]:
        if candidate == layer or outputs[candidate].numel() != after.numel():
            continue
        given = outputs[candidate].view_as(after)
        without = _outputs(model, layer, candidate)[layer]
        # float32 keeps a contribution to a few parts in 10^4 of it even if the stream is a thousand times as long.
        is_gained = torch.allclose(after - without, given, rtol=1e-2, atol=1e-2 * float(given.abs().mean()))
        if is_gained and without.any():
            return candidate
    return None


def _outputs(model: nn.Module, layer: str, zero: str | None = None) -> dict[str, Tensor]:
    """What every module of a layer gives, in the order in which they end, with the output of one at zero."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], Any]:
        def keep(_: nn.Module, args: Any, output: Any) -> Any:
            try:
                tensor = first_tensor(output)
            except TypeError:
                return None
            found[name] = tensor.clone()
            if name != zero:
                return None
            none = torch.zeros_like(tensor)
            return none if isinstance(output, Tensor) else type(output)((none, *output[1:]))

        return keep

    modules = {n: m for n, m in model.named_modules() if n == layer or n.startswith(f"{layer}.")}
    with _hooked({module: hook(name) for name, module in modules.items()}):
        model(torch.arange(POSITIONS)[None], use_cache=False)
    return found


@contextmanager
def _hooked(hooks: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
