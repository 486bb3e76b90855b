"""Windows of text for explaining and scoring a latent.

A token row is cut into windows of `window` tokens. A latent's positive windows are those in which it fires; some teach
the explainer (`train`), others test the explanation (`test`); no window is in both, and no two have the same tokens.
Negatives are windows in which it never fires. Each latent has its own random seed, so its windows do not depend on
which other latents are asked for. Legend: W windows, T tokens of a window.
"""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from sklearn.feature_extraction.text import TfidfTransformer

from skipcoder.evals.config import ExamplesConfig, Negatives
from skipcoder.evals.latents.index import Firing, LatentIndex


class Window(NamedTuple):
    """One window of text."""

    number: int
    """Index of the window in the store."""
    tokens: np.ndarray
    """int [T]."""
    activations: np.ndarray
    """float32 [T]; zeros in a negative."""
    kind: str
    """How it was drawn: `top` or `quantile` for positives, `random`, ... for negatives."""


@dataclass
class Examples:
    """The examples of one latent."""

    latent: int
    firing: int
    """Tokens on which it fires."""
    largest: float = 0.0
    train: list[Window] = field(default_factory=list)
    test: list[Window] = field(default_factory=list)
    negative: list[Window] = field(default_factory=list)
    problem: str | None = None
    """Why there are no examples."""


