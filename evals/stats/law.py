"""How a coder's error depends on k, width and training tokens: laws fitted to the runs of a sweep, and what they
predict of other runs.

A law says that the error L is a sum of powers. The joint form is that of Gao et al. (arXiv 2406.04093) in k and width
n, with one more term for training that ended after T tokens:

    L = exp(a + b_k ln k + b_n ln n + g ln k ln n) + exp(z + h ln k) + exp(d - t ln T)

Which law holds is not known beforehand. So each is tried where it counts, outside of what it was fitted to: on the
widest and the longest runs, fitted without them. The one that is then off by least is used.

Legend: R runs, P parameters of a law.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import least_squares
from scipy.stats import t as student

LEAST = 20
"""Runs below which no law is fitted."""
ALIKE = ("model", "hookpoint", "kind", "activation", "side")
"""What runs of one law have in common."""


class TooFewError(ValueError):
    """Runs that no law can be fitted to."""


class Size(NamedTuple):
    """What a law reads of a run."""

    k: float
    width: float
    tokens: float


LAWS: dict[str, tuple[tuple[str, ...], ...]] = {
    "joint": (("1", "k", "width", "k width"), ("1", "k"), ("1", "tokens")),
    "no floor": (("1", "k", "width", "k width"), ("1", "tokens")),
    "one power": (("1", "k", "width", "k width", "tokens"),),
}
"""By name, the features in the exponent of each term; "k" stands for ln k, "k width" for ln k ln n."""

_SLOPES = {"1": 0.0, "k": -0.3, "width": -0.1, "k width": 0.0, "tokens": -0.5}
_WEAK = 3e-3
"""Weight of a pull towards these slopes, in units of ln L: nothing beside what runs tell, but it settles what they
leave open."""


class Prediction(NamedTuple):
    """An error that is expected of a run, and its 95 % interval."""

    value: float
    low: float
    high: float
    beyond: dict[str, float]
    """For each quantity outside of the runs that the law was fitted to, how many times it is beyond them."""


@dataclass
class Law:
    """A law that was fitted to runs."""

    name: str
    sizes: list[Size]
    loss_R: np.ndarray
    off: dict[str, float]
    """For each law, by how much it was off on runs that were left out (root mean square of ln L)."""

    def __post_init__(self) -> None:
        self._fit = _Fit(LAWS[self.name], self.sizes, self.loss_R)

    def __call__(self, size: Size) -> float:
        """The error of a run of this size."""
        return self._fit(size)

    @cached_property
    def _without(self) -> list[list["_Fit"]]:
        """Fits to fewer runs. Leaving out single runs says what noise does; leaving out all of one k, width or length,
        what the form does."""
        return [
            [_Fit(LAWS[self.name], *_kept(self.sizes, self.loss_R, keep), like=self._fit) for keep in parts]
            for parts in _partitions(self.sizes)
        ]

    @property
    def formula(self) -> str:
        """The law with its numbers."""
        return self._fit.formula()

    def predict(self, size: Size) -> Prediction:
        """The error of a run of this size. Its interval is Student's, over runs that were left out: singly, and all of
        one k, width or number of tokens, whichever is wider; a new run is off by as much as left-out runs were."""
        of = self(size)
        spreads = [np.array([np.log(fit(size)) for fit in fits]) for fits in self._without]
        variance = max((len(s) - 1) / len(s) * float(np.square(s - s.mean()).sum()) for s in spreads)
        free = max(1, len(self.sizes) - self._fit.parameters)
        half = float(student.ppf(0.975, free) * (variance + self.off[self.name] ** 2) ** 0.5)
        return Prediction(of, of * math.exp(-half), of * math.exp(half), self.beyond(size))

    def beyond(self, size: Size) -> dict[str, float]:
        """For each quantity outside of the runs, how many times it is above the largest or below the least."""
        found = {}
        for name, of, seen in zip(Size._fields, size, zip(*self.sizes, strict=True), strict=True):
            factor = max(of / max(seen), min(seen) / of)
            if factor > 1:
                found[name] = factor
        return found


def fitted(sizes: Sequence[Size], losses: Sequence[float]) -> Law:
    """The law that is off by least on left-out runs. TooFewError with fewer than LEAST runs, or than
    three values of k or width."""
    sizes, loss_R = list(sizes), np.asarray(losses, np.float64)
    if len(sizes) < LEAST:
        raise TooFewError(f"{len(sizes)} runs are too few for a law of k, width and tokens; it takes {LEAST}")
    for name in ("k", "width"):
        if len({getattr(size, name) for size in sizes}) < 3:
            raise TooFewError(f"a law takes three values of {name} or more")
    off = {name: _off(terms, sizes, loss_R) for name, terms in LAWS.items()}
    return Law(min(off, key=lambda name: off[name]), sizes, loss_R, off)


def groups(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, ...], list[Mapping[str, Any]]]:
    """Rows of a table that one law may hold for, by what they have in common (ALIKE)."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        if row.get("train_tokens"):
            found.setdefault(tuple(str(row.get(key)) for key in ALIKE), []).append(row)
    return found


def law_of(rows: Sequence[Mapping[str, Any]], metric: str) -> Law:
    """The law of a metric in rows of a table. TooFewError also where some rows lack it, or have it at 0 or below."""
    losses = [float(row[metric]) for row in rows if row.get(metric) is not None]
    if len(losses) < len(rows):
        raise TooFewError(f"{len(rows) - len(losses)} of {len(rows)} runs have no {metric}")
    if min(losses) <= 0:
        raise TooFewError(f"{metric} is not above 0 in all runs, so it has no logarithm to fit")
    return fitted([size_of(row) for row in rows], losses)


