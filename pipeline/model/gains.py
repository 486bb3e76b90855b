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
LARGEST = 2**29
"""Parameters of a layer that is still built."""


def gaining_modules(config: Any, names: Iterable[str]) -> dict[str, str | None]:
    """For each module, return the one whose output the stream gains where the module contributes to it, None if that
    cannot be shown: itself or, for an immediate part of a layer, a norm after it or, if it adds the residual itself, a
    module inside it. All layers count as the first of them does."""
    found: dict[str, str | None] = {}
    seen: dict[str, str | None] = {}
    model: nn.Module | None = None
    for name in names:
        numbered = re.match(r"(.*?\.)(\d+)(?=\.)", name)
        found[name] = None
        if numbered is None:
            continue
        part = name[numbered.end() :]
        if part not in seen:
            seen[part] = None
            try:
                model = model or _one_layer(config)
                layer = _first_layer(model, numbered[1])
                gaining = _gaining(model, layer, layer + part)
                seen[part] = None if gaining is None else gaining.removeprefix(layer)
            except Exception as error:  # an architecture that cannot be built small, or does not run like others
                print(f"one layer of this architecture could not be tried ({type(error).__name__}: {error})")
        found[name] = None if seen[part] is None else numbered[0] + str(seen[part])
    return found


def _one_layer(config: Any) -> nn.Module:
    from transformers import AutoModel

    config = copy.deepcopy(config.get_text_config())
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
        raise ValueError(f"it has {size:,} parameters")
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model: nn.Module = AutoModel.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        for p in model.parameters():  # some begin at 0
            p.add_(torch.randn_like(p), alpha=0.02)
        return model


def _first_layer(model: nn.Module, before: str) -> str:
    """Name of the first layer, where names in the whole model begin with `before` (`language_model.layers.`)."""
    names = {name for name, _ in model.named_modules()}
    parts = before.split(".")
    return next(name for i in range(len(parts)) if (name := ".".join(parts[i:]) + "0") in names)


@torch.no_grad()
def _gaining(model: nn.Module, layer: str, name: str) -> str | None:
    outputs, silenced = _outputs(model, layer), _outputs(model, layer, name)
    modules, after = dict(model.named_modules()), outputs[layer]

    def is_gained(candidate: str, without: Tensor) -> bool:
        # float32 keeps a contribution to a few parts in 10^4 of it even if the stream is a thousand times as long.
        given = outputs[candidate].view_as(after)
        same = torch.allclose(after - without, given, rtol=1e-2, atol=1e-2 * float(given.abs().mean()))
        return same and bool(given.any()) and bool(without.any())

    def passes_on(other: str) -> bool:
        """Whether a part of the layer has no matrix, and gives the same everywhere without `name`: a norm behind it."""
        is_norm = is_part(other) and all(p.ndim < 2 for p in modules[other].parameters())
        return is_norm and torch.allclose(silenced[other], silenced[other][:, :1], atol=1e-6)

    def is_part(module: str) -> bool:
        return "." not in module.removeprefix(f"{layer}.") and module != layer

    if outputs[name].numel() != after.numel():
        return None
    if is_gained(name, silenced[layer]):
        return name
    if not is_part(name):
        return None
    if not silenced[layer].any():  # the stream goes through the module
        others = [other for other in outputs if other.startswith(f"{name}.")]
    else:
        others = [other for other in list(outputs)[list(outputs).index(name) + 1 :] if passes_on(other)]
    for other in others:
        if outputs[other].numel() == after.numel() and is_gained(other, _outputs(model, layer, other)[layer]):
            return other
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
