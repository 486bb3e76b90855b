"""Shuffled batches of activation pairs from a store.

The mental model: an epoch is a list of chunks (`order.epoch_order`); every `pool_chunks` of them form a block; a
block is read, filtered, permuted as a whole and drained into batches. A batch may span two blocks, never two
epochs. Three integers, (epoch, block, offset), say where the next token is; resuming reads one block.

Legend: B tokens of a batch, D input width, E output width.
"""

import hashlib
import json
import queue
import threading
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.store import ActivationStore
from skipcoder.trainer.order import block_permutation, epoch_order
from torch import Tensor

POOL_BYTES = 2**29
"""Pairs that are shuffled together by default. A reader holds up to four times as much for a moment. With more text the
batches would be better mixed, benchmarks/README.md says how much."""

KEEP_BYTES = 2**30
"""A split of at most this size is kept decoded in memory after its first epoch."""


class Batch(NamedTuple):
    """Tokens of one batch, in the model's own scale."""

    x: Tensor
    """[B, D] what enters the MLP."""
    y: Tensor
    """[B, E] what leaves it."""
    position: Tensor
    """int64 [B] flat position (row * context + position in row) in the store's tokens."""
    tokens: int
    """Tokens of the global batch, over all ranks."""


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
    x: Tensor
    y: Tensor
    position: Tensor
    shuffle: Tensor
    """Order in which its rows are served."""


class ActivationStream:
    """Endless (or `epochs` long) stream of batches. The order depends on (seed, epoch, layout) alone.

    batch_tokens counts over all ranks; rank r gets rows r::world_size of each global batch, and the last batch of
    an epoch is short.
    """

    def __init__(
        self,
        store: ActivationStore,
        hookpoint: str,
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
        self.store, self.hookpoint, self.filter = store, store.hookpoint(hookpoint), filter
        self.batch_tokens, self.seed, self.epochs = batch_tokens, seed, epochs
        self.rank, self.world_size = rank, world_size
        self.device, self.dtype = torch.device(device), dtype
        self.chunks = [
            (unit, start, min(start + store.chunk_rows, stop))
            for unit in store.split(split)
            for begin, stop in [store.unit_range(unit)]
            for start in range(begin, stop, store.chunk_rows)
        ]
        total = sum(stop - start for _, start, stop in self.chunks)
        if epochs is None and batch_tokens > total:
            raise UserError(
                f"train.batch_tokens={batch_tokens} is more than the {total:,} training tokens of {store.path}"
            )
        self.epoch = self.block = self.offset = 0
        facts = store.hookpoints[self.hookpoint]
        pair_bytes = 2 * (facts["d_in"] + facts["d_out"])
        self.pool_chunks = pool_chunks or max(1, POOL_BYTES // (pair_bytes * store.chunk_rows))
        small = total * pair_bytes <= KEEP_BYTES
        self._kept: dict[int, tuple[Tensor, Tensor, Tensor]] | None = {} if small and epochs != 1 else None

    # ---- position ---------------------------------------------------------------------------------

    def layout_hash(self) -> str:
        """Of everything but the position that decides which tokens come next."""
        facts = {
            "identity": self.store.attrs["identity_hash"],
            "chunks": self.chunks,
            "hookpoint": self.hookpoint,
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
                f"the stream of {self.store.path} has changed since this run was saved "
                "(more tokens in the store, or another filter, seed, pool or batch size); start a new run"
            )
        self.epoch, self.block, self.offset = state["epoch"], state["block"], state["offset"]

    # ---- batches ----------------------------------------------------------------------------------

    def __iter__(self) -> Generator[Batch]:
        parts: list[tuple[Tensor, ...]] = []
        missing, seen = self.batch_tokens, False
        blocks = _ahead(self._blocks())
        try:
            for block in blocks:
                size = len(block.position)
                seen = seen or size > 0
                while self.offset < size:
                    stop = min(self.offset + missing, size)
                    # Rows are moved once, here: a permuted copy of the block would move them twice.
                    rows = block.shuffle[self.offset : stop]
                    parts.append(tuple(z.index_select(0, rows) for z in (block.x, block.y, block.position)))
                    missing -= stop - self.offset
                    self.offset = stop
                    if not missing:
                        yield self._batch(parts)
                        parts, missing = [], self.batch_tokens
                self.epoch, self.block = (block.epoch + 1, 0) if block.is_last else (block.epoch, block.number + 1)
                self.offset = 0
                if block.is_last and parts:
                    yield self._batch(parts)
                    parts, missing = [], self.batch_tokens
                if block.is_last and not seen:
                    raise UserError(f"{self.store.path}: the stream's filter leaves no token ({self.filter})")
        finally:
            blocks.close()

    def _batch(self, parts: list[tuple[Tensor, ...]]) -> Batch:
        x, y, position = (torch.cat(z) if len(z) > 1 else z[0] for z in zip(*parts, strict=True))
        mine = slice(self.rank, None, self.world_size)
        x, y = (z[mine].to(self.device, self.dtype, non_blocking=True) for z in (x, y))
        return Batch(x, y, position[mine], len(position))

    def _blocks(self) -> Iterator[_Block]:
        epoch, number = self.epoch, self.block
        with ThreadPoolExecutor(2) as pool:
            while self.epochs is None or epoch < self.epochs:
                order = epoch_order(self.seed, epoch, [unit for unit, _, _ in self.chunks])
                last = -(-len(order) // self.pool_chunks) - 1
                for block in range(number, last + 1):
                    chosen = order[block * self.pool_chunks : (block + 1) * self.pool_chunks]
                    parts = list(pool.map(self._chunk, chosen.tolist()))
                    x, y, position = (torch.cat(z) for z in zip(*parts, strict=True))
                    shuffle = torch.from_numpy(block_permutation(self.seed, epoch, block, len(position)))
                    yield _Block(epoch, block, block == last, x, y, position, shuffle)
                epoch, number = epoch + 1, 0

    def _chunk(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        if self._kept is None:
            return self._read_chunk(chunk)
        if chunk not in self._kept:
            self._kept[chunk] = self._read_chunk(chunk)
        return self._kept[chunk]

    def _read_chunk(self, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
        unit, start, stop = self.chunks[chunk]
        position = self.store.read("index", start, stop).astype(np.int64)
        tokens = _tokens(self.store, unit)[position - self.store.unit_range(unit)[0]]
        keep = self.filter.keep(position, tokens, self.store.context, self.store.attrs["special_tokens"])
        x, y = (self.store.activations(self.hookpoint, side, start, stop) for side in ("input", "output"))
        if not keep.all():
            kept = torch.from_numpy(keep.nonzero()[0])  # a mask takes five times as long
            x, y, position = x.index_select(0, kept), y.index_select(0, kept), position[keep]
        return x, y, torch.from_numpy(position)


@lru_cache(maxsize=256)
def _tokens(store: ActivationStore, unit: int) -> np.ndarray:
    return store.tokens(unit).ravel()


def _ahead(blocks: Iterator[_Block]) -> Generator[_Block]:
    """Run `blocks` in a thread, one block ahead; its exceptions are raised here."""
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
            for block in blocks:
                if not put(block):
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
