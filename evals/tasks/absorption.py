"""Feature absorption and splitting on the first-letter task (arXiv 2409.14507, in SAEBench's form, arXiv 2503.09532).

A latent that ought to say "begins with L" is silent on some words that do, because a latent for the word has absorbed
the direction. Everything is measured where the coder writes: probes of the letters are fitted to y at the word's
token, and latent i contributes p_i = f_i (W_dec_i . d) to the projection of y_hat on the probe's direction d, whatever
the norm of W_dec_i. For an SAE of a residual stream this is SAEBench's own space; an MLP's output is another, so
numbers of the two are not comparable.

Words are split in two: probes and split latents come from the first half, reported numbers from the second.
Legend: W words, E width of y, M latents, A alphabet.
"""

from typing import NamedTuple

import numpy as np
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import cross_val_predict

from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import interval

LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPLIT_GAIN = 0.03
"""Least gain in the F1 of a letter's probe by which a further latent counts as one that the letter is split into."""
MOST_SPLIT = 10
COSINE_FULL, SHARE = 0.025, 0.4
"""Full absorption: least cosine of the absorbing latent with d, and least share of the projection."""
COSINE_PARTIAL, ABSORBERS = 0.1, 3
"""Absorption fraction: least cosine of an absorbing latent, and how many of them count."""
PROBE_F1 = 0.6
PROBE_C = 0.1
"""The best of 0.001, 0.01, 0.1 and 1 for MLP inputs and outputs of SmolLM2, by F1 on other words."""
SILENT = 1e-8
L1 = 0.01
"""L1 penalty of the probes that propose latents for a letter, per mean loss."""


class Probes(NamedTuple):
    """One linear probe per letter, fitted to y at the word's token."""

    letters: list[str]
    """Letters with an F1 above PROBE_F1 on the second half."""
    directions_AE: np.ndarray
    """Directions of unit length."""
    score_WA: np.ndarray
    """Decision values on the second half; positive means the letter."""
    f1: dict[str, float]
    """F1 of every letter that both halves hold."""


class Spelling(NamedTuple):
    """The data that absorption is measured on, for words of the second half."""

    codes_WM: scipy.sparse.csr_array
    y_WE: np.ndarray
    letter_W: np.ndarray
    """Index into LETTERS."""


def fit_probes(
    y_train_WE: np.ndarray, letter_train_W: np.ndarray, y_test_WE: np.ndarray, letter_test_W: np.ndarray
) -> Probes:
    """Fit a probe for every letter with ten words or more."""
    mean_E = y_train_WE.mean(0)
    scale = np.sqrt((y_train_WE - mean_E).var())
    letters, directions, scores, f1 = [], [], [], {}
    for place, letter in enumerate(LETTERS):
        is_it, will_be = letter_train_W == place, letter_test_W == place
        if is_it.sum() < 10 or not will_be.any():
            continue
        probe = LogisticRegression(C=PROBE_C, class_weight="balanced", max_iter=300)
        probe.fit((y_train_WE - mean_E) / scale, is_it)
        score = probe.decision_function((y_test_WE - mean_E) / scale)
        f1[letter] = float(f1_score(will_be, score > 0))
        if f1[letter] > PROBE_F1:
            letters.append(letter)
            directions.append(probe.coef_[0] / np.linalg.norm(probe.coef_[0]))
            scores.append(score)
    return Probes(letters, np.array(directions), np.array(scores).T, f1)


def split_latents(codes_WM: scipy.sparse.csr_array, is_letter_W: np.ndarray) -> tuple[list[int], list[float]]:
    """The latents that a letter is split into: those with the largest positive weights in an L1 probe, taken one by one
    while each adds SPLIT_GAIN to the cross-validated F1; and the F1 with 1, 2, ... of them. Both are empty if no latent
    has a positive weight."""
    # The same coder with smaller codes and a larger decoder must give the same result.
    codes_WM = codes_WM / np.sqrt(np.square(codes_WM.data).mean()) if codes_WM.nnz else codes_WM
    fires = np.flatnonzero(np.diff(codes_WM.tocsc().indptr) >= 5).astype(np.int32)
    if not len(fires):
        return [], []
    probe = LogisticRegression(
        C=1 / (L1 * len(is_letter_W)), l1_ratio=1.0, solver="liblinear", class_weight="balanced", random_state=0
    ).fit(codes_WM[:, fires], is_letter_W)
    weights = probe.coef_[0]
    order = [int(fires[i]) for i in np.argsort(-weights, kind="stable")[:MOST_SPLIT] if weights[i] > 0]
    found: list[int] = []
    f1: list[float] = []
    for k in range(1, len(order) + 1):
        columns = codes_WM[:, order[:k]].toarray()
        said = cross_val_predict(LogisticRegression(class_weight="balanced", max_iter=300), columns, is_letter_W, cv=5)
        f1.append(float(f1_score(is_letter_W, said)))
        if found and f1[-1] <= f1[-2] + SPLIT_GAIN:
            break
        found = order[:k]
    return found, f1


