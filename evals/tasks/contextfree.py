"""How far a latent's activation follows from the tokens at hand, without the rest of the context.

No judge is asked and nothing is said of meaning: a latent for one token may be as good as one for an idea. A table of
mean activations in training text (for each token; for the token before; for both; for these and the one before them)
predicts activations in test text, and R² says how well. A context that training showed too rarely is predicted by the
next shorter one. Beside each number stands what it is when tokens are shuffled.

Legend: N tokens, M latents, C contexts.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch

from skipcoder.evals.config import ContextFreeConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import of_mean
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run

SEEN = 4
"""Occurrences in training from which a context has a mean of its own."""
FIRING = 20
"""Occurrences in either text from which a latent is looked at."""
BATCH, AT_ONCE = 4096, 8
"""Tokens, and coders whose codes are in memory: 8 bytes for each active latent, in half a million tokens by default."""
BITS = 21
NONE = 2**BITS - 1
"""In place of a token; no vocabulary is as large."""
CONTEXTS = {
    "token": ("token",),
    "before": ("before",),
    "pair": ("pair", "token"),
    "triple": ("triple", "pair", "token"),
}
"""Predictor -> the contexts that it uses, the longest first."""


class Sample(NamedTuple):
    """Codes of some tokens of a split, and what stands at each."""

    codes_NM: scipy.sparse.csr_array
    contexts: dict[str, np.ndarray]
    """int64 [N] each: equal where the tokens are."""

    def shuffled(self) -> "Sample":
        """The same with the tokens of all positions exchanged."""
        order = np.random.default_rng(0).permutation(self.codes_NM.shape[0])
        return self._replace(contexts={name: of[order] for name, of in self.contexts.items()})


def contextfree(store: ActivationStore, hookpoint: str, runs: Sequence[Run], cfg: ContextFreeConfig) -> list[Result]:
    """Results of each of the runs, all of one hookpoint, whose coders are on their device."""
    results = []
    for some in (runs[i : i + AT_ONCE] for i in range(0, len(runs), AT_ONCE)):
        train, test = (_samples(store, hookpoint, some, split, cfg.tokens) for split in ("train", "test"))
        results += [_result(*both) for both in zip(train, test, strict=True)]
    return results


def _result(train: Sample, test: Sample) -> Result:
    often = [np.diff(sample.codes_NM.tocsc().indptr) >= FIRING for sample in (train, test)]
    kept = np.flatnonzero(often[0] & often[1])
    result: Result = {"contextfree_latents": len(kept)}
    train, test = (sample._replace(codes_NM=sample.codes_NM[:, kept]) for sample in (train, test))
    for suffix, predicted, learned in (("", test, train), ("_shuffled", test.shuffled(), train.shuffled())):
        found = {name: r_squared(train, predicted, levels) for name, levels in CONTEXTS.items()}
        found["entropy"] = entropy(learned)
        for name, of_M in found.items():
            result[f"contextfree_{name}{suffix}"] = float(of_M.mean()) if len(of_M) else None
            if not suffix:
                result[f"contextfree_{name}_ci"] = of_mean(of_M) if len(of_M) else None
    return result


def r_squared(train: Sample, test: Sample, levels: Sequence[str]) -> np.ndarray:
    """[M]: 1 - squared error / variance in `test` of what the means of `train` predict."""
    codes = test.codes_NM
    n, total_M, squares_M = codes.shape[0], _total(codes), _total(codes.multiply(codes))
    mean_M = _total(train.codes_NM) / train.codes_NM.shape[0]
    rest, dot_M, norm_M = np.ones(n, bool), np.zeros(len(mean_M)), np.zeros(len(mean_M))
    for level in levels:
        contexts, place, counts = np.unique(train.contexts[level], return_inverse=True, return_counts=True)
        at = np.searchsorted(contexts, test.contexts[level]).clip(max=len(contexts) - 1)
        known = rest & (contexts[at] == test.contexts[level]) & (counts[at] >= SEEN)
        mean_CM = _sums(place, train.codes_NM, len(contexts)).multiply(1 / counts[:, None]).tocsr()
        dot_M += _sums(at[known], codes[known], len(contexts)).multiply(mean_CM).sum(0)
        norm_M += mean_CM.multiply(mean_CM).T @ np.bincount(at[known], minlength=len(contexts))
        rest &= ~known
    dot_M += mean_M * _total(codes[rest])
    norm_M += mean_M**2 * rest.sum()
    found: np.ndarray = 1 - (squares_M - 2 * dot_M + norm_M) / (squares_M - total_M**2 / n)
    return found


def entropy(sample: Sample) -> np.ndarray:
    """[M], bits: of the tokens at which a latent fires, weighted by how far."""
    tokens, place = np.unique(sample.contexts["token"], return_inverse=True)
    share = abs(_sums(place, sample.codes_NM, len(tokens))).tocsc()
    share.eliminate_zeros()
    share.data /= np.repeat(share.sum(0), np.diff(share.indptr))
    share.data *= -np.log2(share.data)
    found: np.ndarray = share.sum(0)
    return found


def _total(codes_NM: scipy.sparse.csr_array) -> np.ndarray:
    """[M], in float64: of float32 codes."""
    total: np.ndarray = np.ones(codes_NM.shape[0]) @ codes_NM
    return total


def _sums(place_N: np.ndarray, codes_NM: scipy.sparse.csr_array, count: int) -> scipy.sparse.csr_array:
    """[C, M]: sums of codes over the tokens of each context."""
    n = len(place_N)
    one_hot = scipy.sparse.csr_array((np.ones(n), (place_N, np.arange(n))), shape=(count, n))
    return one_hot @ codes_NM


@torch.no_grad()
def _samples(store: ActivationStore, hookpoint: str, runs: Sequence[Run], split: str, tokens: int) -> list[Sample]:
    """A sample of about `tokens` tokens of a split for each run: the same for runs that leave out the same ones."""
    found: dict[int, Sample] = {}
    device = runs[0].coder.W_dec.device
    for kept in dict.fromkeys(run.filter for run in runs):
        mine = {i: run for i, run in enumerate(runs) if run.filter == kept}
        positions: list[np.ndarray] = []
        codes: dict[int, list[scipy.sparse.csr_array]] = {i: [] for i in mine}
        for batch in ActivationStream(store, hookpoint, BATCH, split=split, filter=kept, epochs=1, device=device):
            positions.append(batch.position.cpu().numpy())
            for i, run in mine.items():
                out = run.coder(batch.x if run.read_site.side == "input" else batch.y)
                codes[i].append(_sparse(out.values, out.indices, run.coder.cfg.width))
            if sum(map(len, positions)) >= tokens:
                break
        contexts = _contexts(store, np.concatenate(positions))
        found |= {i: Sample(scipy.sparse.vstack(of, format="csr"), contexts) for i, of in codes.items()}
    return [found[i] for i in range(len(runs))]


def _sparse(values_NK: torch.Tensor, indices_NK: torch.Tensor, width: int) -> scipy.sparse.csr_array:
    values, indices = values_NK.float().cpu().numpy(), indices_NK.int().cpu().numpy()
    row = np.arange(len(values), dtype=np.int32).repeat(values.shape[1])
    codes = scipy.sparse.csr_array((values.ravel(), (row, indices.ravel())), shape=(len(values), width))
    codes.eliminate_zeros()
    return codes


def _contexts(store: ActivationStore, position_N: np.ndarray) -> dict[str, np.ndarray]:
    """What stands at each stored position and before it in its row; before the row's beginning stands NONE."""
    unit_N = position_N // (store.unit_rows * store.context)
    inside_N = position_N % store.context
    found = np.full((3, len(position_N)), NONE, np.int64)
    for unit in np.unique(unit_N):
        here = np.flatnonzero(unit_N == unit)
        tokens = store.tokens(int(unit)).ravel()
        for back in range(3):
            there = here[inside_N[here] >= back]
            found[back, there] = tokens[position_N[there] - store.unit_range(int(unit))[0] - back]
    token, before, earlier = found
    pair = before << BITS | token
    return {"token": token, "before": before, "pair": pair, "triple": earlier << 2 * BITS | pair}
