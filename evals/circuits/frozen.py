"""Hold a model's attention patterns and norm denominators fixed, so that its residual stream is linear.

The model is transformers' own. Its attention goes through an attention function registered there, which keeps the
pattern that the model's own eager function computes and lets gradients pass by values alone. Each norm becomes a
product with a fixed factor per token. Both are taken in the first forward pass and used again in all later ones.

Legend: B rows, H heads, T positions, D width.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError

NAME = "skipcoder_frozen"
_active: list["Frozen"] = []


class Frozen:
    """The attention patterns and norm factors of one prompt."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.patterns: dict[nn.Module, Tensor] = {}
        """[1, H, T, T] of each attention module."""
        self.norms: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """Of each norm: gain times factor [1, T, D], and bias."""

    @contextmanager
    def held(self) -> Iterator[None]:
        """While active, forward passes take patterns and factors from here; the first one puts them here."""
        _register()
        with ExitStack() as stack:
            # A configuration passes its value on to its parts, which come after it: so it is restored before them.
            before = [(config, config._attn_implementation) for config in _configs(self.model)]
            for config, name in reversed(before):
                stack.callback(setattr, config, "_attn_implementation", name)
            for config, _ in before:
                config._attn_implementation = NAME
            for name, module in self.model.named_modules():
                if is_norm(module):
                    stack.callback(_restore, module, module.__dict__.get("forward"))
                    module.__dict__["forward"] = self._norm(name, module)
            _active.append(self)
            stack.callback(_active.pop)
            yield

    def _norm(self, name: str, norm: nn.Module) -> Callable[..., Tensor]:
        original = norm.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs:
                raise UserError(f"{name} ({type(norm).__name__}) is called with more than activations: no rule for it")
            centred = x - x.mean(-1, keepdim=True) if _centres(norm) else x
            if norm not in self.norms:
                self.norms[norm] = _factor(name, norm, original, x.detach(), centred.detach())
            scale, bias = self.norms[norm]
            return centred * scale + bias

        return forward


def _restore(module: nn.Module, forward: Any) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm that there is a rule for."""
    return "RMSNorm" in type(module).__name__ or _centres(module)


def _centres(module: nn.Module) -> bool:
    return "LayerNorm" in type(module).__name__


@torch.no_grad()
def _factor(
    name: str, norm: nn.Module, original: Callable[[Tensor], Tensor], x: Tensor, centred: Tensor
) -> tuple[Tensor, Tensor]:
    """What x [..., D], or x less its mean, is multiplied by, and what is added, to give the norm's output."""
    y, bias = original(x), original(torch.zeros_like(x[..., :1, :]))
    weight = getattr(norm, "weight", None)
    ones = torch.ones_like(bias)
    gain = (ones if weight is None else weight * ones) if _centres(norm) else original(ones)
    along = gain * centred
    factor = ((y - bias) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp_min(1e-30)
    scale = gain * factor
    if float((centred * scale + bias - y).abs().max()) > 1e-4 * float(y.abs().max()):
        raise UserError(f"{name} ({type(norm).__name__}) does not scale its input by one factor per token: no rule")
    return scale, bias


def _configs(model: nn.Module) -> list[Any]:
    found = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "model_type")}
    return [config for config in found.values() if hasattr(config, "_attn_implementation")]


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["eager"])


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: [B, H, T, ...] in, [B, T, H, ...] out."""
    patterns = _active[-1].patterns
    if module not in patterns:
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if eager is None:
            raise UserError(f"{type(module).__name__} has no eager attention: no rule for it")
        with torch.no_grad():
            patterns[module] = eager(module, query, key, value, attention_mask, **options)[1]
    pattern = patterns[module]
    value = value.repeat_interleave(pattern.shape[1] // value.shape[1], 1)
    return (pattern.to(value.dtype) @ value).transpose(1, 2).contiguous(), None
