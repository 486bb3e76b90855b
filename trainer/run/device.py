"""Choose the device to run on, and bring coders there."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from skipcoder.errors import UserError


def pick_device(asked: str | None, key: str = "train.device") -> str:
    """Return the device asked for, if available; if none is asked for, cuda before cpu."""
    if asked is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"{key}={asked}, but torch sees no GPU here; use cpu, or leave it null")
    try:
        return str(torch.empty(0, device=asked).device)
    except RuntimeError as error:
        raise UserError(f"{key}={asked}: {str(error).splitlines()[0]}") from None


@contextmanager
def on_device(modules: Iterable[nn.Module], device: str) -> Iterator[None]:
    """While active, modules are on a device, without gradients. What they held stays in memory, so that nothing is
    copied back."""
    tables: list[dict[str, Any]] = [
        table for root in modules for module in root.modules() for table in (module._parameters, module._buffers)
    ]
    held = [dict(table) for table in tables]
    try:
        for table in tables:
            for name, tensor in table.items():
                if isinstance(tensor, nn.Parameter):
                    table[name] = nn.Parameter(tensor.detach().to(device), requires_grad=False)
                elif tensor is not None:
                    table[name] = tensor.to(device)
        yield
    finally:
        for table, here in zip(tables, held, strict=True):
            table.update(here)
