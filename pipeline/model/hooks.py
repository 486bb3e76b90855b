"""Run a model over rows of tokens and return what enters and leaves the hooked modules.

Legend: B rows, T positions, D and E widths.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.errors import UserError
from skipcoder.pipeline.model.hookpoints import Hookpoint


class _AllCapturedError(Exception):
    """Raised to end the forward pass once the last hooked module has run."""


def first_tensor(value: Any) -> Tensor:
    """The activation in a module's arguments or output, which may be a tuple."""
    while isinstance(value, tuple | list):
        value = value[0]
    if not isinstance(value, Tensor):
        raise TypeError(f"a hooked module passes {type(value).__name__}, not a tensor")
    return value


def argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A module's input: its first positional argument, else its first tensor keyword argument."""
    if args:
        return first_tensor(args)
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    if not tensors:
        raise TypeError("a hooked module was called without a tensor argument")
    return tensors[0]


def apart(places_BT: Tensor | None) -> dict[str, Tensor]:
    """Arguments of a model by which documents attend only to themselves: where positions begin anew, transformers'
    masks do (find_packed_sequence_indices)."""
    return {} if places_BT is None else {"position_ids": places_BT}


@torch.no_grad()
def refuse_if_documents_meet(model: nn.Module, hookpoints: Iterable[Hookpoint], device: str) -> None:
    """Raise UserError for a model that does not keep documents apart: if another first document changes any bit of the
    second, or the same document differs at two places."""
    hookpoints = list(hookpoints)
    tokens = torch.arange(2, 18, device=device).repeat(2, 2)
    tokens[1, :16] = tokens[1, :16].flip(0)
    places = torch.arange(16, device=device).repeat(2, 2)
    found = capture(model, hookpoints, tokens, places)
    for name, sides in found.items():
        for z in sides:
            one, other = z.view(2, 2, 16, -1).float()
            if not torch.equal(one[1], other[1]) or (one[0] - one[1]).norm() > 0.05 * one[0].norm():
                raise UserError(
                    f"data.separate=true: in {type(model).__name__} what stands before a document changes {name}; "
                    "leave it out, or choose another model.attention"
                )


@torch.no_grad()
def capture(
    model: nn.Module, hookpoints: Iterable[Hookpoint], tokens_BT: Tensor, places_BT: Tensor | None = None
) -> dict[str, tuple[Tensor, ...]]:
    """{hookpoint: its sides, of input [B*T, D] of its read module and output [B*T, E] of its write module those that it
    has}. `places_BT`: positions inside documents, which then attend only to themselves.

    The forward pass stops after the last hooked module. Tensors keep the model's dtype and device; they are
    cloned, since a later module may write into its input in place.
    """
    hookpoints = list(hookpoints)
    modules = dict(model.named_modules())
    taken: dict[tuple[str, str], Tensor] = {}
    places = {h.name: [(side, h.read if side == "input" else h.write) for side in h.sides] for h in hookpoints}
    wanted = {place for each in places.values() for place in each}

    def keep(key: tuple[str, str], value: Tensor) -> None:
        taken[key] = value.detach().reshape(-1, value.shape[-1]).clone()
        if len(taken) == len(wanted):
            raise _AllCapturedError

    handles = []
    for side, name in wanted:
        if side == "input":
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda _, args, kwargs, key=(side, name): keep(key, argument(args, kwargs)),
                    with_kwargs=True,
                )
            )
        else:
            handles.append(
                modules[name].register_forward_hook(
                    lambda _, args, output, key=(side, name): keep(key, first_tensor(output))
                )
            )
    try:
        model(tokens_BT, use_cache=False, **apart(places_BT))
    except _AllCapturedError:
        pass
    finally:
        for handle in handles:
            handle.remove()
    missing = wanted - taken.keys()
    if missing:
        raise RuntimeError(f"modules that never ran in a forward pass: {sorted(name for _, name in missing)}")
    return {name: tuple(taken[place] for place in each) for name, each in places.items()}
