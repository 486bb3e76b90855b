"""Reconstruction metrics over a stream of batches, in float64.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2   over exactly the tokens seen

FVU is 1 for the mean predictor and unchanged by scaling. Intervals are over token rows (bootstrap.py).
Sums stay on the device of the batches, and are added up in an order that does not change.
Legend: N tokens, E dimensions, K active latents, M latents, R token rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.bootstrap import interval

DENSE = 0.1

# A dimension that varies less than this share of the mean variance says nothing about reconstruction.
_FLAT = 1e-8
_DENSITY_EDGES = torch.linspace(-7, 0, 57)
"""log10 of firing density: 8 bins a decade; the first also counts all below."""

_SHORTEST = 1e-8
"""Vectors count as no shorter in cosines, as in torch's."""


class Target(NamedTuple):
    """A batch of targets, and what is needed of them for each coder."""

    y_NE: Tensor
    norm_N: Tensor
    spread_N: Tensor
    """Squared distance from the batch's mean."""
    row_N: Tensor | None
    """Each token's row, from 0."""


class Targets:
    """What the targets have to do with it: computed once for all coders that see them."""

    def __init__(self, d_out: int, rows: int = 0, device: str | torch.device = "cpu") -> None:
        """`rows`: number of token rows that the tokens come from, for intervals."""
        self.n, self.rows = 0, rows
        self.mean_E, self.m2_E, self.centre_E = torch.zeros(3, d_out, dtype=torch.float64, device=device)
        self.length = torch.zeros((), dtype=torch.float64, device=device)
        self.n_long = torch.zeros((), dtype=torch.int64, device=device)
        self.per_row = [self.length.new_zeros((rows, *shape)) for shape in ((), (d_out,), ())]
        """Of each row: token count, sum of y - centre [E], and of its squared length."""

    def add(self, y_NE: Tensor, row_N: Tensor | None = None) -> Target:
        """Add a batch; `row_N`: each token's row, from 0, if there are to be intervals."""
        y = y_NE.to(self.mean_E.device, torch.float64)
        n, mean = len(y), y.mean(0)
        if not self.n:  # a centre near the mean keeps sums of squares precise
            self.centre_E = mean
        delta, total = mean - self.mean_E, self.n + len(y)
        spread = (y - mean).square()
        # Chan's merge of the variances of two sets of rows.
        self.m2_E += spread.sum(0) + delta.square() * (self.n * n / total)
        self.mean_E += delta * (n / total)
        self.n = total
        norm = y.norm(dim=1)
        self.length += norm.sum()
        self.n_long += (norm > 0).sum()
        if row_N is not None:
            row_N = row_N.to(y.device)
            near = y - self.centre_E
            for of_row, parts in zip(self.per_row, (torch.ones_like(norm), near, near.square().sum(1)), strict=True):
                add_rows(of_row, row_N, parts)
        return Target(y, norm, spread.sum(1), row_N)


def add_rows(total: Tensor, row_N: Tensor, parts: Tensor) -> None:
    """total[row_N[i]] += parts[i]. `index_add_` would be no faster, and on a GPU add in any order."""
    total.index_put_((row_N,), parts, accumulate=True)


