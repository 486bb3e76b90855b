"""95 % intervals by resampling token rows: tokens of one row are not independent, rows nearly are.

Every statistic here is a function of sums over rows, so a resample is a weighting of rows. Legend: R rows, S resamples.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np

SAMPLES = 1000
MIN_ROWS = 8
"""An interval from fewer rows would say more about the rows than about the coder."""


@lru_cache(maxsize=4)
def _weights(rows: int) -> np.ndarray:
    """[S, R] how often each row is in each resample; the same for all coders, so that differences are paired."""
    return np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), size=SAMPLES).astype(np.float64)


def interval(statistic: Callable[..., np.ndarray], *per_row: np.ndarray) -> list[float] | None:
    """[low, high] of `statistic`, which gets the sums [S, ...] of arrays [R, ...] over each resample's rows and gives
    [S]. None below MIN_ROWS rows."""
    rows = len(per_row[0])
    if rows < MIN_ROWS:
        return None
    values = statistic(*(np.tensordot(_weights(rows), array, axes=1) for array in per_row))
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]
