"""A batch of activations, and how one is assembled from the rows of a pool.

Legend: B tokens of a batch, D input width, E output width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GATHER_ROWS = 512
"""Rows gathered, then converted, at a time: they stay in a core's cache (a quarter faster than a whole batch)."""


class Column(NamedTuple):
    """One side of a hookpoint."""

    hookpoint: str
    side: str
    """input or output."""


class Batch(NamedTuple):
    """Tokens of one batch, in the model's own scale."""

    columns: dict[Column, Tensor]
    """[B, D] what enters an MLP, or what leaves it; row i is the same token everywhere."""
    position: Tensor
    """int64 [B] flat position (row * context + position in row) in the store's tokens."""
    tokens: int
    """Tokens of the global batch, over all ranks."""

    @property
    def x(self) -> Tensor:
        """[B, D] what enters the MLP of the only hookpoint."""
        return self._only("input")

    @property
    def y(self) -> Tensor:
        """[B, E] what leaves the MLP of the only hookpoint."""
        return self._only("output")

    def _only(self, side: str) -> Tensor:
        (found,) = (z for column, z in self.columns.items() if column.side == side)
        return found

    def row(self, columns: Sequence[Column]) -> Tensor:
        """Return [B, D]: these sides one after another."""
        first, *others = (self.columns[column] for column in columns)
        return torch.cat([first, *others], 1) if others else first

    def side(self, hookpoints: Sequence[str], side: str) -> list[Tensor]:
        """Return that side of each of these hookpoints, as far as it was read."""
        wanted = (Column(name, side) for name in hookpoints)
        return [self.columns[column] for column in wanted if column in self.columns]


class BatchLayout(NamedTuple):
    """What all batches of a stream have in common."""

    columns: list[Column]
    widths: list[int]
    rank: int
    world_size: int
    most: int
    """Most tokens of this rank that a batch can hold."""
    device: torch.device
    dtype: torch.dtype


class Assembly:
    """A batch in the making: collects this rank's rows of what `add` is given, all on the stream's device, in its
    dtype."""

    def __init__(self, layout: BatchLayout) -> None:
        self.layout, self.tokens, self.mine = layout, 0, 0
        sides = [torch.empty(layout.most, d, dtype=layout.dtype, device=layout.device) for d in layout.widths]
        self.columns = (*sides, torch.empty(layout.most, dtype=torch.int64))

    def add(self, columns: tuple[Tensor, ...], rows: Tensor) -> None:
        """Add the next tokens of the global batch: rows of the columns [slots, rows of a slot, d], the last of which,
        positions, is in memory."""
        first = (self.layout.rank - self.tokens) % self.layout.world_size
        rows_of_mine = rows[first :: self.layout.world_size]
        for some in rows_of_mine.split(GATHER_ROWS if self.layout.device.type == "cpu" else self.layout.most):
            there = some.to(self.layout.device, non_blocking=True)
            for out, z in zip(self.columns, columns, strict=True):
                at = there if z.device == there.device else some
                out[self.mine : self.mine + len(some)] = z.flatten(0, 1).index_select(0, at)
            self.mine += len(some)
        self.tokens += len(rows)

    def done(self) -> Batch:
        """Return the finished batch."""
        *sides, position = (z[: self.mine] for z in self.columns)
        return Batch(dict(zip(self.layout.columns, sides, strict=True)), position, self.tokens)
