"""How much of one text stands in another, word for word: n-grams of tokens that both have.

Legend: R rows, T tokens of a row, W n-grams.
"""

from collections.abc import Iterable

import numpy as np

NGRAM = 32
"""Tokens. Distinct documents share so long a passage only where one quotes the other, or both a licence, say."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def hashes(tokens_RT: np.ndarray, n: int) -> np.ndarray:
    """uint64 [R, W]: a hash of each n-gram inside a row."""
    windows = tokens_RT.shape[1] - n + 1
    total = np.zeros((len(tokens_RT), max(0, windows)), np.uint64)
    for i in range(n if windows > 0 else 0):
        total *= _FACTOR
        total += tokens_RT[:, i : i + windows].astype(np.uint64) + np.uint64(1)
        total ^= total >> np.uint64(29)
    return total


def shared(blocks: Iterable[np.ndarray], others: Iterable[np.ndarray], n: int = NGRAM) -> float | None:
    """Share of the n-grams of `blocks` [R, T] that `others` have, too; None if there is none. Reads both once and holds
    some thirty bytes for each n-gram of `blocks`."""
    mine, counts = np.unique(np.concatenate([hashes(b, n).ravel() for b in blocks]), return_counts=True)
    if not len(mine):
        return None
    found = np.zeros(len(mine), bool)
    for block in others:
        theirs = hashes(block, n).ravel()
        at = np.searchsorted(mine, theirs).clip(max=len(mine) - 1)
        found[at[mine[at] == theirs]] = True
    return float(counts[found].sum() / counts.sum())
