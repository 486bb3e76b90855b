"""Chunks of a store on their way to a GPU: their codes are read into pinned memory, by threads or by processes.

Processes share that memory with the trainer. Threads take turns at Python's lock, whatever they do outside it; sixteen
processes read half as much again and leave the lock to the training step (benchmarks/README.md). But they take a second
to start.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numcodecs import blosc

from skipcoder.errors import UserError
from skipcoder.helpers import Helper, SharedArrays
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.batch import Column
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.joined import addresses, opened_again


class Chunk(NamedTuple):
    """Stored tokens [start, stop), held by one compressed chunk of every array."""

    unit: int
    start: int
    stop: int


class Staging:
    """Memory for chunks as they were read: codes, positions, and which tokens the filter keeps."""

    def __init__(
        self,
        store: ActivationStore,
        columns: Sequence[Column],
        filter: TokenFilter,
        slots: int,
        descriptor: int | None = None,
    ) -> None:
        """`descriptor`: of the memory of another process, which was made with the same arguments."""
        self.store, self.filter = store, filter
        self.columns = list(columns)
        specs: dict[Any, Any] = {
            (*column, suffix): ((slots, *shape), dtype)
            for column in self.columns
            for suffix, (shape, dtype) in store.code_shapes(*column, store.chunk_rows).items()
        }
        rows = (slots, store.chunk_rows)
        self.memory = SharedArrays({**specs, "position": (rows, np.int64), "keep": (rows, np.bool_)}, descriptor)
        self.codes = [
            {suffix: self.memory.arrays[*column, suffix] for suffix in store.codec.arrays} for column in self.columns
        ]
        """Of each column, [slots, ...]."""
        self.position, self.keep = self.memory.arrays["position"], self.memory.arrays["keep"]
        self.setup = addresses(store), self.columns, filter, slots, self.memory.descriptor
        """What another process needs to make the same."""

    def read(self, slot: int, chunk: Chunk) -> None:
        """Fill a slot."""
        for column, codes in zip(self.columns, self.codes, strict=True):
            self.store.codes(*column, chunk.start, chunk.stop, {suffix: z[slot] for suffix, z in codes.items()})
        size = chunk.stop - chunk.start
        self.keep[slot, size:] = False
        self.keep[slot, :size] = read_positions(self.store, self.filter, chunk, self.position[slot])


def read_positions(store: ActivationStore, filter: TokenFilter, chunk: Chunk, out: np.ndarray) -> np.ndarray:
    """Write a chunk's positions to the head of `out`; return whether the filter keeps each."""
    position = store.read("index", chunk.start, chunk.stop).astype(np.int64)
    out[: len(position)] = position
    at = position - store.unit_range(chunk.unit)[0]
    roles = None if filter.roles is None else roles_of(store, chunk.unit)[at]
    return filter.keep(position, _tokens(store, chunk.unit)[at], store.context, store.attrs["special_tokens"], roles)


@lru_cache(maxsize=256)
def _tokens(store: ActivationStore, unit: int) -> np.ndarray:
    return store.tokens(unit).ravel()


@lru_cache(maxsize=256)
def roles_of(store: ActivationStore, unit: int) -> np.ndarray:
    """Who wrote each position of a unit, uint8 [N]: numbers of ROLES. UserError for a store without conversations."""
    if "chat" not in store.attrs["identity"]["data"]:
        raise UserError(f"stream.roles: {store.place} has no roles; capture conversations, with data.chat=true")
    return store.read("role", *store.rows_of(unit)).ravel()


class Readers:
    """What fills the slots of a staging; a context manager, which also lets go of the staging's memory."""

    def __init__(self, staging: Staging, count: int, apart: bool) -> None:
        """`count` threads, or processes if `apart`."""
        self.staging = staging
        self._threads = None if apart else ThreadPoolExecutor(count, thread_name_prefix="reader")
        shared = [staging.memory.descriptor]
        self._helpers = [Helper(_reading, staging.setup, shared) for _ in range(count if apart else 0)]

    def ask(self, first: int, chunks: Sequence[Chunk]) -> Callable[[], Any]:
        """Have chunks read into slots from `first` on; return a function that waits for them, to be called in the order
        of asking."""
        slots = list(enumerate(chunks, first))
        if self._threads is not None:
            asked = [self._threads.submit(self.staging.read, *one) for one in slots]
            return lambda: [one.result() for one in asked]
        for i, helper in enumerate(self._helpers):  # one request each, however many chunks
            helper.ask(slots[i :: len(self._helpers)])
        return lambda: [helper.answer() for helper in self._helpers]

    def __enter__(self) -> "Readers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for helper in self._helpers:
            helper.close()
        self.staging.memory.close()


def _reading(
    setup: tuple[list[str], Sequence[Column], TokenFilter, int, int],
) -> Callable[[list[tuple[int, Chunk]]], None]:
    """What a process does: open the store and the memory, and fill slots."""
    stores, columns, filter, slots, descriptor = setup
    blosc.use_threads = False
    staging = Staging(opened_again(stores), columns, filter, slots, descriptor)

    def read(asked: list[tuple[int, Chunk]]) -> None:
        for slot, chunk in asked:
            staging.read(slot, chunk)

    return read
