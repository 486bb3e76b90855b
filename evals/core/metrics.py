"""Reconstruction metrics over a stream of batches, in float64.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2   over exactly the tokens seen

FVU is 1 for the mean predictor and unchanged by scaling. Intervals are over documents (stats/intervals.py).
Sums stay on the device of the batches, and are added up in an order that does not change.
Legend: N tokens, E dimensions, K active latents, M latents, G documents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.evals.core.results import BY_DOCUMENT, Result
from skipcoder.evals.stats.pairs import ByDocument

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
    document_N: Tensor | None
    """Each token's document, from 0."""


class Targets:
    """What the targets have to do with it: computed once for all coders that see them."""

    def __init__(self, d_out: int, documents: int = 0, device: str | torch.device = "cpu") -> None:
        """`documents`: number of documents that the tokens come from, for intervals."""
        self.n, self.documents = 0, documents
        self.mean_E, self.m2_E, self.centre_E = torch.zeros(3, d_out, dtype=torch.float64, device=device)
        self.length = torch.zeros((), dtype=torch.float64, device=device)
        self.n_long = torch.zeros((), dtype=torch.int64, device=device)
        self.count_G, self.spread_G = self.length.new_zeros((2, documents))
        """Of each document: its tokens, and the sum of their squared distances from the centre."""

    def add(self, y_NE: Tensor, document_N: Tensor | None = None) -> Target:
        """Add a batch; `document_N`: each token's document, from 0, if there are to be intervals."""
        y = y_NE.to(self.mean_E.device, torch.float64)
        n, mean = len(y), y.mean(0)
        if not self.n:  # of a random sample, so near that of all
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
        if document_N is not None:
            document_N = document_N.to(y.device)
            add_to(self.count_G, document_N, torch.ones_like(norm))
            add_to(self.spread_G, document_N, (y - self.centre_E).square().sum(1))
        return Target(y, norm, spread.sum(1), document_N)


def add_to(total_G: Tensor, place_N: Tensor, parts_N: Tensor) -> None:
    """total_G[place_N[i]] += parts_N[i]. `index_add_` would be no faster, and on a GPU add in any order."""
    total_G.index_put_((place_N,), parts_N, accumulate=True)


class ReconstructionMetrics:
    """Feed the batches of `targets` with `update`, get the metrics with `result`."""

    def __init__(self, width: int, targets: Targets) -> None:
        self.targets = targets
        self.error_E = torch.zeros_like(targets.mean_E)
        self.error_G = torch.zeros_like(targets.count_G)
        self.sums: dict[str, Tensor] = {}
        self.fired_M = torch.zeros(width, dtype=torch.int64, device=targets.mean_E.device)

    def update(self, target: Target, y_hat_NE: Tensor, values_NK: Tensor, indices_NK: Tensor) -> None:
        """Add reconstructions and codes of a batch that `targets.add` gave."""
        y, norm, spread, document_N = target
        y_hat, values, indices = (z.to(y.device) for z in (y_hat_NE.double(), values_NK, indices_NK))
        squares = (y - y_hat).square()
        self.error_E += squares.sum(0)
        error, dot, norm_hat = squares.sum(1), (y * y_hat).sum(1), y_hat.norm(dim=1)
        if document_N is not None:
            add_to(self.error_G, document_N, error)
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

    def _of_documents(self) -> Result:
        """FVU's interval, and FVU as a ratio of sums over documents: squared errors, and squared distances from the
        mean."""
        if not self.targets.documents:
            return {"fvu_ci": None}
        count_G, spread_G, error_G = (
            z.cpu().numpy() for z in (self.targets.count_G, self.targets.spread_G, self.error_G)
        )
        seen = count_G > 0
        spread_G = spread_G * (float(self.targets.m2_E.sum()) / spread_G.sum())  # from the mean, not from the centre
        fvu = ByDocument(error_G[seen], spread_G[seen], count_G[seen])
        return {"documents": int(seen.sum()), "fvu_ci": fvu.interval(positive=True), BY_DOCUMENT: {"fvu": fvu}}

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
            **self._of_documents(),
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
