"""Reconstruction metrics over a stream of batches, in float64.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2   over exactly the tokens seen

FVU is 1 for the mean predictor and unchanged by scaling. Intervals are over token rows (bootstrap.py).
Legend: N tokens, E dimensions, K active latents, M latents, R token rows.
"""

import numpy as np
import torch
from torch import Tensor

from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.bootstrap import interval

DENSE = 0.1

# A dimension that varies less than this share of the mean variance says nothing about reconstruction.
_FLAT = 1e-8
_DENSITY_EDGES = torch.linspace(-7, 0, 57)
"""log10 of firing density: 8 bins a decade."""


class ReconstructionMetrics:
    """Feed batches with `update`, get the metrics with `result`."""

    def __init__(self, d_out: int, width: int, rows: int = 0) -> None:
        """`rows`: number of token rows that the tokens come from, for intervals."""
        self.n = self.n_long = 0
        self.per_row = [torch.zeros(rows, *shape, dtype=torch.float64) for shape in ((), (d_out,), (), ())]
        """Per row: token count, and the sums of y [E], its squared length, and the squared error."""
        self.mean_E = torch.zeros(d_out, dtype=torch.float64)
        self.m2_E = torch.zeros(d_out, dtype=torch.float64)
        self.error_E = torch.zeros(d_out, dtype=torch.float64)
        self.cosine = self.l2_ratio = self.square_hat = self.dot = 0.0
        self.length = self.length_hat = self.l1 = self.legacy = 0.0
        self.fired_M = torch.zeros(width, dtype=torch.int64)

    def update(
        self, y_NE: Tensor, y_hat_NE: Tensor, values_NK: Tensor, indices_NK: Tensor, row_N: Tensor | None = None
    ) -> None:
        """Add a batch of targets, reconstructions and codes; `row_N`: each token's row, from 0, for the interval."""
        y, y_hat = y_NE.double().cpu(), y_hat_NE.double().cpu()
        n, mean = len(y), y.mean(0)
        delta = mean - self.mean_E
        total = self.n + n
        # Chan's merge of the variances of two sets of rows.
        self.m2_E += (y - mean).square().sum(0) + delta.square() * (self.n * n / total)
        self.mean_E += delta * (n / total)
        self.n = total
        self.error_E += (y - y_hat).square().sum(0)
        if row_N is not None:
            self._add_rows(y, (y - y_hat).square().sum(1), row_N.cpu())
        norm, norm_hat = y.norm(dim=1), y_hat.norm(dim=1)
        self.l2_ratio += float((norm_hat[norm > 0] / norm[norm > 0]).sum())
        self.n_long += int((norm > 0).sum())
        self.square_hat += float(norm_hat.square().sum())
        self.dot += float((y * y_hat).sum())
        self.cosine += float(torch.nn.functional.cosine_similarity(y, y_hat, dim=1).sum())
        self.length, self.length_hat = self.length + float(norm.sum()), self.length_hat + float(norm_hat.sum())
        self.l1 += float(values_NK.double().abs().sum())
        spread = (y - mean).square().sum(1)
        self.legacy += float((1 - (y - y_hat).square().sum(1)[spread > 0] / spread[spread > 0]).sum())
        self.fired_M += torch.bincount(indices_NK[values_NK != 0].cpu(), minlength=len(self.fired_M))

    def _add_rows(self, y: Tensor, error_N: Tensor, row_N: Tensor) -> None:
        if self.n == len(y):  # the first batch: a centre near the mean keeps sums of squares precise
            self.centre_E = y.mean(0)
        y = y - self.centre_E
        for total, parts in zip(self.per_row, (torch.ones_like(error_N), y, y.square().sum(1), error_N), strict=True):
            total.index_add_(0, row_N, parts)

    def _fvu_interval(self) -> list[float] | None:
        def fvu(n: np.ndarray, sums: np.ndarray, squares: np.ndarray, errors: np.ndarray) -> np.ndarray:
            result: np.ndarray = errors / (squares - (sums**2).sum(1) / n)
            return result

        seen = self.per_row[0] > 0
        return interval(fvu, *(total[seen].numpy() for total in self.per_row))

    def result(self) -> Result:
        """FVU, explained variance, per-dimension FVU, cosine, L0, L2 ratio, relative reconstruction bias, dead and
        dense latents, density histogram; each over `n` tokens. `explained_variance_legacy` is a mean over tokens, as
        SAEBench once computed it: tokens near the mean can give it any value."""
        alive_dims = self.m2_E > _FLAT * self.m2_E.mean()
        fvu = float(self.error_E.sum() / self.m2_E.sum())
        density_M = self.fired_M / self.n
        histogram = torch.histogram(density_M[self.fired_M > 0].log10().float(), _DENSITY_EDGES)
        return {
            "n": self.n,
            "fvu": fvu,
            **({"fvu_ci": self._fvu_interval()} if len(self.per_row[0]) else {}),
            "explained_variance": 1 - fvu,
            "fvu_per_dim": float((self.error_E[alive_dims] / self.m2_E[alive_dims]).mean()),
            "flat_dims": int((~alive_dims).sum()),
            "cosine": self.cosine / self.n,
            "l2_ratio": self.l2_ratio / max(self.n_long, 1),
            "relative_reconstruction_bias": self.square_hat / self.dot if self.dot else None,
            "l0": float(self.fired_M.sum()) / self.n,
            "l1": self.l1 / self.n,
            "mse": float(self.error_E.sum()) / self.n / len(self.error_E),
            "l2_norm_in": self.length / self.n,
            "l2_norm_out": self.length_hat / self.n,
            "explained_variance_legacy": self.legacy / self.n,
            **_frequencies(density_M),
            "dead_fraction": float((self.fired_M == 0).double().mean()),
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
