"""Exact, mergeable statistics of activations: float64, merged in unit order.

Legend: N tokens, D dimensions.
"""

import base64
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_VECTORS = ("mean", "m2", "absmax")


@dataclass(frozen=True)
class Moments:
    """Count, mean, centred sum of squares and largest magnitude, each per dimension (float64)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    absmax: np.ndarray

    @classmethod
    def empty(cls, d: int) -> "Moments":
        """The neutral element of `merge`."""
        return cls(0, np.zeros(d), np.zeros(d), np.zeros(d))

    @classmethod
    def of(cls, z_ND: np.ndarray) -> "Moments":
        """Two-pass moments of rows. numpy sums axis 0 in one thread, so the bits depend on nothing else."""
        if not len(z_ND):
            return cls.empty(z_ND.shape[1])
        mean = z_ND.mean(axis=0, dtype=np.float64)
        m2 = np.zeros_like(mean)
        for start in range(0, len(z_ND), 1024):  # 1024 rows: the float64 copy stays small
            m2 += ((z_ND[start : start + 1024] - mean) ** 2).sum(axis=0)
        return cls(len(z_ND), mean, m2, np.abs(z_ND).max(axis=0).astype(np.float64))

    def merge(self, other: "Moments") -> "Moments":
        """Chan's update: as if both sets of rows had been seen at once."""
        if not other.count or not self.count:
            return self if not other.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        return Moments(count, mean, m2, np.maximum(self.absmax, other.absmax))

    @property
    def variance(self) -> np.ndarray:
        """Population variance per dimension."""
        return self.m2 / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        """Mean of z^2 over tokens and dimensions, uncentred."""
        return float((self.variance + self.mean**2).mean())

    def to_json(self) -> dict[str, object]:
        """Vectors as base64 of little-endian float64: exact and a third of the digits' size."""
        return {"count": self.count} | {
            name: base64.b64encode(getattr(self, name).astype("<f8").tobytes()).decode() for name in _VECTORS
        }

    @classmethod
    def from_json(cls, data: dict) -> "Moments":
        """Inverse of `to_json`."""
        vectors = (np.frombuffer(base64.b64decode(data[name]), dtype="<f8") for name in _VECTORS)
        return cls(int(data["count"]), *vectors)


def merge_all(parts: Iterable[Moments], d: int) -> Moments:
    """Merge in the order given; an empty iterable gives empty moments of `d` dimensions."""
    total = Moments.empty(d)
    for part in parts:
        total = total.merge(part)
    return total
