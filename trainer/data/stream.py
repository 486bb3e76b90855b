"""Shuffled batches of activation pairs from a store.

The mental model: an epoch is a list of chunks (`order.epoch_order`); every `pool_chunks` of them form a block; a
block is read, filtered, permuted as a whole and drained into batches. A batch may span two blocks, never two
epochs. Three integers, (epoch, block, offset), say where the next token is; resuming reads one block.

Others run ahead: threads, or processes, read the next block, which is decoded straight into its place, in memory or on
a GPU; one thread gathers the next batch there. A GPU decodes and gathers in two queues of their own, beside the
training step's. The order is computed here, so that it is the same everywhere.

Legend: B tokens of a batch, D input width, E output width.
"""

import hashlib
import json
import os
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.pipeline.store.attrs import widths_of
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.ahead import ahead
from skipcoder.trainer.data.batch import Assembly, Batch, BatchLayout, Column
from skipcoder.trainer.data.filter import USUAL, TokenFilter
from skipcoder.trainer.data.lane import Lane, Mark
from skipcoder.trainer.data.order import block_permutation, epoch_order
from skipcoder.trainer.data.outliers import in_store
from skipcoder.trainer.data.pool import Block, Pool
from skipcoder.trainer.data.reading import Chunk

POOL_BYTES = 2**29
"""Bytes of pairs shuffled together by default. A stream holds three times as much, in memory or on the GPU, with a GPU
also the codes of twice as much in pinned memory. A larger pool would mix batches better; benchmarks/README.md says by
how much."""

KEEP_BYTES = 2**30
"""A split of at most this size is kept decoded after its first epoch, and read by threads."""

MOST_READERS = 16
"""For a GPU by default, if there are as many cores."""


class Position(TypedDict):
    """The position of a stream, as a checkpoint stores it."""

    epoch: int
    block: int
    offset: int
    layout: str
    """Hash of everything else that decides which tokens come next."""


class _Number(NamedTuple):
    """Which block it is."""

    epoch: int
    block: int
    is_last: bool
    """Whether it is the last of its epoch."""


