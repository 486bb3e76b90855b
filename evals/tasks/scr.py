"""SCR, spurious correlation removal: a probe trained where two attributes agree is cured by ablating the unwanted
one (ablation.py).

Legend: T texts, E width of y, M latents.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skipcoder.errors import UserError
from skipcoder.evals.config import ErasureConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import share
from skipcoder.evals.tasks import ablation, labelled
from skipcoder.evals.tasks.texts import TextReader
from skipcoder.trainer.run.run import Run


def scr(reader: TextReader, runs: Sequence[Run], cfg: ErasureConfig) -> list[Result]:
    """For each run: `scr_N` for each N, of the attribute that the other spoils more; null unless it clearly costs."""
    texts, attributes_T2 = two_attributes(cfg)
    cells = labelled.Labelled("scr", texts, attributes_T2 @ [2, 1], ["0", "1", "2", "3"])
    cells, rows = labelled.distinct(cells, reader.tokens(cells.texts, cfg.tokens))
    test, balanced, biased = _scr_split(cells.labels, cfg.texts)
    read = np.unique(np.concatenate([test, balanced, biased]))
    attributes_T2 = np.stack([cells.labels[read] // 2, cells.labels[read] % 2], 1)
    test, balanced, biased = (np.searchsorted(read, places) for places in (test, balanced, biased))
    results = []
    for run, y_TE, f_TM in ablation.read(reader, runs, [rows[i] for i in read]):
        found = []
        for wanted, spurious in ((0, 1), (1, 0)):
            label = attributes_T2[:, wanted]
            spoilt, oracle = (
                ablation.probe(y_TE[biased], label[biased]),
                ablation.probe(y_TE[balanced], label[balanced]),
            )
            unwanted = ablation.probe(y_TE[balanced], attributes_T2[balanced, spurious])
            more_M = ablation.difference(f_TM[balanced], attributes_T2[balanced, spurious] == 1)
            effect_M = np.abs(more_M * ablation.along(run, unwanted))
            before = spoilt.predict(y_TE[test]) == label[test]
            best = oracle.predict(y_TE[test]) == label[test]
            after = {
                n: spoilt.predict(ablation.ablated(y_TE[test], f_TM[test], effect_M, n, run)) == label[test]
                for n in ablation.counts(cfg.ablate, run)
            }
            found.append((before, best, after))
        before, best, after = min(found, key=lambda item: item[0].mean())
        result: Result = {
            "scr_texts": len(test),
            "scr_accuracy_biased": float(before.mean()), "scr_accuracy_oracle": float(best.mean()),
        }  # fmt: skip
        for n, right in after.items():
            gained, room = (a.astype(float) - before for a in (right, best))
            result[f"scr_{n}"], result[f"scr_{n}_ci"] = share(gained, room, np.ones(len(room)))
        results.append(result)
    return results


def two_attributes(cfg: ErasureConfig) -> tuple[list[str], np.ndarray]:
    """Texts and their two attributes, 0 or 1, [T, 2]: from a CSV file, or the historical figures that are in two data
    sets of sae-probes (politician or not, male or not)."""
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
    """Indices of the test texts (all four cells equally) and of two training sets: a balanced one, and a biased one of
    texts whose attributes agree. Training sets may overlap each other, but not the test texts."""
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
