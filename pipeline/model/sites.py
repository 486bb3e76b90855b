"""Watch or replace the input or output of a module while the model runs.

Legend: B rows, T positions, D read width, E written width.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from skipcoder.pipeline.model.hooks import argument, first_tensor

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class Site(NamedTuple):
    """A place in a model: the input or the output of a module (named as in the model without its head)."""

    module: str
    side: str


@contextmanager
def replacing(
    model: nn.Module,
    read: Site,
    write: Site,
    replace: Callable[[Tensor], Tensor],
    keep_BT: Tensor | Callable[[], Tensor] | None = None,
    adds: bool = False,
    longest: Mapping[str, float] | None = None,
    note: Callable[[Tensor], object] = lambda long: None,
) -> Iterator[None]:
    """While active, the value at `write` becomes replace(value at `read`); with `adds`, that is added to it.

    `replace` maps [N, D] to [N, E]. Positions where `keep_BT` (or what it returns when called) is True stay unchanged,
    as do those where what is at either place is longer than the `longest` of its side, `input` or `output`; these are
    handed to `note`, bool [B, T].
    """
    reads, writes = _module(model, read), _module(model, write)
    seen: list[Tensor] = []

    def remember(value: Tensor) -> None:
        seen.append(value.reshape(-1, value.shape[-1]))

    def replacement(original: Tensor) -> Tensor:
        value = seen.pop()
        new = replace(value).to(original)  # a large model's layers may be on other devices than the coder
        if new.shape[-1] != original.shape[-1]:
            raise ValueError(f"{new.shape[-1]} dimensions cannot replace the {original.shape[-1]} of {write.module!r}")
        new = new.view_as(original)
        if adds:
            new = original + new
        if longest is not None:
            long = (_lengths(value) > longest[read.side]).view(original.shape[:-1])
            long = long | (_lengths(original) > longest[write.side])
            note(long)
            new = torch.where(long[..., None], original, new)
        if keep_BT is None:
            return new
        keep = (keep_BT() if callable(keep_BT) else keep_BT).to(original.device)
        return torch.where(keep.reshape(*original.shape[:-1], 1), original, new)

    handles = [
        _hook(reads, read.side, remember),
        _hook(writes, write.side, replacement),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lengths(z: Tensor) -> Tensor:
    lengths: Tensor = torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32)
    return lengths


@contextmanager
def watching(model: nn.Module, site: Site, see: Callable[[Tensor], object]) -> Iterator[None]:
    """While active, hand what passes a site [N, D] to `see`."""

    def act(value: Tensor) -> None:
        see(value.reshape(-1, value.shape[-1]))

    handle = _hook(_module(model, site), site.side, act)
    try:
        yield
    finally:
        handle.remove()


def _module(model: nn.Module, site: Site) -> nn.Module:
    modules: dict[str, nn.Module] = dict(getattr(model, "base_model", model).named_modules())
    if site.module not in modules:
        raise ValueError(f"this model has no module {site.module!r}; was the coder trained on another model?")
    return modules[site.module]


def _hook(module: nn.Module, side: str, act: Callable[[Tensor], Tensor | None]) -> Any:
    """Call `act` on a module's input or output; its result, unless None, replaces the value."""
    if side == "input":

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
            old = argument(args, kwargs)
            new = act(old)
            if new is None:
                return None
            if args:
                return (new, *args[1:]), kwargs
            return args, {key: new if value is old else value for key, value in kwargs.items()}

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        new = act(first_tensor(output))
        if new is None:
            return None
        return new if isinstance(output, Tensor) else type(output)((new, *output[1:]))

    return module.register_forward_hook(after)
