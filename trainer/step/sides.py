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
from skipcoder.trainer.coder.coder import SparseCoder, make_coder
from skipcoder.trainer.coder.cross_layer import LayerCoder
from skipcoder.trainer.coder.fold import power_of_two_scale
from skipcoder.trainer.coder.shard import Shard
from skipcoder.trainer.config import CoderConfig, Side, TrainConfig

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


class OneSide(NamedTuple):
    """A side of a row."""

    width: int
    scale: float
    """What it is divided by."""
    variance: float
    """Its total variance after that."""


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
    def sides(self) -> list[OneSide]:
        """One after another."""
        return [OneSide(*one) for one in zip(self.widths, self.scales, self.variances, strict=True)]

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


def coder_between(cfg: TrainConfig, reads: Row, writes: Row, shard: Shard | None) -> SparseCoder:
    """Make a new coder that reads and writes these rows, or a shard of one."""
    if cfg.coder.over_layers:
        return LayerCoder(cfg.coder, sum(reads.widths), writes.widths, cfg.seed)
    return make_coder(cfg.coder, sum(reads.widths), sum(writes.widths), cfg.seed, shard)
