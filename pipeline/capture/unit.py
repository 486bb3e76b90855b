"""From a model's activations to a unit that can be written: permuted, encoded and measured where the model runs.

Nothing here waits for a GPU until `finished` is called, so that the next forward pass can be queued behind.

Legend: N tokens of a unit, D dimensions.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.store import commit, layout
from skipcoder.pipeline.store.attrs import Attributes
from skipcoder.pipeline.store.codecs import Codec, codec_of
from skipcoder.pipeline.store.stats import Moments, sums
from skipcoder.pipeline.store.writer import CodedUnit, classes_of


class NonFiniteError(ValueError):
    """An activation is NaN or infinite; the message says where."""


class Coding(NamedTuple):
    """A unit whose arrays are computed, or queued on a GPU together with their copies into memory."""

    attrs: Attributes
    unit: int
    tokens: np.ndarray
    order: np.ndarray
    """[N] the position in token order of each stored token."""
    arrays: dict[str, Tensor]
    measured: dict[str, dict[str, tuple[int, Tensor, Tensor]]]
    """Hookpoint -> `<side>/<class of positions>` -> tokens of the class, their `stats.sums`, what the codec lost."""
    copied: torch.cuda.Event | None

    def finished(self) -> CodedUnit:
        """Wait for the device. NonFiniteError if the model gave NaN or infinity."""
        if self.copied is not None:
            self.copied.synchronize()
        start = layout.unit_token_rows(self.unit, self.attrs["rows"], self.attrs["identity"]["unit_rows"]).start
        arrays = {name: rows.numpy() for name, rows in self.arrays.items()}
        arrays = {"index": (start * self.attrs["identity"]["context"] + self.order).astype(np.uint64)} | arrays
        moments: dict[str, dict[str, Moments]] = {}
        for name, found in self.measured.items():
            moments[name] = {k: Moments.of_sums(n, s.numpy(), float(lost)) for k, (n, s, lost) in found.items()}
            for key, m in moments[name].items():
                if not np.isfinite([m.norms, m.error]).all():
                    self._refuse(f"{name}/{key.split('/')[0]}")
        return CodedUnit(self.unit, self.tokens, arrays, moments)

    def _refuse(self, array: str) -> None:
        codec, context = _codec(self.attrs), self.attrs["identity"]["context"]
        coded = {suffix: self.arrays[array + suffix] for suffix in codec.arrays}
        z_ND = torch.empty(coded[""].shape, dtype=torch.bfloat16)
        codec.decode(coded, z_ND)
        bad = np.sort(self.order[(~torch.isfinite(z_ND)).any(dim=1).numpy()])
        row, position = divmod(int(bad[0]), context)
        row += layout.unit_token_rows(self.unit, self.attrs["rows"], self.attrs["identity"]["unit_rows"]).start
        raise NonFiniteError(
            f"{array}: activation at row {row}, position {position} is NaN or infinite "
            f"({len(bad)} such tokens in this unit); nothing of the unit was stored. "
            f"Try model.dtype=float32 or bfloat16, or leave this text out"
        )


class Plan(NamedTuple):
    """What is known of a unit before the model has run over it."""

    unit: int
    tokens: np.ndarray
    order: np.ndarray
    order_N: Tensor
    """The same on the device."""
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
    return Plan(unit, tokens, order, torch.from_numpy(order).to(device), there)


def code(attrs: Attributes, plan: Plan, pairs: Iterable[tuple[str, tuple[Tensor, Tensor]]]) -> Coding:
    """Permute, encode and measure a unit. `pairs`: (hookpoint, (input [N, D], output [N, D'])), in token order."""
    codec = _codec(attrs)
    arrays: dict[str, Tensor] = {}
    measured: dict[str, dict[str, tuple[int, Tensor, Tensor]]] = {}
    copied = None
    for name, sides in pairs:
        for side, z in zip(commit.SIDES, sides, strict=True):
            z = z[plan.order_N]
            coded = codec.encode(z)
            arrays |= {f"{name}/{side}{suffix}": _host(rows) for suffix, rows in coded.items()}
            values = z
            if not (codec.exact and z.dtype == torch.bfloat16):
                values = torch.empty_like(z, dtype=torch.bfloat16)
                codec.decode(coded, values)
            for where, rows in plan.classes.items():
                lost = _squared_distance(values, z, rows)
                found = len(rows), _host(sums(values[rows])), _host(lost)
                measured.setdefault(name, {})[f"{side}/{where}"] = found
    if plan.order_N.is_cuda:
        copied = torch.cuda.Event()
        copied.record()
    return Coding(attrs, plan.unit, plan.tokens, plan.order, arrays, measured, copied)


def _codec(attrs: Attributes) -> type[Codec]:
    return codec_of(attrs["identity"]["codec"], attrs["version"])


def _squared_distance(values_ND: Tensor, z_ND: Tensor, rows: Tensor) -> Tensor:
    """float64 []: between what will be read and what the model gave."""
    total = torch.zeros((), dtype=torch.float64, device=z_ND.device)
    if values_ND is not z_ND:
        for some in rows.split(1024):  # the float64 copy stays small
            total += (values_ND[some].double() - z_ND[some].double()).square_().sum(dim=1).sum()
    return total


def _host(z: Tensor) -> Tensor:
    """The tensor in memory; from a GPU the copy is queued."""
    if z.device.type != "cuda":
        return z
    return torch.empty(z.shape, dtype=z.dtype, pin_memory=True).copy_(z, non_blocking=True)
