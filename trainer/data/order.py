"""The order of training tokens, as pure functions of (seed, epoch, layout). No I/O."""

from collections.abc import Sequence

import numpy as np


def epoch_order(seed: int, epoch: int, unit_of_chunk: Sequence[int]) -> np.ndarray:
    """Return chunk numbers in the order of one epoch.

    Chunks are dealt in rounds: each round takes one random chunk from every unit that has any left, with the
    units in random order. Neighbours, and thus chunks that are shuffled together, come from different units.
    """
    rng = _generator(seed, epoch, 0)
    chunks_of: dict[int, list[int]] = {}
    for chunk in rng.permutation(len(unit_of_chunk)).tolist():
        chunks_of.setdefault(unit_of_chunk[chunk], []).append(chunk)
    piles = [chunks_of[unit] for unit in sorted(chunks_of)]
    order: list[int] = []
    for depth in range(max(map(len, piles), default=0)):
        layer = [pile[depth] for pile in piles if len(pile) > depth]
        order += [layer[i] for i in rng.permutation(len(layer))]
    return np.array(order, dtype=np.int64)


def block_permutation(seed: int, epoch: int, block: int, size: int) -> np.ndarray:
    """Return the order of the `size` tokens of one block (= `pool_chunks` consecutive chunks)."""
    return _generator(seed, epoch, block + 1).permutation(size)


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(list(key)))
