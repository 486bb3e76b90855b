"""Exact, mergeable statistics of activations: float64, merged in unit order.

Legend: N tokens, D dimensions.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

if TYPE_CHECKING:
    from torch import Tensor


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
    def of(cls, z_ND: "Tensor", error: float = 0.0) -> "Moments":
        """Moments of rows; `error`: what the codec lost of them."""
        return cls.of_sums(len(z_ND), sums(z_ND).cpu().numpy(), error)

    @classmethod
    def of_sums(cls, count: int, found: np.ndarray, error: float = 0.0) -> "Moments":
        """Moments of `count` rows from their `sums`."""
        shift, total, squares, absmax = found[:-1].reshape(4, -1)
        if not count:
            return cls.empty(len(shift))
        m2 = np.maximum(squares - total**2 / count, 0.0)
        return cls(count, shift + total / count, m2, absmax, float(found[-1]), error)

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

    def without(self, part: "Moments") -> "Moments":
        """Undo `merge` of `part`, all but the largest magnitudes."""
        count = self.count - part.count
        if not count or not part.count:
            return self if count else Moments.empty(len(self.mean))
        mean = self.mean + (self.mean - part.mean) * (part.count / count)
        delta = part.mean - mean
        m2 = np.maximum(self.m2 - part.m2 - delta**2 * (count * part.count / self.count), 0.0)
        return Moments(count, mean, m2, self.absmax, self.norms - part.norms, self.error - part.error)

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


def sums(z_ND: "Tensor") -> "Tensor":
    """float64 [4 D + 1] on the device of the rows: the first row, the sums of all rows' differences from it and of
    their squares, the largest magnitudes; and the sum of the rows' lengths.

    One pass. The differences are exact, and so small that nothing is lost where a mean is large. In a fixed order, so
    that the bits depend on the rows and the kind of device alone.
    """
    import torch

    d = z_ND.shape[1]
    if not len(z_ND):
        return torch.zeros(4 * d + 1, dtype=torch.float64, device=z_ND.device)
    if z_ND.device.type == "cpu":
        return torch.from_numpy(_sums_on_cpu(z_ND))
    found = torch.zeros(4 * d + 1, dtype=torch.float64, device=z_ND.device)
    shift, total, squares, absmax = found[:-1].view(4, d)
    shift.copy_(z_ND[0])
    for rows in z_ND.split(16384):  # the float64 copy stays small
        exact = rows.double()
        found[-1] += torch.linalg.vector_norm(exact, dim=1).sum()
        torch.maximum(absmax, exact.abs().amax(dim=0), out=absmax)
        exact -= shift
        total += exact.sum(dim=0)
        squares += exact.square_().sum(dim=0)
    return found


def _sums_on_cpu(z_ND: "Tensor") -> np.ndarray:
    """By numpy, which sums in one thread."""
    d = z_ND.shape[1]
    found = np.zeros(4 * d + 1)
    shift, total, squares, absmax = found[:-1].reshape(4, d)
    shift[:] = z_ND[0].double().numpy()
    scratch = np.empty((256, d))
    for some in z_ND.split(len(scratch)):  # they stay in a core's cache
        rows, exact = some.float().numpy(), scratch[: len(some)]
        np.maximum(absmax, np.maximum(rows.max(axis=0), -rows.min(axis=0)), out=absmax)
        np.subtract(rows, shift, out=exact)
        total += exact.sum(axis=0)
        squares += np.square(exact, out=exact).sum(axis=0)
        found[-1] += np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64)).sum()
    return found
