"""What a language model predicts while parts of it are replaced: every token's cross-entropy and KL divergence, for any
number of replacements in one pass over the text.

For each batch of rows the model runs once as it is. A replacement then runs only the layers from its own on: what the
layers below gave is remembered and handed out again, so its logits are those of a whole forward pass, bit for bit.

Legend: B rows, T positions, E written width.
"""

import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from skipcoder.evals.splice import Site, splice
from torch import Tensor, nn

Replace = Callable[[Tensor], Tensor]
K = TypeVar("K", bound=Hashable)


class Part(NamedTuple):
    """What passes `write` becomes replace(what passed `read`), except where `keep_BT` is True."""

    read: Site
    write: Site
    replace: Replace
    keep_BT: Tensor | None = None


class TokenLosses(NamedTuple):
    """Of each predicted token (all positions but the rows' first), float64 [B, T - 1] on the CPU, in nats."""

    ce_BT: Tensor
    kl_BT: Tensor
    """KL(the model as it is || this)."""


def ablation(value_E: Tensor) -> Replace:
    """A replacement by one constant vector, whatever comes in."""
    return lambda x_ND: value_E.expand(len(x_ND), -1)


@torch.no_grad()
def token_losses(
    model: nn.Module, tokens_BT: Tensor, batch_rows: int, replacements: Mapping[K, Sequence[Part]]
) -> dict[K | None, TokenLosses]:
    """Losses under each replacement, which may have parts in several layers; under None those of the model as it is."""
    layers = {key: _layers_below(model, parts) for key, parts in replacements.items()}
    deepest = max(layers.values(), key=len, default=[])
    found: dict[K | None, list[TokenLosses]] = {key: [] for key in (None, *replacements)}
    for start in range(0, len(tokens_BT), batch_rows):
        rows = slice(start, start + batch_rows)
        tokens = tokens_BT[rows]
        with _remembering(deepest) as outputs:
            clean = _log_probabilities(model, tokens)
        found[None].append(_losses(clean, clean, tokens))
        for key, parts in replacements.items():
            with ExitStack() as stack:
                stack.enter_context(_handing_out(layers[key], outputs))
                for part in parts:
                    keep = None if part.keep_BT is None else part.keep_BT[rows]
                    stack.enter_context(splice(model, part.read, part.write, part.replace, keep))
                found[key].append(_losses(_log_probabilities(model, tokens), clean, tokens))
    return {
        key: TokenLosses(*(torch.cat(losses) for losses in zip(*batches, strict=True)))
        for key, batches in found.items()
    }


def _log_probabilities(model: nn.Module, tokens_BT: Tensor) -> Tensor:
    return model(tokens_BT, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def _losses(log_q: Tensor, log_p: Tensor, tokens_BT: Tensor) -> TokenLosses:
    """Of predictions q where the model as it is says p; float64 from the vocabulary on."""
    ce = -log_q.gather(2, tokens_BT[:, 1:, None]).squeeze(2).double()
    if log_q is log_p:
        return TokenLosses(ce.cpu(), torch.zeros_like(ce).cpu())
    kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)
    return TokenLosses(ce.cpu(), kl.cpu())


def _layers_below(model: nn.Module, parts: Sequence[Part]) -> list[nn.Module]:
    """The layers that none of the parts touches or follows: those of the model's stack with lower numbers. None where
    module names hold no layer number."""
    sites = [re.match(r"(.+?)\.(\d+)\.", site.module) for part in parts for site in (part.read, part.write)]
    if not all(sites) or len({site[1] for site in sites if site}) != 1:
        return []
    stack = getattr(model, "base_model", model).get_submodule(next(site[1] for site in sites if site))
    return list(stack.children())[: min(int(site[2]) for site in sites if site)]


@contextmanager
def _remembering(layers: list[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    outputs: dict[nn.Module, Any] = {}
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda module, _, output: outputs.update({module: output}))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def _handing_out(layers: list[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """While active, these layers compute nothing and give what they gave before."""
    try:
        for layer in layers:
            layer.forward = lambda *_, layer=layer, **__: _copy(outputs[layer])
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _copy(output: Any) -> Any:
    """The next layer may write into what it is given."""
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copy, output)) if isinstance(output, tuple | list) else output
