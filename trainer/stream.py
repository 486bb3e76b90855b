"""Shuffled batches of activation pairs from a store.

The mental model: an epoch is a list of chunks (`order.epoch_order`); every `pool_chunks` of them form a block; a
block is read, filtered, permuted as a whole and drained into batches. A batch may span two blocks, never two
epochs. Three integers, (epoch, block, offset), say where the next token is; resuming reads one block.

Two threads run ahead: one decodes the next block, straight into its place in memory, and one gathers the next batch and
sends it to the device.

Legend: B tokens of a batch, D input width, E output width.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import count, repeat
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.order import block_permutation, epoch_order
from torch import Tensor

T = TypeVar("T")

POOL_BYTES = 2**29
"""Pairs that are shuffled together by default. A reader holds three times as much. With more text the batches would be
better mixed, benchmarks/README.md says how much."""

KEEP_BYTES = 2**30
"""A split of at most this size is kept decoded in memory after its first epoch."""


GATHER_ROWS = 512
"""Rows gathered, then converted, at once: they stay in a core's cache (a quarter faster than a whole batch at once)."""


class Batch(NamedTuple):
    """Tokens of one batch, in the model's own scale."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    """Hookpoint -> ([B, D] what enters the MLP, [B, E] what leaves it); row i is the same token everywhere."""
    position: Tensor
    """int64 [B] flat position (row * context + position in row) in the store's tokens."""
    tokens: int
    """Tokens of the global batch, over all ranks."""

    @property
    def x(self) -> Tensor:
        """[B, D] what enters the MLP of the only hookpoint."""
        ((x, _),) = self.pairs.values()
        return x

    @property
    def y(self) -> Tensor:
        """[B, E] what leaves the MLP of the only hookpoint."""
        ((_, y),) = self.pairs.values()
        return y


