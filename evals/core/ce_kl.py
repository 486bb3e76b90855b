"""Turn every token's losses into what is reported of a coder spliced into its model.

Legend: B rows, T positions, G documents.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from torch import Tensor

from skipcoder.evals.core.passes import TokenLosses
from skipcoder.evals.core.results import BY_DOCUMENT, Result
from skipcoder.evals.stats.intervals import share
from skipcoder.evals.stats.pairs import ByDocument

BUCKETS = (1, 2, 4, 16, 64, 256, 1024, 4096)
"""Positions in a row where a range of `by_position` begins."""


def summary(clean: TokenLosses, losses: Mapping[str, TokenLosses], document_BT: np.ndarray | None = None) -> Result:
    """`ce_NAME` and `kl_NAME` (mean nats per predicted token) for each of `losses`; what splicing costs, `ce_increase`;
    and the share of the cost of ablation that it avoids: `ce_recovered_zero`, `ce_recovered_mean` (1: as good as the
    model, 0: as bad as ablation), None unless ablation clearly costs. `kl_recovered_*`: the same for the divergence.
    `document_BT`: the document of each predicted token, for intervals (`_ci`). Where `losses` has `NAME_all` (every
    position spliced), the same of those, and `by_position`."""
    result: Result = {
        "ce_tokens": clean.ce_BT.shape[0] * (clean.ce_BT.shape[1] + 1),
        "ce_rows": len(clean.ce_BT),
        "ce_clean": float(clean.ce_BT.mean()),
    }
    pieces = _Pieces(document_BT if document_BT is not None else np.indices(clean.ce_BT.shape)[0])
    every = "spliced_all" in losses
    for suffix in ("", "_all") if every else ("",):
        for way in ("zero", "mean", "spliced", "skip_only"):
            if (name := way + suffix) in losses:
                result[f"ce_{name}"] = float(losses[name].ce_BT.mean())
                result[f"kl_{name}"] = float(losses[name].kl_BT.mean())
        spliced_G, clean_G = pieces.sums(losses[f"spliced{suffix}"].ce_BT), pieces.sums(clean.ce_BT)
        for ablated in ("zero", "mean"):
            key, ablated_G = f"ce_recovered_{ablated}{suffix}", pieces.sums(losses[ablated + suffix].ce_BT)
            found = share(ablated_G - spliced_G, ablated_G - clean_G, pieces.tokens_G)
            result[key], result[f"{key}_ci"] = found if document_BT is not None else (found[0], None)
            kl, kl_ablated = result[f"kl_spliced{suffix}"], result[f"kl_{ablated}{suffix}"]
            result[f"kl_recovered_{ablated}{suffix}"] = 1 - kl / kl_ablated if kl_ablated else None
        if f"skip_only{suffix}" in losses:
            zero_G, skip_G = (pieces.sums(losses[f"{way}{suffix}"].ce_BT) for way in ("zero", "skip_only"))
            found = share(zero_G - skip_G, zero_G - clean_G, pieces.tokens_G)
            result[f"ce_recovered_zero_skip_only{suffix}"] = found[0]
        result[f"ce_increase{suffix}"] = result[f"ce_spliced{suffix}"] - result["ce_clean"]
    result |= {"ce_increase_ci": None, "kl_spliced_ci": None}
    if document_BT is not None:
        increase = pieces.of(losses["spliced"].ce_BT - clean.ce_BT)
        kl = pieces.of(losses["spliced"].kl_BT)
        result["ce_documents"] = len(pieces.tokens_G)
        result |= {"ce_increase_ci": increase.interval(), "kl_spliced_ci": kl.interval(positive=True)}
        result[BY_DOCUMENT] = {"ce_increase": increase, "kl_spliced": kl}
    if every:
        result["by_position"] = by_position(clean, losses["spliced_all"])
    return result


class _Pieces:
    """The predicted tokens by document."""

    def __init__(self, document_BT: np.ndarray) -> None:
        self._place = np.unique(document_BT, return_inverse=True)[1].ravel()
        self.tokens_G = np.bincount(self._place).astype(np.float64)

    def sums(self, z_BT: Tensor) -> np.ndarray:
        """Sums [G] over each document."""
        return np.bincount(self._place, z_BT.numpy().ravel())

    def of(self, z_BT: Tensor) -> ByDocument:
        """The mean over all tokens, by document."""
        return ByDocument(self.sums(z_BT), self.tokens_G, self.tokens_G)


def by_position(clean: TokenLosses, spliced: TokenLosses) -> list[dict[str, float | int]]:
    """Cost of splicing at all positions (nats, and KL) by the position of the last token read. This separates the first
    positions, whose activations can be massive, from the rest."""
    cost_T = (spliced.ce_BT - clean.ce_BT).mean(0)
    kl_T, end = spliced.kl_BT.mean(0), len(cost_T)
    edges = [0, *(b for b in BUCKETS if b < end), end]
    return [
        {"first": a, "last": b - 1, "ce": float(cost_T[a:b].mean()), "kl": float(kl_T[a:b].mean())}
        for a, b in pairwise(edges)
    ]
