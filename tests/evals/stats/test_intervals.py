"""Every interval that is printed covers what it promises, in simulations; a share of nothing is not given."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import t as student

from skipcoder.evals.stats.intervals import LEAST, effective, interval, of_mean, share

TRIALS = 2000
DEVIATIONS = 4 * (0.95 * 0.05 / TRIALS) ** 0.5
"""What chance may add to or take from a coverage, 0.02."""


def normal(rng: np.random.Generator, G: int) -> tuple[np.ndarray, np.ndarray]:
    return rng.normal(1, 0.3, G), np.full(G, 100.0)


def skewed(rng: np.random.Generator, G: int) -> tuple[np.ndarray, np.ndarray]:
    """The number is three times as high in one document of twenty as in most."""
    return rng.lognormal(-0.245, 0.7, G), np.full(G, 100.0)


def unequal(rng: np.random.Generator, G: int) -> tuple[np.ndarray, np.ndarray]:
    """A few documents hold most of the tokens."""
    return rng.lognormal(-0.08, 0.4, G), np.ceil(rng.lognormal(5, 1, G))


def difference(rng: np.random.Generator, G: int) -> tuple[np.ndarray, np.ndarray]:
    """Of either sign, in documents of unequal size."""
    return rng.normal(1, 2.5, G), np.ceil(rng.lognormal(5, 0.7, G))


@pytest.mark.parametrize("documents", [24, 48, 100])
@pytest.mark.parametrize("draw", [normal, skewed, unequal, difference])
def test_coverage(draw: Callable[..., tuple[np.ndarray, np.ndarray]], documents: int) -> None:
    """The true number, 1 in each case, is inside in 93 to 97 %, give or take what chance does in these trials."""
    rng, inside, given = np.random.default_rng(0), 0, 0
    for _ in range(TRIALS):
        value, size = draw(rng, documents)
        ends = interval(np.divide, value * size, size, sizes=size, positive=draw in (skewed, unequal))
        assert (ends is None) == (effective(size) < LEAST)
        if ends is not None:
            given += 1
            inside += ends[0] <= 1 <= ends[1]
    if given > TRIALS / 4:
        assert 0.93 - DEVIATIONS <= inside / given <= 0.97 + DEVIATIONS


def test_coverage_where_pieces_are_very_skewed_and_very_unequal() -> None:
    """The worst that was found, and is stated: about 91 %."""
    rng, inside, given = np.random.default_rng(0), 0, 0
    for _ in range(2 * TRIALS):
        value, size = rng.lognormal(-0.245, 0.7, 36), np.ceil(rng.lognormal(5, 0.7, 36))
        ends = interval(np.divide, value * size, size, sizes=size, positive=True)
        if ends is not None:
            given += 1
            inside += ends[0] <= 1 <= ends[1]
    assert 0.89 <= inside / given <= 0.95


def test_tokens_of_a_document_are_not_taken_for_independent() -> None:
    """The guarantee switched off: a piece for each token covers a third of the time."""
    rng, inside = np.random.default_rng(0), 0
    for _ in range(300):
        tokens = (rng.normal(1, 0.3, 24)[:, None] + rng.normal(0, 0.3, (24, 50))).ravel()
        low, high = of_mean(tokens) or (0, 0)
        inside += low <= 1 <= high
    assert inside / 300 < 0.6


def test_of_a_mean_it_is_student_s() -> None:
    values = np.random.default_rng(0).normal(3, 2, 30)
    half = student.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    assert of_mean(values) == pytest.approx([values.mean() - half, values.mean() + half])
    assert of_mean(values[: LEAST - 1]) is None
    of_sums = interval(lambda z, n: (z / n[:, None]).sum(1), np.stack([values, values], 1), np.ones(30))
    assert of_sums == pytest.approx([2 * values.mean() - 2 * half, 2 * values.mean() + 2 * half])


def test_few_large_documents_are_few() -> None:
    sizes = np.array([1000.0] * 10 + [1.0] * 90)
    assert effective(sizes) < 11 and effective(np.ones(100)) == pytest.approx(100)
    assert interval(np.divide, sizes, sizes, sizes=sizes) is None


def test_a_share_is_given_where_there_is_something_to_share() -> None:
    rng, ones = np.random.default_rng(0), np.ones(50)
    whole = rng.normal(1, 1, 50)
    value, ends = share(0.7 * whole, whole, ones)
    assert value == pytest.approx(0.7) and ends == pytest.approx([0.7, 0.7])
    assert share(0.7 * whole, whole - whole.mean(), ones) == (None, None)
    assert share(whole, -whole, ones) == (None, None)
    few = share(whole[:5], whole[:5] + 1, ones[:5])
    assert few[0] is not None and few[1] is None
