"""Reconstruction metrics over a stream of batches, in float64.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2   over exactly the tokens seen

1 for the mean predictor, unchanged by scaling. Legend: N tokens, E dimensions, K active latents, M latents.
"""

from typing import Any

import torch
from torch import Tensor

# A dimension that varies less than this share of the mean variance says nothing about reconstruction.
_FLAT = 1e-8
_DENSITY_EDGES = torch.linspace(-7, 0, 57)
"""log10 of firing density: 8 bins a decade."""


class ReconstructionMetrics:
    """Feed batches with `update`, read with `result`."""

    def __init__(self, d_out: int, width: int) -> None:
        self.n = 0
        self.mean_E = torch.zeros(d_out, dtype=torch.float64)
        self.m2_E = torch.zeros(d_out, dtype=torch.float64)
        self.error_E = torch.zeros(d_out, dtype=torch.float64)
        self.cosine = 0.0
        self.fired_M = torch.zeros(width, dtype=torch.int64)

    def update(self, y_NE: Tensor, y_hat_NE: Tensor, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Add a batch of targets, reconstructions and codes."""
        y, y_hat = y_NE.double().cpu(), y_hat_NE.double().cpu()
        n, mean = len(y), y.mean(0)
        delta = mean - self.mean_E
        total = self.n + n
        # Chan's merge of the variances of two sets of rows.
        self.m2_E += (y - mean).square().sum(0) + delta.square() * (self.n * n / total)
        self.mean_E += delta * (n / total)
        self.n = total
        self.error_E += (y - y_hat).square().sum(0)
        self.cosine += float(torch.nn.functional.cosine_similarity(y, y_hat, dim=1).sum())
        self.fired_M += torch.bincount(indices_NK[values_NK > 0].cpu(), minlength=len(self.fired_M))

    def result(self) -> dict[str, Any]:
        """FVU, explained variance, per-dimension FVU, cosine, L0, dead fraction, density histogram; each over `n`
        tokens."""
        alive_dims = self.m2_E > _FLAT * self.m2_E.mean()
        fvu = float(self.error_E.sum() / self.m2_E.sum())
        density_M = self.fired_M / self.n
        histogram = torch.histogram(density_M[self.fired_M > 0].log10().float(), _DENSITY_EDGES)
        return {
            "n": self.n,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "fvu_per_dim": float((self.error_E[alive_dims] / self.m2_E[alive_dims]).mean()),
            "flat_dims": int((~alive_dims).sum()),
            "cosine": self.cosine / self.n,
            "l0": float(self.fired_M.sum()) / self.n,
            "dead_fraction": float((self.fired_M == 0).double().mean()),
            "density_histogram": {
                "log10_edges": [round(e, 3) for e in _DENSITY_EDGES.tolist()],
                "latents": [int(c) for c in histogram.hist.tolist()],
            },
        }
