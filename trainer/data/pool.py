"""The chunks that are shuffled together, decoded where the coders are trained: in memory or on a GPU."""

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.batch import Column
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.lane import Lane, Mark
from skipcoder.trainer.data.reading import Chunk, Readers, Staging, read_positions

TOGETHER = 8
"""Chunks that a GPU copies and decodes together."""

Columns = tuple[Tensor, ...]
"""What is read of a token, [slots, chunk_rows, d] each, then, always in memory, the positions."""

T = TypeVar("T")


class Block(NamedTuple, Generic[T]):
    """Chunks of a plan in columns."""

    item: T
    """What the plan calls them."""
    columns: Columns
    rows: np.ndarray
    """Rows of the columns that the filter keeps, chunk by chunk."""
    mark: Mark
    """When the columns hold them."""


class Asked(NamedTuple, Generic[T]):
    """Chunks that are being read for a GPU."""

    item: T
    chosen: Sequence[int]
    missing: Sequence[int]
    """Those of them that are read."""
    staged: range
    """Their slots of the staging."""
    wait: Callable[[], Any]
    """Returns when they are there."""


class Pool:
    """Reads chunks of a store into columns, which are reused."""

    def __init__(
        self,
        store: ActivationStore,
        columns: Sequence[Column],
        chunks: Sequence[Chunk],
        filter: TokenFilter,
        at_once: int,
        keep: bool,
        device: torch.device,
        readers: int,
        apart: bool,
    ) -> None:
        """`at_once`: chunks that are shuffled together; `keep`: whether to keep every chunk once it has been read;
        `readers` of them at a time, threads or, for a GPU, processes if `apart`."""
        self.store, self.columns, self.chunks, self.filter = store, columns, chunks, filter
        self.at_once, self.readers, self.apart = min(at_once, len(chunks)), readers, apart
        self.lane = Lane(device)
        self.through_memory = device.type == "cuda"
        self._free: list[tuple[Columns, Mark]] = []
        self._whole = self._allocate(len(chunks)) if keep else None
        self._kept_rows: dict[int, np.ndarray] = {}

    def read(self, plan: Iterable[tuple[T, Sequence[int]]]) -> Generator[Block[T]]:
        """Read the chunks that belong to each item of a plan."""
        return self._through_memory(plan) if self.through_memory else self._directly(plan)

    def use(self, block: Block[Any]) -> None:
        """Let the caller's queue on the device use a block's columns."""
        self.lane.hand_over(block.mark, block.columns)

    def release(self, block: Block[Any], mark: Mark) -> None:
        """Let other chunks be decoded in place of a block's, once the device has come to `mark`."""
        if block.columns is not self._whole:
            self._free.append((block.columns, mark))

    def _missing(self, chosen: Sequence[int], coming: Sequence[int] = ()) -> Sequence[int]:
        """Those of the chunks to read; of a split that is kept, those that are neither there nor `coming`."""
        if self._whole is None:
            return chosen
        return [chunk for chunk in chosen if chunk not in self._kept_rows and chunk not in coming]

    def _columns(self, missing: Sequence[int]) -> tuple[Columns, Sequence[int]]:
        """Columns for these chunks, and their slots."""
        if self._whole is not None:
            return self._whole, missing
        if not self._free:
            return self._allocate(self.at_once), range(len(missing))
        columns, mark = self._free.pop()
        self.lane.after(mark)
        return columns, range(len(missing))

    def _allocate(self, slots: int) -> Columns:
        rows = self.store.chunk_rows
        with self.lane():
            sides = [self._empty(slots, rows, self.store.width(*column)) for column in self.columns]
        return *sides, torch.empty(slots, rows, dtype=torch.int64)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=self.lane.device)

    def _rows(self, chosen: Sequence[int], slots: Sequence[int], keeps: Iterable[np.ndarray]) -> np.ndarray:
        """Rows of the columns that are kept of chunks that have just been read, or were before."""
        rows = [keep.nonzero()[0] + slot * self.store.chunk_rows for slot, keep in zip(slots, keeps, strict=True)]
        if self._whole is not None:
            self._kept_rows.update(zip(slots, rows, strict=True))
            rows = [self._kept_rows[chunk] for chunk in chosen]
        return np.concatenate(rows)

    # ---- in memory --------------------------------------------------------------------------------

    def _directly(self, plan: Iterable[tuple[T, Sequence[int]]]) -> Generator[Block[T]]:
        """Let threads decode each chunk into its place."""
        with ThreadPoolExecutor(self.readers, thread_name_prefix="reader") as threads:
            for item, chosen in plan:
                missing = self._missing(chosen)
                columns, slots = self._columns(missing)
                keeps = threads.map(self._decode, missing, ([z[slot] for z in columns] for slot in slots))
                yield Block(item, columns, self._rows(chosen, slots, keeps), None)

    def _decode(self, chunk: int, into: Sequence[Tensor]) -> np.ndarray:
        _, start, stop = self.chunks[chunk]
        *sides, position = into
        for column, z in zip(self.columns, sides, strict=True):
            self.store.activations(*column, start, stop, out=z[: stop - start])
        return read_positions(self.store, self.filter, self.chunks[chunk], position.numpy())

    # ---- on a GPU ---------------------------------------------------------------------------------

    def _through_memory(self, plan: Iterable[tuple[T, Sequence[int]]]) -> Generator[Block[T]]:
        """Let the readers fill one half of a staging while this thread alone has the other copied and decoded."""
        if not self.chunks:
            return
        half, before, mark = self.at_once, None, None
        self.lane.settle()
        staging = Staging(self.store, self.columns, self.filter, 2 * half)
        with Readers(staging, self.readers, self.apart) as readers:
            if self.lane.device.type == "cuda":
                staging.memory.pin()
            try:
                for number, (item, chosen) in enumerate(plan):
                    if mark is not None:
                        mark.synchronize()  # its half of the memory is used again
                    missing = self._missing(chosen, before.missing if before else ())
                    first = number % 2 * half
                    wait = readers.ask(first, [self.chunks[chunk] for chunk in missing])
                    asked = Asked(item, chosen, missing, range(first, first + len(missing)), wait)
                    if before is not None:
                        block = self._decoded(staging, before)
                        mark = block.mark
                        yield block
                    before = asked
                if before is not None:
                    yield self._decoded(staging, before)
            finally:
                self.lane.wait()

    def _decoded(self, staging: Staging, asked: Asked[T]) -> Block[T]:
        item, chosen, missing, staged, wait = asked
        wait()
        with self.lane():
            columns, into = self._columns(missing)
            for first in range(0, len(missing), TOGETHER):
                slots = into[first : first + TOGETHER]
                there = slice(staged[first], staged[first] + len(slots))
                for codes, z in zip(staging.codes, columns, strict=False):
                    coded = {
                        suffix: torch.from_numpy(c[there]).to(z.device, non_blocking=True)
                        for suffix, c in codes.items()
                    }
                    if isinstance(slots, range):
                        self.store.codec.decode(coded, z[slots.start : slots.stop])
                        continue
                    decoded = self._empty(len(slots), *z.shape[1:])
                    self.store.codec.decode(coded, decoded)
                    for slot, chunk in zip(slots, decoded, strict=True):
                        z[slot].copy_(chunk)
                columns[-1][torch.tensor(slots)] = torch.from_numpy(staging.position[there])
        keeps = [staging.keep[slot] for slot in staged]
        return Block(item, columns, self._rows(chosen, into, keeps), self.lane.mark())
