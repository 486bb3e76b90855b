"""Differences between coders on the same documents: found where they are, and not where labels were swapped."""

from typing import Any

import numpy as np
import pytest

from skipcoder.evals.stats.pairs import ByDocument, clear_best, pairs

G = 40


def coder(rng: np.random.Generator, level: np.ndarray, better_by: float = 0.0) -> ByDocument:
    """FVU near 0.2, in documents of very different difficulty that all coders share."""
    variance = np.linspace(1, 3, G)
    error = variance * (0.2 * level - better_by + rng.normal(0, 0.002, G))
    return ByDocument(error, variance, 100 * variance)


def rows(count: int, **more: Any) -> list[dict[str, Any]]:
    return [{"run": str(i), "hookpoint": "h", **more} for i in range(count)]


def test_a_difference_far_smaller_than_either_s_own_interval_is_found() -> None:
    rng = np.random.default_rng(0)
    level = rng.lognormal(0, 0.5, G)
    found = [coder(rng, level), coder(rng, level, better_by=0.005)]
    table = pairs(rows(2), [{"fvu": of} for of in found], ["h"] * 2)
    assert [(row["run"], row["best"], row["documents"]) for row in table] == [("0", "1", G)]
    low, high = table[0]["difference_ci"]
    assert 0.003 < low < 0.005 < high < 0.007
    one, two = (of.interval(positive=True) or (0, 0) for of in found)
    assert one[0] < two[1]  # their own intervals overlap
    assert clear_best(table) == {("fvu", "1")}


def test_swapping_the_labels_of_documents_leaves_nothing() -> None:
    """A permutation control: where coders are exchanged at random in each document, the interval excludes 0 in 5 %."""
    rng = np.random.default_rng(0)
    level, excluded = rng.lognormal(0, 0.5, G), 0
    a, b = coder(rng, level), coder(rng, level, better_by=0.005)
    for _ in range(1000):
        swap = rng.random(G) < 0.5
        one = a._replace(over_G=np.where(swap, b.over_G, a.over_G))
        two = a._replace(over_G=np.where(swap, a.over_G, b.over_G))
        low, high = one.minus(two).interval() or (0, 0)
        excluded += not low <= 0 <= high
    assert 0.02 < excluded / 1000 < 0.08


def test_the_best_of_many_equals_is_not_marked() -> None:
    """Of ten coders that differ by chance alone, one is marked in 5 % of trials or fewer: all are tested at once."""
    rng, marked = np.random.default_rng(0), 0
    for _ in range(300):
        level = rng.lognormal(0, 0.5, G)
        marked += bool(clear_best(pairs(rows(10), [{"fvu": coder(rng, level)} for _ in range(10)], ["h"] * 10)))
    assert marked / 300 <= 0.05


def test_only_what_can_be_compared_is() -> None:
    """Not coders of other stores, hookpoints or filters, whatever tokens they were measured on."""
    rng = np.random.default_rng(0)
    found = [coder(rng, np.ones(G)) for _ in range(3)]
    assert pairs(rows(3), [{"fvu": of} for of in found], ["a", "b", "c"]) == []
    found[2] = found[2]._replace(under_G=found[2].under_G + 1)  # other targets
    table = pairs(rows(3), [{"fvu": of} for of in found], ["a", "b", "a"])
    assert table == [] and clear_best(table) == set()
    with pytest.raises(AssertionError, match="not of the same tokens"):
        found[0].minus(found[2])


def test_intervals_hold_all_together() -> None:
    """Of six equal coders, any interval that excludes 0 is a mistake: in no more than 5 % of trials, chance added."""
    rng, mistaken = np.random.default_rng(0), 0
    for _ in range(400):
        level = rng.lognormal(0, 0.5, G)
        table = pairs(rows(6), [{"fvu": coder(rng, level)} for _ in range(6)], ["h"] * 6)
        mistaken += any(row["difference_ci"][0] > 0 for row in table)
    assert mistaken / 400 <= 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5


def test_too_few_documents_tell_nothing() -> None:
    rng = np.random.default_rng(0)
    few = [ByDocument(*(z[:10] for z in coder(rng, np.ones(G), better_by))) for better_by in (0.0, 0.1)]
    table = pairs(rows(2), [{"fvu": of} for of in few], ["h"] * 2)
    assert table[0]["difference_ci"] is None and table[0]["difference"] > 0.09 and clear_best(table) == set()
