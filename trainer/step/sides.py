"""Which sides of its hookpoints a coder reads and writes, and the rows that they make.

A row holds a token's sides one after another, each divided by a scale of its own. Scales are powers of two, which
coders take up exactly when training is over (fold.py).

Legend: N tokens, D width of a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.fold import power_of_two_scale
from skipcoder.trainer.config import CoderConfig, Side

Parts = Tensor | Sequence[Tensor]
"""One side of a token, or a side of each of several hookpoints."""


Memory = Callable[[str, int, int, torch.device], Tensor]
"""Gives the memory for rows of a role, so many, so wide, on a device."""


class Sides(NamedTuple):
    """The sides of a hookpoint, `input` or `output`, that a coder reads and writes."""

    read: str
    write: str


def sides(cfg: CoderConfig) -> Sides:
    """Return the sides of each of its hookpoints that a coder reads and writes."""
    if cfg.reconstructs:
        side = "input" if cfg.side is Side.input else "output"
        return Sides(side, side)
    return Sides("input", "output")


@dataclass(frozen=True)
class Row:
    """What a coder reads or writes of a token."""

    widths: tuple[int, ...]
    scales: tuple[float, ...]
    """What each side is divided by."""
    variances: tuple[float, ...]
    """Total variance of each side after that."""
    mean_D: Tensor
    """float64, like the next: over the training units, after the division."""
    variance_D: Tensor

    @classmethod
    def of(cls, moments: Sequence[Moments]) -> "Row":
        """The row of sides with these moments over the training units."""
        scales = tuple(power_of_two_scale(m.mean_square) for m in moments)
        divided = list(zip(moments, scales, strict=True))
        return cls(
            tuple(len(m.mean) for m in moments),
            scales,
            tuple(float(m.variance.sum()) / s**2 for m, s in divided),
            torch.from_numpy(np.concatenate([m.mean / s for m, s in divided])),
            torch.from_numpy(np.concatenate([m.variance / s**2 for m, s in divided])),
        )

    @property
    def scale(self) -> float | Tensor:
        """The divisor of all sides or, of several, of each number of a row [D]."""
        if len(self.scales) == 1:
            return self.scales[0]
        return torch.cat([torch.full((d,), s) for d, s in zip(self.widths, self.scales, strict=True)])

    def made(self, role: str, parts: Parts, memory: Memory | None) -> Tensor:
        """Return [N, D] from raw sides, in the memory that there is for this role, if any."""
        of = [parts] if isinstance(parts, Tensor) else parts
        if memory is None:
            divided = [z / s for z, s in zip(of, self.scales, strict=True)]
            return divided[0] if len(divided) == 1 else torch.cat(divided, 1)
        row = memory(role, len(of[0]), sum(self.widths), of[0].device)
        for z, s, out in zip(of, self.scales, row.split(list(self.widths), 1), strict=True):
            torch.mul(z, 1 / s, out=out)  # by the inverse of a power of two: the same bits
        return row