class ReconstructionMetrics:
    """Feed the batches of `targets` with `update`, get the metrics with `result`."""

    def __init__(self, width: int, targets: Targets) -> None:
        self.targets = targets
        self.error_E = torch.zeros_like(targets.mean_E)
        self.error_R = torch.zeros_like(targets.per_row[0])
        self.sums: dict[str, Tensor] = {}
        self.fired_M = torch.zeros(width, dtype=torch.int64, device=targets.mean_E.device)

    def update(self, target: Target, y_hat_NE: Tensor, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Add reconstructions and codes of a batch that `targets.add` gave."""
        y, norm, spread, row_N = target
        y_hat, values, indices = (z.to(y.device) for z in (y_hat_NE.double(), values_NK, indices_NK))
        squares = (y - y_hat).square()
        self.error_E += squares.sum(0)
        error, dot, norm_hat = squares.sum(1), (y * y_hat).sum(1), y_hat.norm(dim=1)
        if row_N is not None:
            add_rows(self.error_R, row_N, error)
        found = {
            "cosine": dot / (norm.clamp_min(_SHORTEST) * norm_hat.clamp_min(_SHORTEST)),
            "l2_ratio": torch.where(norm > 0, norm_hat / norm, 0),
            "square_hat": norm_hat.square(),
            "dot": dot,
            "length_hat": norm_hat,
            "l1": values.double().abs(),
            "legacy": torch.where(spread > 0, 1 - error / spread, 0),
        }
        for name, parts in found.items():
            self.sums[name] = self.sums.get(name, 0) + parts.sum()
        self.fired_M.scatter_add_(0, indices.long().flatten(), (values != 0).long().flatten())

    def _fvu_interval(self) -> list[float] | None:
        def fvu(n: np.ndarray, sums: np.ndarray, squares: np.ndarray, errors: np.ndarray) -> np.ndarray:
            result: np.ndarray = errors / (squares - (sums**2).sum(1) / n)
            return result

        of_rows = [total.cpu() for total in (*self.targets.per_row, self.error_R)]
        seen = of_rows[0] > 0
        return interval(fvu, *(total[seen].numpy() for total in of_rows))

    def result(self) -> Result:
        """FVU, explained variance, per-dimension FVU, cosine, L0, L2 ratio, relative reconstruction bias, dead and
        dense latents, density histogram; each over `n` tokens. `explained_variance_legacy` is a mean over tokens, as
        SAEBench once computed it: tokens near the mean can give it any value."""
        n = self.targets.n
        m2_E, error_E, fired_M = (z.cpu() for z in (self.targets.m2_E, self.error_E, self.fired_M))
        total = {name: float(value) for name, value in self.sums.items()}
        alive_dims = m2_E > _FLAT * m2_E.mean()
        fvu = float(error_E.sum() / m2_E.sum())
        density_M = fired_M / n
        decades = density_M[fired_M > 0].log10().float().clamp_min(float(_DENSITY_EDGES[0]))
        histogram = torch.histogram(decades, _DENSITY_EDGES)
        return {
            "n": n,
            "fvu": fvu,
            **({"fvu_ci": self._fvu_interval()} if self.targets.rows else {}),
            "explained_variance": 1 - fvu,
            "fvu_per_dim": float((error_E[alive_dims] / m2_E[alive_dims]).mean()),
            "flat_dims": int((~alive_dims).sum()),
            "cosine": total["cosine"] / n,
            "l2_ratio": total["l2_ratio"] / max(int(self.targets.n_long), 1),
            "relative_reconstruction_bias": total["square_hat"] / total["dot"] if total["dot"] else None,
            "l0": float(fired_M.sum()) / n,
            "l1": total["l1"] / n,
            "mse": float(error_E.sum()) / n / len(error_E),
            "l2_norm_in": float(self.targets.length) / n,
            "l2_norm_out": total["length_hat"] / n,
            "explained_variance_legacy": total["legacy"] / n,
            **_frequencies(density_M),
            "dead_fraction": float((fired_M == 0).double().mean()),
            "dense_fraction": float((density_M > DENSE).double().mean()),
            "density_histogram": {
                "log10_edges": [round(e, 3) for e in _DENSITY_EDGES.tolist()],
                "latents": [int(c) for c in histogram.hist.tolist()],
            },
        }


def _frequencies(density_M: Tensor) -> dict[str, float]:
    """Share of the latents that fire on more than 1 % and 10 % of tokens, and their share of all firing."""
    found = {}
    for percent in (1, 10):
        over = density_M > percent / 100
        found[f"freq_over_{percent}_percent"] = float(over.double().mean())
        found[f"normalized_freq_over_{percent}_percent"] = float(
            density_M[over].sum() / density_M.sum().clamp_min(1e-12)
        )
    return found