class ExampleMaker:
    """Makes examples, one latent at a time, from an index and the store's text."""

    def __init__(self, index: LatentIndex, cfg: ExamplesConfig) -> None:
        self.index, self.cfg, self.context = index, cfg, index.store.context
        self.size = min(cfg.window, self.context)
        self.each_row = self.context // self.size
        rows = index.tokens
        self.tokens_WT = rows[:, : self.each_row * self.size].reshape(-1, self.size)
        self._neighbours: dict[int, list[int]] = {}

    def prepare(self, latents: np.ndarray) -> None:
        """Find the neighbours of all these latents, if cofiring negatives need them."""
        if self.cfg.negatives is not Negatives.cofiring:
            return
        for some in (latents[i : i + 256] for i in range(0, len(latents), 256)):
            overlap = self.index.overlap(some)
            overlap[np.arange(len(some)), some] = 0
            for latent, scores in zip(some, overlap, strict=True):
                best = np.argsort(-scores, kind="stable")[: self.cfg.neighbours]
                self._neighbours[int(latent)] = [int(i) for i in best if scores[i] > 0]

    def of(self, latent: int) -> Examples:
        """The latent's examples, or the reason why it has none."""
        firing = self.index.of(latent)
        found = Examples(latent, len(firing.position), float(firing.value.max(initial=0)))
        windows, largest = self._windows(firing)
        wanted = self.cfg.train + self.cfg.test
        if len(windows) < wanted:
            found.problem = f"fires in {len(windows)} different windows; {wanted} are needed"
            return found
        rng = _rng(self.index.run.summary["hookpoint"], latent)
        order = np.argsort(-largest, kind="stable")
        train, kinds = self._train(order, rng)
        rest = np.setdiff1d(order, train, assume_unique=True)
        rest = rest[np.argsort(-largest[rest], kind="stable")]
        test = _quantiles(rest, self.cfg.test, self.cfg.quantiles, rng)
        assert not set(windows[train]) & set(windows[test])
        values = _values(firing, windows, self.size, self.context)
        found.train = [self._window(windows[i], values[i], kind) for i, kind in zip(train, kinds, strict=True)]
        found.test = [self._window(windows[i], values[i], "quantile") for i in test]
        found.negative = self._negatives(latent, firing, windows[train], windows[test], rng)
        return found

    def shown(self, latent: int, firing: Firing, top: int, parts: int) -> tuple[list[Window], list[Window]]:
        """Windows for people to look at: the `top` ones by activation, and one from each of `parts` equal parts of all
        windows sorted by activation, largest first."""
        windows, largest = self._windows(firing)
        order = np.argsort(-largest, kind="stable")
        rng = _rng(self.index.run.summary["hookpoint"], latent)
        spread = _quantiles(order, min(parts, len(order)), parts, rng)
        chosen = np.concatenate([order[:top], spread])
        values = _values(firing, windows[chosen], self.size, self.context)
        kinds = ["top"] * len(order[:top]) + ["quantile"] * len(spread)
        found = [self._window(w, v, kind) for w, v, kind in zip(windows[chosen], values, kinds, strict=True)]
        return found[: len(order[:top])], found[len(order[:top]) :]

    def _windows(self, firing: Firing) -> tuple[np.ndarray, np.ndarray]:
        """(windows in which it fires, without repeated texts; the largest activation in each)."""
        window, inside = self._window_of(firing.position)
        windows, start = np.unique(window[inside], return_index=True)
        if not len(windows):
            return windows, np.zeros(0, np.float32)
        largest = np.maximum.reduceat(firing.value[inside], start)
        first = np.unique(self.tokens_WT[windows], axis=0, return_index=True)[1]
        first.sort()
        return windows[first], largest[first]

    def _window_of(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(window of each position, whether it lies in one: a row's last tokens may not)."""
        row, at = position // self.context, position % self.context
        return row * self.each_row + at // self.size, at < self.each_row * self.size

    def _train(self, order: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        count = self.cfg.train
        top = order[: int(count * self.cfg.top_share)]
        rest = _quantiles(order[len(top) :], count - len(top), self.cfg.quantiles, rng)
        return np.concatenate([top, rest]), ["top"] * len(top) + ["quantile"] * len(rest)

    def _negatives(
        self, latent: int, firing: Firing, shown: np.ndarray, test: np.ndarray, rng: np.random.Generator
    ) -> list[Window]:
        window, inside = self._window_of(firing.position)
        silent = np.ones(len(self.tokens_WT), dtype=bool)
        silent[np.unique(window[inside])] = False
        count, kind = self.cfg.test, self.cfg.negatives
        chosen: list[int] = []
        if kind is Negatives.cofiring:
            for other in self._neighbours[latent]:
                theirs, within = self._window_of(self.index.of(other).position)
                theirs = np.unique(theirs[within])
                theirs = rng.permutation(np.setdiff1d(theirs[silent[theirs]], chosen))
                chosen += theirs[: -(-count // self.cfg.neighbours)].tolist()
        elif kind is Negatives.similar:
            chosen = self._similar(shown, rng.permutation(np.flatnonzero(silent))[: self.cfg.pool])
        drawn = [kind.value] * len(chosen)
        pool = rng.permutation(np.flatnonzero(silent))[: 4 * count]  # random ones make up a shortfall
        others = [int(w) for w in pool if w not in set(chosen)]
        seen = {self.tokens_WT[w].tobytes() for w in [*shown, *test]}  # a latent may fire on only one copy of a text
        found: list[Window] = []
        for w, how in zip([*chosen, *others], [*drawn, *["random"] * len(others)], strict=True):
            text = self.tokens_WT[w].tobytes()
            if text not in seen and len(found) < count:
                seen.add(text)
                found.append(self._window(w, np.zeros(self.size, np.float32), how))
        return found

    def _similar(self, shown: np.ndarray, pool: np.ndarray) -> list[int]:
        """Windows of the pool whose words are most like those of the positives (TF-IDF)."""
        import scipy.sparse

        both = np.concatenate([shown, pool])
        rows = np.repeat(np.arange(len(both)), self.size)
        counts = scipy.sparse.coo_array((np.ones(len(rows)), (rows, self.tokens_WT[both].ravel()))).tocsr()
        features = TfidfTransformer().fit_transform(counts)
        like = features[len(shown) :] @ np.asarray(features[: len(shown)].mean(0)).ravel()
        return [int(pool[i]) for i in np.argsort(-like, kind="stable")[: self.cfg.test]]

    def _window(self, number: int, values: np.ndarray, kind: str) -> Window:
        return Window(int(number), self.tokens_WT[number], values, kind)


def _rng(hookpoint: str, latent: int) -> np.random.Generator:
    digest = hashlib.sha256(f"{hookpoint} {latent}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


def _quantiles(order: np.ndarray, count: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `count` of `order`, as evenly as possible from `parts` equal parts of it, none twice."""
    pieces = [rng.permutation(piece) for piece in np.array_split(order, parts)]
    longest = max((len(piece) for piece in pieces), default=0)
    turns = [piece[i] for i in range(longest) for piece in pieces if i < len(piece)]
    return np.array(turns[:count], dtype=np.int64)


def _values(firing: Firing, windows: np.ndarray, size: int, context: int) -> np.ndarray:
    """float32 [W, T]: activations in the windows."""
    each_row = context // size
    row, part = windows // each_row, windows % each_row
    start = row * context + part * size
    values = np.zeros((len(windows), size), np.float32)
    for i, first in enumerate(start):
        a, b = np.searchsorted(firing.position, [first, first + size])
        values[i, firing.position[a:b] - first] = firing.value[a:b]
    return values