def absorption(
    probes: Probes,
    spelling: Spelling,
    W_dec_ME: np.ndarray,
    split: dict[str, list[int]],
    skip_WE: np.ndarray | None = None,
) -> Result:
    """For words whose letter its probe recognises: the share with the letter fully absorbed, and the mean absorbed
    fraction (means over letters); the number of latents that a letter is split into; for a coder with a skip, how much
    of the projection of y comes through the skip."""
    full_WA, part_WA, true_WA, skip_A = [], [], [], []
    norms_M = np.linalg.norm(W_dec_ME, axis=1)
    letters = [letter for letter in probes.letters if split.get(letter)]
    for letter in letters:
        a = probes.letters.index(letter)
        d_E, S = probes.directions_AE[a], set(split[letter])
        along_M = W_dec_ME @ d_E
        cosine_M = np.divide(along_M, norms_M, out=np.zeros_like(along_M), where=norms_M > 0)
        true_W = (spelling.letter_W == LETTERS.index(letter)) & (probes.score_WA[:, a] > 0)
        projection_W = spelling.y_WE @ d_E
        full_W, part_W = np.zeros(len(true_W)), np.zeros(len(true_W))
        for w in np.flatnonzero(true_W):
            row = slice(spelling.codes_WM.indptr[w], spelling.codes_WM.indptr[w + 1])
            latents, values = spelling.codes_WM.indices[row], spelling.codes_WM.data[row]
            ours = np.array([i in S for i in latents], dtype=bool)
            p = values * along_M[latents]
            full_W[w] = _full(p, cosine_M[latents], values, ours, projection_W[w])
            part_W[w] = _fraction(p, cosine_M[latents], ours, projection_W[w])
        full_WA.append(full_W)
        part_WA.append(part_W)
        true_WA.append(true_W.astype(float))
        if skip_WE is not None and true_W.any():
            skip_A.append((skip_WE[true_W] @ d_E).mean() / projection_W[true_W].mean())
    result: Result = {
        "absorption_space": "write",
        "absorption_words": len(spelling.letter_W),
        "absorption_letters": len(letters),
        "absorption_unsplit_letters": len(probes.letters) - len(letters),
        "absorption_probe_f1": float(np.mean(list(probes.f1.values()))) if probes.f1 else None,
    }
    if not letters or not np.any(true_WA):
        return result | {"absorption_full": None, "absorption_fraction": None, "split_latents": None}
    true = np.array(true_WA).T
    for name, per in (("full", full_WA), ("fraction", part_WA)):
        absorbed = np.array(per).T
        seen = true.sum(0) > 0
        result[f"absorption_{name}"] = float((absorbed.sum(0)[seen] / true.sum(0)[seen]).mean())
        result[f"absorption_{name}_ci"] = interval(_mean_of_letters, absorbed, true)
    result["split_latents"] = float(np.mean([len(split[letter]) for letter in letters]))
    if skip_A:
        result["absorption_skip_share"] = float(np.mean(skip_A))
    result["absorption_details"] = [
        {
            "letter": letter,
            "probe_f1": probes.f1[letter],
            "words": int(true[:, i].sum()),
            "full": float(full_WA[i].sum() / max(true[:, i].sum(), 1)),
            "fraction": float(part_WA[i].sum() / max(true[:, i].sum(), 1)),
            "split": split[letter],
        }
        for i, letter in enumerate(letters)
    ]
    return result


def _full(p: np.ndarray, cosine: np.ndarray, values: np.ndarray, ours: np.ndarray, projection: float) -> bool:
    """Whether the letter's latents are silent and another carries the projection."""
    if projection <= 0 or not len(p) or (np.abs(values[ours]) > SILENT).any():
        return False
    top = int(np.argmax(p))
    return bool(cosine[top] >= COSINE_FULL and p[top] / projection >= SHARE)


def _fraction(p: np.ndarray, cosine: np.ndarray, ours: np.ndarray, projection: float) -> float:
    """The absorbing latents' share of what they and the letter's latents carry."""
    others = np.sort(p[~ours & (cosine >= COSINE_PARTIAL) & (p > 0)])[-ABSORBERS:].sum()
    main = p[ours].sum()
    if projection <= 0 or main >= projection or others / projection < SHARE:
        return 0.0
    if main <= 0:
        return 1.0
    others = min(others, projection - main)
    return float(others / (others + main))


def _mean_of_letters(absorbed_SA: np.ndarray, true_SA: np.ndarray) -> np.ndarray:
    shares = np.divide(absorbed_SA, true_SA, out=np.full_like(true_SA, np.nan), where=true_SA > 0)
    result: np.ndarray = np.nanmean(shares, axis=1)
    return result
