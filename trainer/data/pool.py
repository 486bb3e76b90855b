"""The chunks that are shuffled together, decoded where the coders are trained: in memory or on a GPU."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.store.codecs import Coded
from skipcoder.pipeline.store.commit import SIDES
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.lane import Lane

KEEP_BYTES = 2**30
"""A split of at most this size is kept decoded after its first epoch."""

TOGETHER = 8
"""Chunks that a GPU copies and decodes together."""

Columns = tuple[Tensor, ...]
"""Both sides of each hookpoint in turn, [slots, chunk_rows, d], then, always in memory, the positions."""


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
        self.store, self.chunks, self.filter = store, chunks, filter
        self.sides = [(name, side) for name in hookpoints for side in SIDES]
        self.at_once, self.lane, self.through_memory = min(at_once, len(chunks)), lane, lane.device.type == "cuda"
        self._free: list[Columns] = []
        self._staging: list[list[Coded]] = []
        self._whole = self._allocate(len(chunks)) if keep else None
        self._kept_rows: dict[int, np.ndarray] = {}

    def read(self, chosen: Sequence[int], threads: ThreadPoolExecutor) -> tuple[Columns, np.ndarray]:
        """Return columns that hold these chunks, and the rows that the filter keeps, chunk by chunk."""
        if (whole := self._whole) is not None:
            missing = [chunk for chunk in chosen if chunk not in self._kept_rows]
            self._kept_rows.update(zip(missing, self._fill(whole, missing, missing, threads), strict=True))
            return whole, np.concatenate([self._kept_rows[chunk] for chunk in chosen])
        columns = self._free.pop() if self._free else self._allocate(self.at_once)
        return columns, np.concatenate(list(self._fill(columns, chosen, range(len(chosen)), threads)))

    def release(self, columns: Columns) -> None:
        """Let the next chunks be decoded in place of these."""
        if columns is not self._whole:
            self._free.append(columns)

    def _allocate(self, slots: int) -> Columns:
        rows = self.store.chunk_rows
        with self.lane():
            sides = [self._empty(slots, rows, self.store.width(*side)) for side in self.sides]
        return *sides, torch.empty(slots, rows, dtype=torch.int64)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.lane.device)

    def _fill(
        self, columns: Columns, chosen: Sequence[int], slots: Sequence[int], threads: ThreadPoolExecutor
    ) -> Iterator[np.ndarray]:
        """Decode chunks into slots; yield the rows that the filter keeps of each."""
        positions = [columns[-1][slot] for slot in slots]
        if self.through_memory:
            kept = self._through_memory(columns[:-1], chosen, slots, positions, threads)
        else:
            sides = ([z[slot] for z in columns[:-1]] for slot in slots)
            kept = threads.map(self._decode, chosen, sides, positions)
        for rows, slot in zip(kept, slots, strict=True):
            yield rows + slot * self.store.chunk_rows

    def _decode(self, chunk: int, sides: Sequence[Tensor], position: Tensor) -> np.ndarray:
        _, start, stop = self.chunks[chunk]
        for side, z in zip(self.sides, sides, strict=True):
            self.store.activations(*side, start, stop, out=z[: stop - start])
        return self._positions(chunk, position)

    def _through_memory(
        self,
        sides: Sequence[Tensor],
        chosen: Sequence[int],
        slots: Sequence[int],
        positions: Sequence[Tensor],
        threads: ThreadPoolExecutor,
    ) -> Iterator[np.ndarray]:
        """Let threads read codes into pinned memory, and this thread alone have them copied and decoded, several chunks
        at a time: threads that ask a GPU for many small things in turn spend their time waiting for Python's lock."""
        with self.lane():
            while len(self._staging) * TOGETHER < len(chosen):
                self._staging.append([self._pinned(*side) for side in self.sides])
            staged = [
                [{suffix: codes[i] for suffix, codes in coded.items()} for coded in group]
                for group in self._staging
                for i in range(TOGETHER)
            ]
            kept = threads.map(self._stage, chosen, staged, positions)
            for first, group in zip(range(0, len(chosen), TOGETHER), self._staging, strict=False):
                some = torch.tensor(slots[first : first + TOGETHER])
                yield from (next(kept) for _ in some)
                for coded, z in zip(group, sides, strict=True):
                    there = {suffix: c[: len(some)].to(z.device, non_blocking=True) for suffix, c in coded.items()}
                    decoded = self._empty(len(some), *z.shape[1:])
                    self.store.codec.decode(there, decoded)
                    z.index_copy_(0, some.to(z.device), decoded)
            self.lane.wait()  # before the memory is used again

    def _pinned(self, hookpoint: str, side: str) -> Coded:
        one = self.store.buffers(hookpoint, side, self.store.chunk_rows)
        several = {suffix: codes.new_zeros((TOGETHER, *codes.shape)) for suffix, codes in one.items()}
        on_gpu = self.lane.device.type == "cuda"
        return {suffix: codes.pin_memory() if on_gpu else codes for suffix, codes in several.items()}

    def _stage(self, chunk: int, staging: Sequence[Coded], position: Tensor) -> np.ndarray:
        _, start, stop = self.chunks[chunk]
        for side, buffers in zip(self.sides, staging, strict=True):
            self.store.codes(*side, start, stop, buffers)
        return self._positions(chunk, position)

    def _positions(self, chunk: int, out: Tensor) -> np.ndarray:
        """Write the positions of a chunk; return the rows that the filter keeps."""
        unit, start, stop = self.chunks[chunk]
        position = self.store.read("index", start, stop).astype(np.int64)
        tokens = _tokens(self.store, unit)[position - self.store.unit_range(unit)[0]]
        out[: stop - start] = torch.from_numpy(position)
        keep = self.filter.keep(position, tokens, self.store.context, self.store.attrs["special_tokens"])
        rows: np.ndarray = keep.nonzero()[0]
        return rows


@lru_cache(maxsize=256)
def _tokens(store: ActivationStore, unit: int) -> np.ndarray:
    return store.tokens(unit).ravel()
