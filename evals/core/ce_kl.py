"""Turn every token's losses into what is reported of a coder spliced into its model.

Legend: B rows, T positions.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from skipcoder.evals.core.passes import TokenLosses
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.bootstrap import interval

BUCKETS = (1, 2, 4, 16, 64, 256, 1024, 4096)
"""Positions in a row where a range of `by_position` begins."""


def summary(clean: TokenLosses, losses: Mapping[str, TokenLosses]) -> Result:
    """`ce_NAME` and `kl_NAME` (mean nats per predicted token) for each of `losses`, and the share of the cost of
    ablation that the splice avoids: `ce_recovered_zero`, `ce_recovered_mean` (1: as good as the model, 0: as bad as
    ablation). `kl_recovered_*`: the same for the divergence. `_ci`: 95 % intervals over rows; null with too few rows,
    or where the cost of ablation is not clearly above 0."""
    result: Result = {
        "ce_tokens": clean.ce_BT.shape[0] * (clean.ce_BT.shape[1] + 1),
        "ce_rows": len(clean.ce_BT),
        "ce_clean": float(clean.ce_BT.mean()),
    }
    for suffix in ("", "_all"):
        for way in ("zero", "mean", "spliced", "skip_only"):
            if (name := way + suffix) in losses:
                result[f"ce_{name}"] = float(losses[name].ce_BT.mean())
                result[f"kl_{name}"] = float(losses[name].kl_BT.mean())
        for ablated in ("zero", "mean"):
            key, of = f"ce_recovered_{ablated}{suffix}", (clean, losses[f"spliced{suffix}"], losses[ablated + suffix])
            result[key] = recovered(result["ce_clean"], result[f"ce_spliced{suffix}"], result[f"ce_{ablated}{suffix}"])
            result[f"{key}_ci"] = _interval(*of)
            kl, kl_ablated = result[f"kl_spliced{suffix}"], result[f"kl_{ablated}{suffix}"]
            result[f"kl_recovered_{ablated}{suffix}"] = 1 - kl / kl_ablated if kl_ablated else None
        if f"skip_only{suffix}" in losses:
            skip_only, zero = result[f"ce_skip_only{suffix}"], result[f"ce_zero{suffix}"]
            result[f"ce_recovered_zero_skip_only{suffix}"] = recovered(result["ce_clean"], skip_only, zero)
    result["ce_spliced_ci"] = interval(lambda ce: ce / len(clean.ce_BT), _row_means(losses["spliced"]))
    result["by_position"] = by_position(clean, losses["spliced_all"])
    return result


def recovered(clean: float, spliced: float, ablated: float) -> float | None:
    """The share recovered; None where ablation costs nothing."""
    return None if ablated == clean else (ablated - spliced) / (ablated - clean)


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


def _row_means(losses: TokenLosses) -> np.ndarray:
    return losses.ce_BT.mean(1).numpy()


def _interval(clean: TokenLosses, spliced: TokenLosses, ablated: TokenLosses) -> list[float] | None:
    def share(clean: np.ndarray, spliced: np.ndarray, ablated: np.ndarray) -> np.ndarray:
        cost = ablated - clean
        # A share of a cost that may be 0 has no interval.
        result: np.ndarray = np.divide(ablated - spliced, cost, out=np.full_like(cost, np.nan), where=cost > 0)
        return result

    return interval(share, *map(_row_means, (clean, spliced, ablated)))