def size_of(row: Mapping[str, Any]) -> Size:
    """k, width and training tokens of a row of a table."""
    return Size(row["k"], row["width"], row["train_tokens"])


def _off(terms: tuple[tuple[str, ...], ...], sizes: list[Size], loss_R: np.ndarray) -> float:
    errors = []
    for keep in _frontiers(sizes):
        fit = _Fit(terms, *_kept(sizes, loss_R, keep))
        errors += [np.log(fit(sizes[i]) / loss_R[i]) for i in np.flatnonzero(~keep)]
    return float(np.sqrt(np.mean(np.square(errors))))


def _frontiers(sizes: list[Size]) -> Iterator[np.ndarray]:
    """bool [R], True: keep. Left out are the widest runs, and the longest."""
    for name in ("width", "tokens"):
        values = np.array([getattr(size, name) for size in sizes])
        if len(set(values)) > 2:
            yield values < values.max()


def _partitions(sizes: list[Size]) -> Iterator[list[np.ndarray]]:
    yield [np.arange(len(sizes)) != i for i in range(len(sizes))]
    for name in Size._fields:
        values = np.array([getattr(size, name) for size in sizes])
        if len(set(values)) > 2:
            yield [values != value for value in sorted(set(values))]


def _kept(sizes: list[Size], loss_R: np.ndarray, keep_R: np.ndarray) -> tuple[list[Size], np.ndarray]:
    return [size for size, keep in zip(sizes, keep_R, strict=True) if keep], loss_R[keep_R]


class _Fit:
    """Least squares of ln L. Features are centred on the runs, so that parameters hardly depend on each other."""

    def __init__(
        self, terms: tuple[tuple[str, ...], ...], sizes: list[Size], loss_R: np.ndarray, like: "_Fit | None" = None
    ) -> None:
        ln_R3 = np.log(np.array(sizes, np.float64))
        self.centre: np.ndarray = ln_R3.mean(0) if like is None else like.centre
        if len({size.tokens for size in sizes}) == 1:  # nothing can be told of tokens
            terms = tuple(
                tuple(f for f in term if f != "tokens") for term in terms if "tokens" not in term or len(terms) == 1
            )
        self.terms: tuple[tuple[str, ...], ...] = like.terms if like else terms
        self.parameters = sum(map(len, self.terms))
        X_RP, ln_loss_R = self._features(ln_R3), np.log(loss_R)
        slopes = np.array([_SLOPES[f] for term in self.terms for f in term])
        free = np.array([f != "1" for term in self.terms for f in term])

        def residuals(theta: np.ndarray) -> np.ndarray:
            ln = np.log(self._shares(theta, X_RP).sum(1))
            return np.concatenate([ln - ln_loss_R, _WEAK * (theta - slopes)[free]])

        def jacobian(theta: np.ndarray) -> np.ndarray:
            shares = self._shares(theta, X_RP)
            of = np.repeat(shares / shares.sum(1, keepdims=True), list(map(len, self.terms)), axis=1)
            return np.concatenate([of * X_RP, _WEAK * np.eye(self.parameters)[free]])

        starts = [like.theta] if like else list(self._starts(float(ln_loss_R.mean()), slopes))
        found: list[Any] = [least_squares(residuals, start, jacobian, method="lm") for start in starts]
        self.theta: np.ndarray = min(found, key=lambda one: one.cost).x

    def __call__(self, size: Size) -> float:
        """The error of a run."""
        return float(self._shares(self.theta, self._features(np.log([size]))).sum())

    def formula(self) -> str:
        """The law, with features that are not centred."""
        parts, place = [], 0
        for term in self.terms:
            theta = dict(zip(term, self.theta[place : place + len(term)], strict=True))
            place += len(term)
            k, width, tokens = self.centre
            both = theta.get("k width", 0.0)
            plain = {
                "k": theta.get("k", 0.0) - both * width,
                "width": theta.get("width", 0.0) - both * k,
                "tokens": theta.get("tokens", 0.0),
            }
            constant = (
                theta["1"] - plain["k"] * k - plain["width"] * width - plain["tokens"] * tokens - both * k * width
            )
            written = [f"{constant:.3g}"] + [
                f"{value:+.3g} {name}"
                for name, value in {
                    "ln k": plain["k"], "ln n": plain["width"], "ln k ln n": both, "ln T": plain["tokens"],
                }.items()
                if value
            ]  # fmt: skip
            parts.append(f"exp({' '.join(written)})")
        return "L = " + " + ".join(parts)

    def _features(self, ln_R3: np.ndarray) -> np.ndarray:
        k, width, tokens = (ln_R3 - self.centre).T
        columns = {"1": np.ones_like(k), "k": k, "width": width, "k width": k * width, "tokens": tokens}
        return np.stack([columns[f] for term in self.terms for f in term], 1)

    def _shares(self, theta: np.ndarray, X_RP: np.ndarray) -> np.ndarray:
        """The terms [R, terms]; exponents are kept where numbers are finite."""
        edges = np.cumsum([0, *map(len, self.terms)])
        exponents = [X_RP[:, a:b] @ theta[a:b] for a, b in pairwise(edges)]
        shares: np.ndarray = np.exp(np.clip(np.stack(exponents, 1), -60, 60))
        return shares

    def _starts(self, ln_loss: float, slopes: np.ndarray) -> Iterator[np.ndarray]:
        """Each term in turn makes up most of the error; or all the same share."""
        first = [term.index("1") + sum(map(len, self.terms[:i])) for i, term in enumerate(self.terms)]
        for most in range(-1, len(self.terms)):
            shares = np.full(len(self.terms), 1.0)
            if most >= 0:
                shares[most] = 8.0
            start = slopes.copy()
            start[first] = ln_loss + np.log(shares / shares.sum())
            yield start
