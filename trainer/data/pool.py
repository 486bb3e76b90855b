"""The chunks that are shuffled together, decoded where the coders are trained: in memory or on a GPU."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import count, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.store.commit import SIDES
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.lane import Lane

KEEP_BYTES = 2**30
"""A split of at most this size is kept decoded after its first epoch."""

Columns = tuple[Tensor, ...]
"""Both sides of each hookpoint in turn, then, always in memory, the positions; a slot of `chunk_rows` rows for each
chunk."""


class Chunk(NamedTuple):
    """Stored tokens [start, stop), held by one compressed chunk of every array."""

    unit: int
    start: int
    stop: int


class Pool:
    """Reads chunks of a store into columns, which are reused."""

    def __init__(
        self,
        store: ActivationStore,
        hookpoints: Sequence[str],
        chunks: Sequence[Chunk],
        filter: TokenFilter,
        at_once: int,
        keep: bool,
        lane: Lane,
    ) -> None:
        """`at_once`: chunks that are shuffled together; `keep`: whether to keep every chunk once it has been read."""
        self.store, self.hookpoints, self.chunks, self.filter = store, hookpoints, chunks, filter
        self.at_once, self.lane = min(at_once, len(chunks)), lane
        self._free: list[Columns] = []
        self._whole = self._allocate(len(chunks)) if keep else None
        self._kept_rows: dict[int, np.ndarray] = {}

    def read(self, chosen: Sequence[int], threads: ThreadPoolExecutor) -> tuple[Columns, np.ndarray]:
        """Return columns that hold these chunks, and the rows that the filter keeps, chunk by chunk."""
        if (whole := self._whole) is not None:
            missing = [chunk for chunk in chosen if chunk not in self._kept_rows]
            rows = threads.map(lambda chunk: self._decode(chunk, whole, chunk), missing)
            self._kept_rows.update(zip(missing, rows, strict=True))
            return whole, np.concatenate([self._kept_rows[chunk] for chunk in chosen])
        columns = self._free.pop() if self._free else self._allocate(self.at_once)
        return columns, np.concatenate(list(threads.map(self._decode, chosen, repeat(columns), count())))

    def release(self, columns: Columns) -> None:
        """Let the next chunks be decoded in place of these."""
        if columns is not self._whole:
            self._free.append(columns)

    def _allocate(self, chunks: int) -> Columns:
        rows = chunks * self.store.chunk_rows
        widths = [self.store.width(name, side) for name in self.hookpoints for side in SIDES]
        with self.lane():
            sides = [torch.empty(rows, d, dtype=torch.bfloat16, device=self.lane.device) for d in widths]
        return *sides, torch.empty(rows, dtype=torch.int64)

    def _decode(self, chunk: int, columns: Columns, slot: int) -> np.ndarray:
        """Decode a chunk into its slot; return the rows of the columns that the filter keeps."""
        unit, start, stop = self.chunks[chunk]
        position = self.store.read("index", start, stop).astype(np.int64)
        tokens = _tokens(self.store, unit)[position - self.store.unit_range(unit)[0]]
        keep = self.filter.keep(position, tokens, self.store.context, self.store.attrs["special_tokens"])
        place = slice(slot * self.store.chunk_rows, slot * self.store.chunk_rows + stop - start)
        columns[-1][place] = torch.from_numpy(position)
        with self.lane():
            for i, z in enumerate(columns[:-1]):
                name, side = self.hookpoints[i // 2], SIDES[i % 2]
                self.store.activations(name, side, start, stop, out=z[place])
        rows: np.ndarray = keep.nonzero()[0] + place.start
        return rows


@lru_cache(maxsize=256)
def _tokens(store: ActivationStore, unit: int) -> np.ndarray:
    return store.tokens(unit).ravel()
