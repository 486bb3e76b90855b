"""From a model's activations to a unit that can be written: permuted, encoded and measured where the model runs.

Nothing here waits for a GPU until `finished` or `wait` is called, so that the next forward pass can be queued behind.

Legend: N tokens of a unit, D dimensions.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.capture.writers import Found, coded_unit
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.attrs import Attributes, widths_of
from skipcoder.pipeline.store.codecs import codec_of
from skipcoder.pipeline.store.stats import sums
from skipcoder.pipeline.store.writer import CodedUnit, classes_of


class Coding(NamedTuple):
    """A unit whose arrays are computed, or queued on a GPU together with their copies into memory."""

    attrs: Attributes
    unit: int
    tokens: np.ndarray
    found: Found
    copied: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait for the device."""
        if self.copied is not None:
            self.copied.synchronize()

    def finished(self) -> CodedUnit:
        """Wait for the device. NonFiniteError if the model gave NaN or infinity."""
        self.wait()
        return coded_unit(self.attrs, self.unit, self.tokens, self.found)


class Plan(NamedTuple):
    """What is known of a unit before the model has run over it."""

    unit: int
    tokens: np.ndarray
    order_N: Tensor
    """The position in token order of each stored token, on the device."""
    classes: dict[str, Tensor]
    """Stored tokens of each class of positions, on the device."""


def plan(attrs: Attributes, unit: int, tokens: np.ndarray, device: str) -> Plan:
    """Make the plan, and send it to the device before the model keeps that busy: a copy from ordinary memory waits.

    `tokens`: the unit's rows.
    """
    identity = attrs["identity"]
    start = layout.unit_token_rows(unit, attrs["rows"], identity["unit_rows"]).start * identity["context"]
    order = layout.permutation(identity["seed"], unit, tokens.size)
    classes = classes_of(attrs, start + order, tokens.ravel()[order])
    there = {where: torch.from_numpy(c.nonzero()[0]).to(device) for where, c in classes.items()}
    return Plan(unit, tokens, torch.from_numpy(order).to(device), there)


def code(
    attrs: Attributes, plan: Plan, taken: Iterable[tuple[str, Sequence[Tensor]]], memory: Found | None = None
) -> Coding:
    """Permute, encode and measure a unit. `taken`: (hookpoint, its sides [N, D]), in token order.
    `memory`: where to copy what is found, of the size of a full unit; by default it stays where it is, on a CPU."""
    codec = codec_of(attrs["identity"]["codec"], attrs["version"])
    found: dict[Any, np.ndarray] = {}

    def take(key: Any, z: Tensor) -> None:
        if memory is None:
            found[key] = z.numpy()
        else:
            found[key] = memory[key][: len(z)] if z.dim() else memory[key]
            torch.from_numpy(found[key]).copy_(z, non_blocking=True)

    for name, sides in taken:
        for side, z in zip(widths_of(attrs["hookpoints"][name]), sides, strict=True):
            z = z[plan.order_N]
            coded = codec.encode(z)
            for suffix, rows in coded.items():
                take(f"{name}/{side}{suffix}", rows)
            values = z
            if not (codec.exact and z.dtype == torch.bfloat16):
                values = torch.empty_like(z, dtype=torch.bfloat16)
                codec.decode(coded, values)
            for where, rows in plan.classes.items():
                take(("sums", name, f"{side}/{where}"), sums(values[rows]))
                take(("lost", name, f"{side}/{where}"), _squared_distance(values, z, rows))
    copied = None
    if plan.order_N.is_cuda:
        copied = torch.cuda.Event(blocking=True)
        copied.record()
    return Coding(attrs, plan.unit, plan.tokens, found, copied)


def _squared_distance(values_ND: Tensor, z_ND: Tensor, rows: Tensor) -> Tensor:
    """float64 []: between what will be read and what the model gave."""
    total = torch.zeros((), dtype=torch.float64, device=z_ND.device)
    if values_ND is not z_ND:
        for some in rows.split(1024):  # the float64 copy stays small
            total += (values_ND[some].double() - z_ND[some].double()).square_().sum(dim=1).sum()
    return total
