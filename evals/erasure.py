"""Ablate the latents of a concept and see what linear probes lose (arXiv 2411.18895, in SAEBench's form).

Probes read the mean over a text's tokens of y, what leaves the MLP. Ablating latents takes their part away,
y - sum_i f_i W_dec_i (a skip and the reconstruction error stay), and is linear, so it acts on means as well.

TPP (targeted probe perturbation): ablating a class' latents should hurt that class' probe and no other.
SCR (spurious correlation removal): a probe taught where two attributes agree is cured by ablating the unwanted one.

Both are reported, not headlined: an audit (arXiv 2605.18229) found that TPP falls with training and that SCR at large N
ranks coders backwards. Legend: T texts, E width of y, M latents, C classes, N latents ablated.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from skipcoder.evals import labelled
from skipcoder.evals.bootstrap import interval, of_mean
from skipcoder.evals.config import ErasureConfig
from skipcoder.evals.probing import pooled
from skipcoder.evals.run import Run
from skipcoder.evals.texts import TextReader, pool_dense
from skipcoder.pipeline.errors import UserError
from sklearn.linear_model import LogisticRegression

LEAST = 1e-3
"""SCR is told only where the unwanted attribute costs the probe more than this."""


def tpp(reader: TextReader, runs: Sequence[Run], cfg: ErasureConfig) -> list[dict[str, Any]]:
    """Of each run, all of one hookpoint: `tpp_N` for each N and the classes it is a mean of."""
    data = labelled.find(cfg.tpp_data)
    data, rows = labelled.distinct(data, reader.tokens(data.texts, cfg.tokens))
    places = labelled.balanced(data.labels, cfg.texts, data.name)
    # Each class half and half, in turn.
    order = np.argsort(data.labels[places], kind="stable")
    places = np.concatenate([places[order[0::2]], places[order[1::2]]])
    labels, half = data.labels[places], len(places[order[0::2]])
    if np.bincount(labels[half:], minlength=len(data.classes)).min() < 8:
        raise UserError(f"tpp: {data.name} gives too few texts of a class; raise erasure.texts or take fewer classes")
    results = []
    for run, y_TE, f_TM in _read(reader, runs, [rows[i] for i in places]):
        effects, probes = [], []
        for c in range(len(data.classes)):
            probe = _probe(y_TE[:half], labels[:half] == c)
            probes.append(probe)
            more_M = _difference(f_TM[:half], labels[:half] == c).clip(min=0)
            effects.append(more_M * _along(run, probe))
        right_TC = _right(probes, y_TE[half:], labels[half:])
        result: dict[str, Any] = {"tpp_texts": len(places) - half, "tpp_classes": data.classes}
        for n in _counts(cfg.ablate, run):
            per_text = np.zeros(len(places) - half)
            for c, effect_M in enumerate(effects):
                lost_TC = right_TC - _right(probes, _ablated(y_TE[half:], f_TM[half:], effect_M, n, run), labels[half:])
                others = [j for j in range(len(probes)) if j != c]
                per_text += (lost_TC[:, c] - lost_TC[:, others].mean(1)) / len(probes)
            result[f"tpp_{n}"] = float(per_text.mean())
            result[f"tpp_{n}_ci"] = of_mean(per_text)
        results.append(result)
    return results


def scr(reader: TextReader, runs: Sequence[Run], cfg: ErasureConfig) -> list[dict[str, Any]]:
    """Of each run: `scr_N` for each N, of the attribute that the other spoils more; null where neither does."""
    texts, attributes_T2 = two_attributes(cfg)
    cells = labelled.Labelled("scr", texts, attributes_T2 @ [2, 1], ["0", "1", "2", "3"])
    cells, rows = labelled.distinct(cells, reader.tokens(cells.texts, cfg.tokens))
    test, balanced, biased = _scr_split(cells.labels, cfg.texts)
    read = np.unique(np.concatenate([test, balanced, biased]))
    attributes_T2 = np.stack([cells.labels[read] // 2, cells.labels[read] % 2], 1)
    test, balanced, biased = (np.searchsorted(read, places) for places in (test, balanced, biased))
    results = []
    for run, y_TE, f_TM in _read(reader, runs, [rows[i] for i in read]):
        found = []
        for wanted, spurious in ((0, 1), (1, 0)):
            label = attributes_T2[:, wanted]
            spoilt, oracle = _probe(y_TE[biased], label[biased]), _probe(y_TE[balanced], label[balanced])
            unwanted = _probe(y_TE[balanced], attributes_T2[balanced, spurious])
            more_M = _difference(f_TM[balanced], attributes_T2[balanced, spurious] == 1)
            effect_M = np.abs(more_M * _along(run, unwanted))
            before = spoilt.predict(y_TE[test]) == label[test]
            best = oracle.predict(y_TE[test]) == label[test]
            after = {
                n: spoilt.predict(_ablated(y_TE[test], f_TM[test], effect_M, n, run)) == label[test]
                for n in _counts(cfg.ablate, run)
            }
            found.append((before, best, after))
        before, best, after = min(found, key=lambda item: item[0].mean())
        result: dict[str, Any] = {
            "scr_texts": len(test),
            "scr_accuracy_biased": float(before.mean()), "scr_accuracy_oracle": float(best.mean()),
        }  # fmt: skip
        for n, right in after.items():
            room = best.mean() - before.mean()
            result[f"scr_{n}"] = float((right.mean() - before.mean()) / room) if room > LEAST else None
            result[f"scr_{n}_ci"] = interval(_share_regained, *(a.astype(float) for a in (right, before, best)))
        results.append(result)
    return results


def two_attributes(cfg: ErasureConfig) -> tuple[list[str], np.ndarray]:
    """Texts and two attributes 0/1 of each [T, 2]: of a CSV, or the historical figures that two data sets of sae-probes
    both hold: politician or not, male or not."""
    if cfg.scr_csv is not None:
        path = Path(cfg.scr_csv)
        one, two = labelled.load(path, target="target"), labelled.load(path, target="spurious")
        if len(one.classes) != 2 or len(two.classes) != 2:
            raise UserError(f"{path}: columns 'target' and 'spurious' must hold two values each")
        return one.texts, np.stack([one.labels, two.labels], 1)
    one, two = labelled.find("7_hist_fig_ispolitician"), labelled.find("5_hist_fig_ismale")
    other = dict(zip(two.texts, two.labels, strict=True))
    both = {text: (label, other[text]) for text, label in zip(one.texts, one.labels, strict=True) if text in other}
    return list(both), np.array(list(both.values()))


def _scr_split(cells: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the test texts (all four cells alike), and of two training sets, one balanced, one biased: only where
    the attributes agree. They may overlap each other, not the test texts."""
    places = labelled.balanced(cells, count, "scr")
    groups = [places[cells[places] == cell] for cell in range(4)]
    each = min(map(len, groups)) // 2
    if each < 8:
        raise UserError("scr: each of the four combinations of the attributes needs 16 texts or more")
    test = np.concatenate([group[:each] for group in groups])
    balanced = np.concatenate([group[each : 2 * each] for group in groups])
    used = set(test.tolist())
    agree = np.array([place for place in np.flatnonzero((cells == 0) | (cells == 3)) if place not in used])
    return test, balanced, agree[labelled.balanced(cells[agree], count, "scr biased")]


