"""TPP, targeted probe perturbation: ablating a class' latents should hurt that class' probe and no other (ablation.py).

Legend: T texts, E width of y, M latents, C classes.
"""

from collections.abc import Sequence

import numpy as np

from skipcoder.errors import UserError
from skipcoder.evals.config import ErasureConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import of_mean
from skipcoder.evals.tasks import ablation, labelled
from skipcoder.evals.tasks.texts import TextReader
from skipcoder.trainer.run.run import Run


def tpp(reader: TextReader, runs: Sequence[Run], cfg: ErasureConfig) -> list[Result]:
    """For each of the runs, all of one hookpoint: `tpp_N` for each N, and the classes that it is a mean over."""
    data = labelled.find(cfg.tpp_data)
    data, rows = labelled.distinct(data, reader.tokens(data.texts, cfg.tokens))
    places = labelled.balanced(data.labels, cfg.texts, data.name)
    # Texts of each class go to the two halves in turn.
    order = np.argsort(data.labels[places], kind="stable")
    places = np.concatenate([places[order[0::2]], places[order[1::2]]])
    labels, half = data.labels[places], len(places[order[0::2]])
    if np.bincount(labels[half:], minlength=len(data.classes)).min() < 8:
        raise UserError(f"tpp: {data.name} gives too few texts of a class; raise erasure.texts or take fewer classes")
    results = []
    for run, y_TE, f_TM in ablation.read(reader, runs, [rows[i] for i in places]):
        effects, probes = [], []
        for c in range(len(data.classes)):
            probe = ablation.probe(y_TE[:half], labels[:half] == c)
            probes.append(probe)
            more_M = ablation.difference(f_TM[:half], labels[:half] == c).clip(min=0)
            effects.append(more_M * ablation.along(run, probe))
        right_TC = ablation.right(probes, y_TE[half:], labels[half:])
        result: Result = {"tpp_texts": len(places) - half, "tpp_classes": data.classes}
        for n in ablation.counts(cfg.ablate, run):
            per_text = np.zeros(len(places) - half)
            for c, effect_M in enumerate(effects):
                lost_TC = right_TC - ablation.right(
                    probes, ablation.ablated(y_TE[half:], f_TM[half:], effect_M, n, run), labels[half:]
                )
                others = [j for j in range(len(probes)) if j != c]
                per_text += (lost_TC[:, c] - lost_TC[:, others].mean(1)) / len(probes)
            result[f"tpp_{n}"] = float(per_text.mean())
            result[f"tpp_{n}_ci"] = of_mean(per_text)
        results.append(result)
    return results
