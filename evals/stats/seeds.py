"""What several seeds of one configuration have in common, and how far their numbers scatter."""

import math
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student
from torch import Tensor

from skipcoder.evals.stats.pairs import comparisons
from skipcoder.trainer.run.run import Run

SHARED = 0.7
"""Least cosine at which two latents count as one (arXiv 2501.16615)."""
MOST = 8192
"""Largest width that is matched; the time grows with its cube."""

_NAMES = ("hookpoint", "kind", "k", "width", "activation", "side", "train_tokens", "model", "configuration")


def groups(rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Indices of the rows of each configuration, which differ only in their seed."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        found.setdefault(row["configuration"], []).append(place)
    return list(found.values())


def shared_latents(a_ME: Tensor, b_ME: Tensor) -> float:
    """Share of one decoder's latents [M, E] that the other has too: latents are matched one to one for the largest sum
    of cosines (Hungarian), and those of at least SHARED count."""
    a, b = (torch.nn.functional.normalize(w.detach().float().cpu(), dim=1) for w in (a_ME, b_ME))
    cosine = (a @ b.T).numpy()
    rows, columns = linear_sum_assignment(cosine, maximize=True)
    return float((cosine[rows, columns] >= SHARED).mean())


def over_seeds(rows: Sequence[dict[str, Any]], runs: Sequence[Run | None]) -> list[dict[str, Any]]:
    """One row for each group: means, 95 % intervals by Student's t (with one seed: the row's own), and the share of
    latents that two seeds share (mean over pairs)."""
    table = []
    for places in groups(rows):
        first = rows[places[0]]
        result: dict[str, Any] = {key: first[key] for key in _NAMES if key in first} | {"seeds": len(places)}
        for key, value in first.items():
            if isinstance(value, float) and key != "seconds" and all(rows[i].get(key) is not None for i in places):
                values = np.array([rows[i][key] for i in places])
                result[key] = float(values.mean())
                result[f"{key}_ci"] = _interval(values) if len(places) > 1 else first.get(f"{key}_ci")
        decoders = [run.coder.W_dec for i in places if (run := runs[i]) is not None]
        if len(decoders) > 1 and first["width"] <= MOST:
            result["shared_latents"] = float(np.mean([shared_latents(a, b) for a, b in combinations(decoders, 2)]))
        table.append(result)
    return table


def seed_pairs(
    rows: Sequence[Mapping[str, Any]], seeds: Sequence[Hashable], alike: Sequence[Hashable], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Each configuration's difference to the best of those that can be compared (lower is better), seed by seed.
    Student's t; the intervals hold all together with 95 % (Bonferroni, for every pair); None unless both have the same
    seeds, two or more. `seeds`: of each row, None of a control; `alike`: equal for rows that can be compared; `run` and
    `best` are configurations."""
    table = []
    for metric in metrics:
        of: dict[Hashable, dict[str, dict[Any, float]]] = {}
        for row, seed, group in zip(rows, seeds, alike, strict=True):
            if row.get(metric) is not None and seed is not None:
                of.setdefault(group, {}).setdefault(row["configuration"], {})[seed] = row[metric]
        for every in of.values():
            means = {name: float(np.mean(list(values.values()))) for name, values in every.items()}
            best, together = min(means, key=lambda name: means[name]), comparisons(len(every))
            if all(len(values) < 2 for values in every.values()):
                continue
            for name in filter(lambda name: name != best, every):
                paired = every[name].keys() == every[best].keys() and len(every[name]) > 1
                differences = np.array(
                    [every[name][seed] - every[best][seed] for seed in every[best]] if paired else []
                )
                table.append(
                    {
                        "metric": metric,
                        "over": "seeds",
                        "run": name,
                        "best": best,
                        "difference": means[name] - means[best],
                        "difference_ci": _interval(differences, 1 - 0.05 / together) if paired else None,
                        "seeds": len(differences),
                        "comparisons": together,
                    }
                )
    return table


def _interval(values: np.ndarray, confidence: float = 0.95) -> list[float]:
    n = len(values)
    half = float(student.ppf((1 + confidence) / 2, n - 1) * values.std(ddof=1) / math.sqrt(n))
    return [float(values.mean()) - half, float(values.mean()) + half]
