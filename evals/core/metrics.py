"""Reconstruction metrics over a stream of batches, in float64.

    FVU = sum ||y - y_hat||^2 / sum ||y - mean(y)||^2   over exactly the tokens seen

FVU is 1 for the mean predictor and unchanged by scaling. Of a coder that writes several sides it is the mean over the
sides. Intervals are over documents (stats/intervals.py). Sums stay on the device of the batches, and are added up in an
order that does not change.
Legend: N tokens, E dimensions, S sides, K active latents, M latents, G documents.
"""

from collections.abc import Sequence
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

    def __init__(self, widths: Sequence[int], documents: int = 0, device: str | torch.device = "cpu") -> None:
        """`widths`: of the sides of a target; `documents`: number of documents that the tokens come from, for
        intervals."""
        self.n, self.widths, self.documents = 0, list(widths), documents
        self.mean_E, self.m2_E, self.centre_E = torch.zeros(3, sum(widths), dtype=torch.float64, device=device)
        self.length = torch.zeros((), dtype=torch.float64, device=device)
        self.n_long = torch.zeros((), dtype=torch.int64, device=device)
        self.count_G, self.spread_GS = self.length.new_zeros(documents), self.length.new_zeros(documents, len(widths))
        """Of each document: its tokens, and on each side the sum of their squared distances from the centre."""

    def by_side(self, squares_E: Tensor) -> Tensor:
        """Sums [..., S] over the dimensions of each side."""
        return torch.stack([side.sum(-1) for side in squares_E.split(self.widths, -1)], -1)

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
            add_to(self.spread_GS, document_N, self.by_side((y - self.centre_E).square()))
        return Target(y, norm, spread.sum(1), document_N)


def add_to(total: Tensor, place_N: Tensor, parts: Tensor) -> None:
    """total[place_N[i]] += parts[i]. `index_add_` would be no faster, and on a GPU add in any order."""
    total.index_put_((place_N,), parts, accumulate=True)


class ReconstructionMetrics:
    """Feed the batches of `targets` with `update`, get the metrics with `result`."""

    def __init__(self, width: int, targets: Targets) -> None:
        self.targets = targets
        self.error_E = torch.zeros_like(targets.mean_E)
        self.error_GS = torch.zeros_like(targets.spread_GS)
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
            add_to(self.error_GS, document_N, self.targets.by_side(squares))
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

    def _fvu(self) -> Result:
        """FVU and its interval, and FVU as a ratio of sums over documents: squared errors, and squared distances from
        the mean. Where there are several sides, also those of each."""
        m2_S, error_S = (self.targets.by_side(z).cpu() for z in (self.targets.m2_E, self.error_E))
        each: list[Result] = [{"fvu": float(fvu), "fvu_ci": None} for fvu in error_S / m2_S]
        found: Result = {"fvu": sum(side["fvu"] for side in each) / len(each), "fvu_ci": None}
        if self.targets.documents:
            sums = self.targets.count_G, self.targets.spread_GS, self.error_GS
            count_G, spread_GS, error_GS = (z.cpu() for z in sums)
            seen, weight_S = count_G > 0, torch.ones_like(m2_S) if len(each) == 1 else 1 / m2_S
            spread_GS = spread_GS * (m2_S / spread_GS.sum(0))  # from the mean, not from the centre
            count, spread, error = (z[seen].numpy() for z in (count_G, spread_GS * weight_S, error_GS * weight_S))
            for s, side in enumerate(each):
                side["fvu_ci"] = ByDocument(error[:, s], spread[:, s], count).interval(positive=True)
            fvu = ByDocument(error.sum(1), spread.sum(1), count)
            found |= {"documents": len(count), "fvu_ci": fvu.interval(positive=True), BY_DOCUMENT: {"fvu": fvu}}
        return found | ({"sides": each} if len(each) > 1 else {})

    def result(self) -> Result:
        """FVU, explained variance, per-dimension FVU, cosine, L0, L2 ratio, relative reconstruction bias, dead and
        dense latents, density histogram; each over `n` tokens. `explained_variance_legacy` is a mean over tokens, as
        SAEBench once computed it: tokens near the mean can give it any value."""
        n = self.targets.n
        m2_E, error_E, fired_M = (z.cpu() for z in (self.targets.m2_E, self.error_E, self.fired_M))
        total = {name: float(value) for name, value in self.sums.items()}
        alive_dims = m2_E > _FLAT * m2_E.mean()
        fvu = self._fvu()
        density_M = fired_M / n
        decades = density_M[fired_M > 0].log10().float().clamp_min(float(_DENSITY_EDGES[0]))
        histogram = torch.histogram(decades, _DENSITY_EDGES)
        return {
            "n": n,
            **fvu,
            "explained_variance": 1 - fvu["fvu"],
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
