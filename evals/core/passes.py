"""What a language model predicts while parts of it are replaced: every token's cross-entropy and KL divergence, for any
number of replacements in one pass over the text.

For each batch of rows the model runs once unchanged. A replacement then runs only the layers from its own on: the
outputs of the layers below are remembered and reused, so its logits are those of a whole forward pass, bit for bit.
(The first batch tests this; a model that fails the test runs whole.)

Legend: B rows, T positions, E written width.
"""

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from skipcoder.pipeline.model.hooks import apart
from skipcoder.pipeline.model.sites import Site, replacing

Replace = Callable[[Tensor], Tensor]
K = TypeVar("K", bound=Hashable)


class Part(NamedTuple):
    """What passes `write` becomes replace(what passed `read`), except where `keep_BT` is True."""

    read: Site
    write: Site
    replace: Replace
    keep_BT: Tensor | None = None


class TokenLosses(NamedTuple):
    """Losses of each predicted token (all but the first of each row), float64 [B, T - 1] on the CPU, in nats."""

    ce_BT: Tensor
    kl_BT: Tensor
    """KL(unchanged model || this)."""


def ablation(value_E: Tensor) -> Replace:
    """A replacement by one constant vector, whatever the input."""
    return lambda x_ND: value_E.expand(len(x_ND), -1)


@torch.no_grad()
def token_losses(
    model: nn.Module,
    tokens_BT: Tensor,
    batch_rows: int,
    replacements: Mapping[K, Sequence[Part]],
    advance: Callable[[int], object] = lambda tokens: None,
    places_BT: Tensor | None = None,
) -> dict[K | None, TokenLosses]:
    """Losses under each replacement, which may have parts in several layers; under None, the unchanged model's.
    `advance` is told of the tokens that each pass has read; `places_BT`: positions inside documents that attend only to
    themselves."""
    below = {key: _layers_below(model, parts) for key, parts in replacements.items()}
    skippable = list(dict.fromkeys(layer for layers in below.values() for layer in layers))
    found: dict[K | None, list[TokenLosses]] = {key: [] for key in (None, *replacements)}
    for start in range(0, len(tokens_BT), batch_rows):
        rows = slice(start, start + batch_rows)
        tokens, places = tokens_BT[rows], None if places_BT is None else places_BT[rows]
        with _remembering(skippable) as outputs:
            clean = _logits(model, tokens, places)
        if start == 0 and not _gives_the_same(model, tokens, places, below.values(), outputs, clean):
            below, skippable = dict.fromkeys(below, ()), []
        found[None].append(_losses(clean, clean, tokens))
        advance(tokens.numel())
        for key, parts in replacements.items():
            with ExitStack() as stack:
                stack.enter_context(_handing_out(below[key], outputs))
                for part in parts:
                    keep = None if part.keep_BT is None else part.keep_BT[rows]
                    stack.enter_context(replacing(model, part.read, part.write, part.replace, keep))
                found[key].append(_losses(_logits(model, tokens, places), clean, tokens))
            advance(tokens.numel())
    return {
        key: TokenLosses(*(torch.cat(losses) for losses in zip(*batches, strict=True)))
        for key, batches in found.items()
    }


def _logits(model: nn.Module, tokens_BT: Tensor, places_BT: Tensor | None) -> Tensor:
    """[B, T, V]: the last of each row predicts nothing that is there, but a row without it would have to be copied."""
    result: Tensor = model(tokens_BT, use_cache=False, **apart(places_BT)).logits
    return result


def _losses(logits_q: Tensor, logits_p: Tensor, tokens_BT: Tensor) -> TokenLosses:
    """Losses of predictions q against the unchanged model's p. A float32 vocabulary for each token is large, so tokens
    go in groups: small ones on CPUs, which fit in the cache and take a fifth of the time."""
    n = max(1, (2**24 if logits_q.is_cuda else 2**19) // logits_q.shape[-1])
    following = tokens_BT.roll(-1, 1)
    ce, kl = [], []
    columns = (logits_q.flatten(0, 1), logits_p.flatten(0, 1), following.reshape(-1, 1))
    for q, p, next_N1 in zip(*(column.split(n) for column in columns), strict=True):
        log_q, log_p = q.float().log_softmax(-1), p.float().log_softmax(-1)
        ce.append(-log_q.gather(1, next_N1).squeeze(1).double())
        difference = torch.where(log_p > -torch.inf, log_p - log_q, 0)
        kl.append((log_p.exp() * difference).sum(-1, dtype=torch.float64))
    return TokenLosses(*(torch.cat(losses).view(following.shape)[:, :-1].cpu() for losses in (ce, kl)))


def _layers_below(model: nn.Module, parts: Sequence[Part]) -> tuple[nn.Module, ...]:
    """The layers below all parts: those of the model's stack with lower numbers. Empty where module names hold no layer
    number."""
    sites = [re.match(r"(.+?)\.(\d+)\.", site.module) for part in parts for site in (part.read, part.write)]
    stacks = {site[1] for site in sites if site}
    if not all(sites) or len(stacks) != 1:
        return ()
    first = min(int(site[2]) for site in sites if site)
    trunk = getattr(model, "base_model", model)
    return tuple(trunk.get_submodule(f"{next(iter(stacks))}.{i}") for i in range(first))


def _gives_the_same(
    model: nn.Module,
    tokens_BT: Tensor,
    places_BT: Tensor | None,
    below: Iterable[tuple[nn.Module, ...]],
    outputs: dict[nn.Module, Any],
    clean: Tensor,
) -> bool:
    """Whether skipping layers changes nothing. False if layers pass on more than their output (some share keys and
    values), or are the same module at several depths."""
    for layers in set(below) - {()}:
        with _handing_out(layers, outputs):
            try:
                if not torch.equal(_logits(model, tokens_BT, places_BT), clean):
                    return False
            except (KeyError, TypeError, AttributeError):
                return False
    return True


@contextmanager
def _remembering(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    outputs: dict[nn.Module, Any] = {}
    with ExitStack() as stack:
        for layer in layers:  # copied at once: the next layer may write into what it is given
            handle = layer.register_forward_hook(lambda module, _, output: outputs.update({module: _copy(output)}))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def _handing_out(layers: Sequence[nn.Module], outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """While active, these layers compute nothing and return their remembered outputs."""
    before = {layer: layer.__dict__.get("forward") for layer in layers}
    try:
        for layer in layers:
            layer.forward = lambda *_, layer=layer, **__: _copy(outputs[layer])
        yield
    finally:
        for layer, forward in before.items():
            layer.__dict__.pop("forward", None)
            if forward is not None:
                layer.forward = forward


def _copy(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    return type(output)(map(_copy, output)) if isinstance(output, tuple | list) else output