@dataclass(frozen=True)
class TokenFilter:
    """Which positions a reader leaves out. The store holds all of them."""

    first_positions: int = 1
    special_tokens: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes of positions (commit.POSITIONS) that stay, for statistics: exact for first_positions 0 and 1."""
        first = ("first",) if self.first_positions == 0 else ()
        return (*first, *(() if self.special_tokens else ("special",)), "other")

    def keep(self, position_B: np.ndarray, token_B: np.ndarray, context: int, special: list[int]) -> np.ndarray:
        """bool [B] of the positions that stay."""
        keep = position_B % context >= self.first_positions
        if self.special_tokens and special:
            keep &= ~np.isin(token_B, special)
        return keep


class _Block(NamedTuple):
    epoch: int
    number: int
    is_last: bool
    columns: tuple[Tensor, ...]
    """Both sides of each hookpoint in turn, then the positions; a slot of `chunk_rows` rows for each chunk."""
    shuffle: Tensor
    """The rows that are served, in their order."""


class _Assembly:
    """A batch in the making: this rank's rows of what `add` is given, in the stream's dtype, on their way to its
    device."""

    def __init__(self, stream: "ActivationStream") -> None:
        self.stream, self.tokens, self.mine = stream, 0, 0
        most = -(-min(stream.batch_tokens, stream.tokens) // stream.world_size)
        self.on_gpu = stream.device.type == "cuda"  # there it is converted, half the bytes travel
        dtype = torch.bfloat16 if self.on_gpu else stream.dtype
        sides = [torch.empty(most, d, dtype=dtype, pin_memory=self.on_gpu) for d in stream.widths]
        self.columns = (*sides, torch.empty(most, dtype=torch.int64))

    def add(self, columns: tuple[Tensor, ...], rows: Tensor) -> None:
        """The next tokens of the global batch."""
        first = (self.stream.rank - self.tokens) % self.stream.world_size
        rows_of_mine = rows[first :: self.stream.world_size]
        for some in rows_of_mine.split(GATHER_ROWS):
            for out, z in zip(self.columns, columns, strict=True):
                out[self.mine : self.mine + len(some)] = z.index_select(0, some)
            self.mine += len(some)
        self.tokens += len(rows)

    def done(self) -> Batch:
        """The batch."""
        stream = self.stream
        *sides, position = (z[: self.mine] for z in self.columns)
        if self.on_gpu:
            sides = [z.to(stream.device, non_blocking=True) for z in sides]
        sides = [z.to(stream.device, stream.dtype) for z in sides]
        pairs = zip(sides[::2], sides[1::2], strict=True)
        return Batch(dict(zip(stream.hookpoints, pairs, strict=True)), position, self.tokens)


class ActivationStream:
    """Endless (or `epochs` long) stream of batches. The order depends on (seed, epoch, layout) alone.

    Several hookpoints come aligned: each batch holds the same tokens of all of them. batch_tokens counts over all
    ranks; rank r gets rows r::world_size of each global batch, and the last batch of an epoch is short.
    """

    def __init__(
        self,
        store: ActivationStore,
        hookpoint: str | Sequence[str],
        batch_tokens: int,
        *,
        seed: int = 0,
        split: str = "train",
        filter: TokenFilter = TokenFilter(),
        rank: int = 0,
        world_size: int = 1,
        pool_chunks: int | None = None,
        epochs: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        asked = [hookpoint] if isinstance(hookpoint, str) else list(hookpoint)
        if not asked:
            raise UserError("a stream needs at least one hookpoint")
        self.store, self.filter = store, filter
        self.hookpoints = [store.hookpoint(name) for name in asked]
        self.batch_tokens, self.seed, self.epochs = batch_tokens, seed, epochs
        self.rank, self.world_size = rank, world_size
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:  # the current device is each thread's own
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.chunks = [
            (unit, start, min(start + store.chunk_rows, stop))
            for unit in store.split(split)
            for begin, stop in [store.unit_range(unit)]
            for start in range(begin, stop, store.chunk_rows)
        ]
        self.tokens = sum(stop - start for _, start, stop in self.chunks)
        if epochs is None and batch_tokens > self.tokens:
            raise UserError(
                f"train.batch_tokens={batch_tokens} is more than the {self.tokens:,} training tokens of {store.place}"
            )
        self.epoch = self.block = self.offset = 0
        self.widths = [store.hookpoints[name][d] for name in self.hookpoints for d in ("d_in", "d_out")]
        pair_bytes = 2 * sum(self.widths)
        self.pool_chunks = pool_chunks or max(1, POOL_BYTES // (pair_bytes * store.chunk_rows))
        small = self.tokens * pair_bytes <= KEEP_BYTES
        self._free: list[tuple[Tensor, ...]] = []
        self._whole = self._allocate(len(self.chunks)) if small and epochs != 1 else None
        self._read: dict[int, np.ndarray] = {}

    # ---- position ---------------------------------------------------------------------------------

    def layout_hash(self) -> str:
        """Of everything but the position that decides which tokens come next."""
        facts = {
            "identity": self.store.attrs["identity_hash"],
            "chunks": self.chunks,
            "hookpoints": self.hookpoints,
            "filter": asdict(self.filter),
            "order": [self.seed, self.pool_chunks, self.batch_tokens],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def state_dict(self) -> dict[str, int | str]:
        """Where the next batch begins."""
        return {"epoch": self.epoch, "block": self.block, "offset": self.offset, "layout": self.layout_hash()}

    def beginning(self) -> dict[str, int | str]:
        """Where the first batch begins."""
        return {"epoch": 0, "block": 0, "offset": 0, "layout": self.layout_hash()}

    def load_state_dict(self, state: dict) -> None:
        """Go to a position that `state_dict` gave. UserError if the layout is another."""
        if state["layout"] != self.layout_hash():
            raise UserError(
                f"the stream of {self.store.place} has changed since this run was saved "
                "(more tokens in the store, or another filter, seed, pool or batch size); start a new run"
            )
        self.epoch, self.block, self.offset = state["epoch"], state["block"], state["offset"]

    # ---- batches ----------------------------------------------------------------------------------

    def __iter__(self) -> Generator[Batch]:
        batches = _ahead(self._batches())
        try:
            for batch, (self.epoch, self.block, self.offset) in batches:
                yield batch
        finally:
            batches.close()

    def _batches(self) -> Generator[tuple[Batch, tuple[int, int, int]]]:
        """Batches, each with the position after it."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        epoch, number, offset = self.epoch, self.block, self.offset
        batch, seen = _Assembly(self), False
        blocks = _ahead(self._blocks())
        try:
            for block in blocks:
                size = len(block.shuffle)
                seen = seen or size > 0
                after = (block.epoch + 1, 0) if block.is_last else (block.epoch, block.number + 1)
                while offset < size:
                    stop = min(offset + self.batch_tokens - batch.tokens, size)
                    batch.add(block.columns, block.shuffle[offset:stop])
                    offset = stop
                    if batch.tokens == self.batch_tokens:
                        yield batch.done(), ((*after, 0) if stop == size else (epoch, number, stop))
                        batch = _Assembly(self)
                if block.is_last and batch.tokens:
                    yield batch.done(), (*after, 0)
                    batch = _Assembly(self)
                (epoch, number), offset = after, 0
                if block.columns is not self._whole:
                    self._free.append(block.columns)
                if block.is_last and not seen:
                    raise UserError(f"{self.store.place}: the stream's filter leaves no token ({self.filter})")
        finally:
            blocks.close()

    def _blocks(self) -> Generator[_Block]:
        epoch, number = self.epoch, self.block
        with ThreadPoolExecutor(self.store.place.parallel) as pool:
            while self.epochs is None or epoch < self.epochs:
                order = epoch_order(self.seed, epoch, [unit for unit, _, _ in self.chunks])
                last = -(-len(order) // self.pool_chunks) - 1
                for block in range(number, last + 1):
                    chosen = order[block * self.pool_chunks : (block + 1) * self.pool_chunks].tolist()
                    columns, rows = self._fill(chosen, pool)
                    shuffle = torch.from_numpy(rows[block_permutation(self.seed, epoch, block, len(rows))])
                    yield _Block(epoch, block, block == last, columns, shuffle)
                epoch, number = epoch + 1, 0

    def _fill(self, chosen: list[int], pool: ThreadPoolExecutor) -> tuple[tuple[Tensor, ...], np.ndarray]:
        """Columns that hold these chunks, and the rows that the filter leaves, chunk by chunk."""
        if (whole := self._whole) is not None:
            missing = [chunk for chunk in chosen if chunk not in self._read]
            read = pool.map(lambda chunk: self._read_chunk(chunk, whole, chunk), missing)
            self._read.update(zip(missing, read, strict=True))
            return whole, np.concatenate([self._read[chunk] for chunk in chosen])
        columns = self._free.pop() if self._free else self._allocate(min(self.pool_chunks, len(self.chunks)))
        return columns, np.concatenate(list(pool.map(self._read_chunk, chosen, repeat(columns), count())))

    def _allocate(self, chunks: int) -> tuple[Tensor, ...]:
        rows = chunks * self.store.chunk_rows
        return *(torch.empty(rows, d, dtype=torch.bfloat16) for d in self.widths), torch.empty(rows, dtype=torch.int64)

    def _read_chunk(self, chunk: int, columns: tuple[Tensor, ...], slot: int) -> np.ndarray:
        """Decode a chunk into its slot; the rows of the columns that the filter leaves."""
        unit, start, stop = self.chunks[chunk]
        position = self.store.read("index", start, stop).astype(np.int64)
        tokens = _tokens(self.store, unit)[position - self.store.unit_range(unit)[0]]
        keep = self.filter.keep(position, tokens, self.store.context, self.store.attrs["special_tokens"])
        place = slice(slot * self.store.chunk_rows, slot * self.store.chunk_rows + stop - start)
        columns[-1][place] = torch.from_numpy(position)
        for i, z in enumerate(columns[:-1]):
            name, side = self.hookpoints[i // 2], ("input", "output")[i % 2]
            self.store.activations(name, side, start, stop, out=z[place])
        return keep.nonzero()[0] + place.start


@lru_cache(maxsize=256)
def _tokens(store: ActivationStore, unit: int) -> np.ndarray:
    return store.tokens(unit).ravel()


def _ahead(items: Generator[T]) -> Generator[T]:
    """Run a generator in a thread, one item ahead; its exceptions are raised here."""
    ready: queue.Queue = queue.Queue(maxsize=1)
    stop = threading.Event()
    end = object()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put(item):
                        return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="activation-stream")
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
