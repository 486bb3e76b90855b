"""Differences between coders that were measured on the same documents.

Two coders find the same documents easy or hard. So the interval of their difference, document by document, is much
narrower than either's own; overlapping intervals say nothing about which is better.

Legend: G documents.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from skipcoder.evals.stats.intervals import Interval, interval


class ByDocument(NamedTuple):
    """A number as a ratio of sums over documents: float64 [G] each."""

    over_G: np.ndarray
    under_G: np.ndarray
    tokens_G: np.ndarray

    @property
    def value(self) -> float:
        """The number."""
        return float(self.over_G.sum() / self.under_G.sum())

    def interval(self, positive: bool = False, confidence: float = 0.95) -> Interval | None:
        """Its interval; `positive` for what cannot be 0 or less."""
        return interval(
            np.divide, self.over_G, self.under_G, sizes=self.tokens_G, positive=positive, confidence=confidence
        )

    def minus(self, other: "ByDocument") -> "ByDocument":
        """The difference to another coder's number. AssertionError if that is of other documents or targets."""
        assert np.array_equal(self.under_G, other.under_G), "not of the same tokens"
        return self._replace(over_G=self.over_G - other.over_G)


def comparisons(coders: int) -> int:
    """Pairs among so many coders."""
    return coders * (coders - 1) // 2


def to_the_least(numbers: Sequence[ByDocument]) -> tuple[int, list[Interval | None]]:
    """Which of several coders' numbers is the least, and for each the interval of its difference to that (None for
    itself). All of these hold together with 95 %: Bonferroni's correction, for every pair, as any could have been the
    least."""
    least = min(range(len(numbers)), key=lambda i: numbers[i].value)
    confidence = 1 - 0.05 / max(1, comparisons(len(numbers)))
    return least, [
        None if i == least else of.minus(numbers[least]).interval(confidence=confidence) for i, of in enumerate(numbers)
    ]


def pairs(
    rows: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, ByDocument]], alike: Sequence[Hashable]
) -> list[dict[str, Any]]:
    """For each metric and each set of coders that can be compared (lower is better): every coder's difference to the
    best. `rows`: those of the table; `found`: what each has by document; `alike`: equal for those that can be compared,
    being of one store, hookpoint, filter and side."""
    table = []
    for metric in dict.fromkeys(key for of in found for key in of):
        groups: dict[Hashable, list[int]] = {}
        for i, of in enumerate(found):
            if metric in of:
                groups.setdefault((alike[i], of[metric].under_G.tobytes()), []).append(i)
        for places in groups.values():
            least, intervals = to_the_least([found[i][metric] for i in places])
            best = found[places[least]][metric]
            for i, ends in zip(places, intervals, strict=True):
                if i != places[least]:
                    table.append(
                        {
                            "metric": metric,
                            "over": "documents",
                            "run": rows[i]["run"],
                            "best": rows[places[least]]["run"],
                            "difference": found[i][metric].minus(best).value,
                            "difference_ci": ends,
                            "documents": len(best.over_G),
                            "comparisons": comparisons(len(places)),
                        }
                    )
    return table


def clear_best(table: Sequence[Mapping[str, Any]]) -> set[tuple[str, str]]:
    """(metric, run) of each best coder whose difference to every other is clearly above 0."""
    told: dict[tuple[str, str], bool] = {}
    for row in table:
        key = (row["metric"], row["best"])
        told[key] = told.get(key, True) and row["difference_ci"] is not None and row["difference_ci"][0] > 0
    return {key for key, clear in told.items() if clear}
