"""Exact, mergeable statistics of activations: float64, merged in unit order.

Legend: N tokens, D dimensions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from safetensors.numpy import load, save


@dataclass(frozen=True)
class Moments:
    """Count, mean, centred sum of squares and largest magnitude, the last three per dimension (float64)."""

    count: int
    mean: np.ndarray
    m2: np.ndarray
    absmax: np.ndarray
    norms: float = 0.0
    """Sum of the tokens' lengths (L2)."""
    error: float = 0.0
    """Sum of squared distances from the model's own values: what the codec lost."""

    @classmethod
    def empty(cls, d: int) -> "Moments":
        """The neutral element of `merge`."""
        return cls(0, np.zeros(d), np.zeros(d), np.zeros(d))

    @classmethod
    def of(cls, z_ND: np.ndarray, error: float = 0.0) -> "Moments":
        """Two-pass moments of rows. numpy sums axis 0 in one thread, so the bits depend on the rows alone."""
        if not len(z_ND):
            return cls.empty(z_ND.shape[1])
        mean = z_ND.mean(axis=0, dtype=np.float64)
        m2, norms = np.zeros_like(mean), 0.0
        for start in range(0, len(z_ND), 1024):  # 1024 rows keep the float64 copy small
            rows = z_ND[start : start + 1024].astype(np.float64)
            norms += float(np.sqrt((rows**2).sum(axis=1)).sum())
            m2 += ((rows - mean) ** 2).sum(axis=0)
        return cls(len(z_ND), mean, m2, np.abs(z_ND).max(axis=0).astype(np.float64), norms, error)

    def merge(self, other: "Moments") -> "Moments":
        """Merge by Chan's update, as if both sets of rows had been seen at once."""
        if not other.count or not self.count:
            return self if not other.count else other
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        m2 = self.m2 + other.m2 + delta**2 * (self.count * other.count / count)
        absmax = np.maximum(self.absmax, other.absmax)
        return Moments(count, mean, m2, absmax, self.norms + other.norms, self.error + other.error)

    @property
    def variance(self) -> np.ndarray:
        """Population variance per dimension."""
        return self.m2 / max(self.count, 1)

    @property
    def mean_square(self) -> float:
        """Mean of z^2 over tokens and dimensions, uncentred."""
        return float((self.variance + self.mean**2).mean())

    @property
    def mean_norm(self) -> float:
        """Mean length (L2) of a token."""
        return self.norms / max(self.count, 1)

    @property
    def lost(self) -> float:
        """What the codec lost, as a fraction of the variance."""
        variation = float(self.m2.sum())
        return self.error / variation if variation else 0.0


def pack(moments: Mapping[str, Moments]) -> bytes:
    """Named moments as the bytes of a safetensors file: [3, D] (mean, m2, absmax) and [3] (count, norms, error), all
    float64."""
    arrays = {}
    for name, m in moments.items():
        arrays[f"{name}/vectors"] = np.stack([m.mean, m.m2, m.absmax])
        arrays[f"{name}/scalars"] = np.array([m.count, m.norms, m.error], dtype=np.float64)
    return save(arrays)


def unpack(content: bytes) -> dict[str, Moments]:
    """Inverse of `pack`."""
    arrays = load(content)
    names = [key.removesuffix("/vectors") for key in arrays if key.endswith("/vectors")]
    found = {}
    for name in names:
        count, norms, error = arrays[f"{name}/scalars"].tolist()
        mean, m2, absmax = arrays[f"{name}/vectors"]
        found[name] = Moments(int(count), mean, m2, absmax, norms, error)
    return found


def merge_all(parts: Iterable[Moments], total: Moments) -> Moments:
    """Merge `parts` into `total`, in the order given."""
    for part in parts:
        total = total.merge(part)
    return total