class ActivationStream:
    """An endless stream of batches, or one of `epochs` epochs. The order depends on (seed, epoch, layout) alone.

    Several hookpoints are aligned: each batch holds the same tokens of all of them. Of `columns` none but these sides
    of the hookpoints are read; the order is the same. batch_tokens counts over all ranks; rank r gets rows
    r::world_size of each global batch, and the last batch of an epoch is short.
    """

    def __init__(
        self,
        store: ActivationStore,
        hookpoint: str | Sequence[str],
        batch_tokens: int,
        *,
        seed: int = 0,
        split: str = "train",
        filter: TokenFilter = USUAL,
        rank: int = 0,
        world_size: int = 1,
        pool_chunks: int | None = None,
        epochs: int | None = None,
        columns: Collection[Column] | None = None,
        readers: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        asked = [hookpoint] if isinstance(hookpoint, str) else list(hookpoint)
        if not asked:
            raise UserError("a stream needs at least one hookpoint")
        self.hookpoints = [store.hookpoint(name) for name in asked]
        filter = in_store(filter, store, self.hookpoints)
        self.store, self.filter = store, filter
        self.batch_tokens, self.seed, self.epochs = batch_tokens, seed, epochs
        self.rank, self.world_size = rank, world_size
        self.device, self.dtype = torch.device(device), dtype
        if self.device.type == "cuda" and self.device.index is None:  # each thread has its own current device
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.chunks = [
            Chunk(unit, start, min(start + store.chunk_rows, stop))
            for unit in store.split(split)
            for begin, stop in [store.unit_range(unit)]
            for start in range(begin, stop, store.chunk_rows)
        ]
        self.tokens = sum(chunk.stop - chunk.start for chunk in self.chunks)
        if epochs is None and batch_tokens > self.tokens:
            raise UserError(
                f"train.batch_tokens={batch_tokens} is more than the {self.tokens:,} training tokens of {store.place}"
            )
        self.epoch = self.block = self.offset = 0
        every = [Column(name, side) for name in self.hookpoints for side in widths_of(store.hookpoints[name])]
        self.columns = [column for column in every if columns is None or column in columns]
        pair_bytes = 2 * sum(store.width(*column) for column in every)
        self.pool_chunks = pool_chunks or max(1, POOL_BYTES // (pair_bytes * store.chunk_rows))
        is_small = self.tokens * pair_bytes <= KEEP_BYTES
        most = -(-min(batch_tokens, self.tokens) // world_size)
        usual = store.place.parallel
        if self.device.type == "cuda":
            ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            cores = max(1, min(MOST_READERS, (os.cpu_count() or 1) // ranks_here))
            usual = max(cores, usual) if is_small else cores  # processes cost more than threads
        self.readers = readers or usual
        widths = [store.width(*column) for column in self.columns]
        self._batch_layout = BatchLayout(self.columns, widths, rank, world_size, most, self.device, dtype)
        self._lane = Lane(self.device)
        self._pool = Pool(
            store,
            self.columns,
            self.chunks,
            filter,
            self.pool_chunks,
            keep=is_small and epochs != 1,
            device=self.device,
            readers=self.readers,
            apart=not is_small,
        )

    # ---- position ---------------------------------------------------------------------------------

    def layout_hash(self) -> str:
        """Return the hash of all but the position that decides which tokens come next."""
        facts = {
            "identity": self.store.attrs["identity_hash"],
            "chunks": self.chunks,
            "filter": self.filter.facts(),
            "order": [self.seed, self.pool_chunks, self.batch_tokens],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def state_dict(self) -> Position:
        """Return the position where the next batch begins."""
        return {"epoch": self.epoch, "block": self.block, "offset": self.offset, "layout": self.layout_hash()}

    def beginning(self) -> Position:
        """Return the position where the first batch begins."""
        return {"epoch": 0, "block": 0, "offset": 0, "layout": self.layout_hash()}

    def load_state_dict(self, state: Position) -> None:
        """Go to a position that `state_dict` gave; raise UserError if the layout differs."""
        if state["layout"] != self.layout_hash():
            raise UserError(
                f"the stream of {self.store.place} has changed since this run was saved "
                "(more tokens in the store, or another filter, seed, pool or batch size); start a new run"
            )
        self.epoch, self.block, self.offset = state["epoch"], state["block"], state["offset"]

    # ---- batches ----------------------------------------------------------------------------------

    def __iter__(self) -> Generator[Batch]:
        batches = ahead(self._batches())
        try:
            for batch, mark, (self.epoch, self.block, self.offset) in batches:
                self._lane.hand_over(mark, batch.columns.values())
                yield batch
        finally:
            batches.close()

    def _batches(self) -> Generator[tuple[Batch, Mark, tuple[int, int, int]]]:
        """Yield batches, each with the mark of its end in the lane and the position after it."""
        self._lane.settle()
        with self._lane():
            yield from self._assembled()

    def _assembled(self) -> Generator[tuple[Batch, Mark, tuple[int, int, int]]]:
        epoch, number, offset = self.epoch, self.block, self.offset
        batch, seen = Assembly(self._batch_layout), False
        blocks = ahead(self._blocks())
        try:
            for block, shuffle in blocks:
                self._pool.use(block)
                size, is_last = len(shuffle), block.item.is_last
                seen = seen or size > 0
                after = (block.item.epoch + 1, 0) if is_last else (block.item.epoch, block.item.block + 1)
                while offset < size:
                    stop = min(offset + self.batch_tokens - batch.tokens, size)
                    batch.add(block.columns, shuffle[offset:stop])
                    offset = stop
                    if batch.tokens == self.batch_tokens:
                        position = (*after, 0) if stop == size else (epoch, number, stop)
                        yield batch.done(), self._lane.mark(), position
                        batch = Assembly(self._batch_layout)
                if is_last and batch.tokens:
                    yield batch.done(), self._lane.mark(), (*after, 0)
                    batch = Assembly(self._batch_layout)
                (epoch, number), offset = after, 0
                self._pool.release(block, self._lane.mark())
                if is_last and not seen:
                    raise UserError(f"{self.store.place}: the stream's filter leaves no token ({self.filter})")
        finally:
            blocks.close()

    def _blocks(self) -> Generator[tuple[Block[_Number], Tensor]]:
        """Yield each block, and its rows in the order in which they are served."""
        with closing(self._pool.read(self._plan())) as blocks:
            for block in blocks:
                order = block_permutation(self.seed, block.item.epoch, block.item.block, len(block.rows))
                shuffle = torch.from_numpy(block.rows[order])
                yield block, shuffle.pin_memory() if self.device.type == "cuda" else shuffle

    def _plan(self) -> Iterator[tuple[_Number, list[int]]]:
        """Blocks and their chunks, from the position on."""
        epoch, number = self.epoch, self.block
        while self.epochs is None or epoch < self.epochs:
            order = epoch_order(self.seed, epoch, [chunk.unit for chunk in self.chunks])
            last = -(-len(order) // self.pool_chunks) - 1
            for block in range(number, last + 1):
                chosen = order[block * self.pool_chunks : (block + 1) * self.pool_chunks].tolist()
                yield _Number(epoch, block, block == last), chosen
            epoch, number = epoch + 1, 0