def _read(reader: TextReader, runs: Sequence[Run], rows: list[list[int]]) -> Any:
    batches = list(reader.read(rows))
    y = {side: pool_dense(batches, side, len(rows)) for side in ("input", "output")}
    for run in runs:
        yield run, y[run.site("write").side], pooled(run.coder, batches, run.site("read").side, len(rows))


def _probe(y_TE: np.ndarray, is_it_T: np.ndarray) -> LogisticRegression:
    """Of the scaled but not standardised y: its weights are a direction in y's own space."""
    scale = np.sqrt((y_TE - y_TE.mean(0)).var())
    probe = LogisticRegression(class_weight="balanced", max_iter=1000).fit(y_TE / scale, is_it_T)
    probe.coef_ = probe.coef_ / scale
    return probe


def _along(run: Run, probe: LogisticRegression) -> np.ndarray:
    """[M]: each decoder row along the probe's direction."""
    W_dec_ME = run.coder.W_dec.detach()
    return (W_dec_ME @ torch.from_numpy(probe.coef_[0]).to(W_dec_ME)).double().cpu().numpy()


def _difference(f_TM: scipy.sparse.csr_array, is_it_T: np.ndarray) -> np.ndarray:
    """[M]: how much more each latent fires on texts of the class than on others."""
    return (np.asarray(f_TM[is_it_T].mean(0)) - np.asarray(f_TM[~is_it_T].mean(0))).ravel()


def _ablated(y_TE: np.ndarray, f_TM: scipy.sparse.csr_array, effect_M: np.ndarray, n: int, run: Run) -> np.ndarray:
    chosen = np.argsort(-effect_M, kind="stable")[:n]
    chosen = chosen[effect_M[chosen] > 0]
    if not len(chosen):
        return y_TE
    return y_TE - f_TM[:, chosen] @ run.coder.W_dec.detach()[torch.from_numpy(chosen)].double().cpu().numpy()


def _right(probes: Sequence[LogisticRegression], y_TE: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float [T, C]: whether each class' probe is right about each text, weighted so that its mean is the balanced
    accuracy."""
    columns = []
    for c, probe in enumerate(probes):
        is_it = labels == c
        weight = np.where(is_it, 0.5 / is_it.mean(), 0.5 / (~is_it).mean())
        columns.append((probe.predict(y_TE) == is_it) * weight)
    return np.stack(columns, 1)


def _counts(ablate: Sequence[int], run: Run) -> list[int]:
    return [n for n in ablate if n < run.coder.cfg.width]


def _share_regained(right: np.ndarray, before: np.ndarray, best: np.ndarray) -> np.ndarray:
    room = best - before
    return np.divide(right - before, room, out=np.full_like(room, np.nan), where=room > 0)
