"""Ablate the latents of a concept and see what linear probes lose: what TPP and SCR have in common (arXiv 2411.18895,
in SAEBench's form).

Probes read y, the MLP's output, averaged over a text's tokens. Ablating latents subtracts their part,
y - sum_i f_i W_dec_i (a skip and the reconstruction error stay); this is linear, so it acts on means as well.

Both are reported, not headlined: an audit (arXiv 2605.18229) found that TPP falls with training and that SCR at large N
ranks coders backwards. Legend: T texts, E width of y, M latents, C classes, N latents ablated.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression

from skipcoder.evals.tasks.texts import TextReader, pool_dense, pooled
from skipcoder.trainer.run.run import Run


def read(
    reader: TextReader, runs: Sequence[Run], rows: list[list[int]]
) -> Iterator[tuple[Run, np.ndarray, scipy.sparse.csr_array]]:
    """Yield each run with the mean y [T, E] and the mean codes [T, M] of every text."""
    batches = list(reader.read(rows))
    y = {side: pool_dense(batches, side, len(rows)) for side in ("input", "output")}
    for run in runs:
        yield run, y[run.write_site.side], pooled(run.coder, batches, run.read_site.side, len(rows))


def probe(y_TE: np.ndarray, is_it_T: np.ndarray) -> LogisticRegression:
    """A probe of y, scaled but not standardised: its weights are a direction in y's own space."""
    scale = np.sqrt((y_TE - y_TE.mean(0)).var())
    probe = LogisticRegression(class_weight="balanced", max_iter=1000).fit(y_TE / scale, is_it_T)
    probe.coef_ = probe.coef_ / scale
    return probe


def along(run: Run, probe: LogisticRegression) -> np.ndarray:
    """[M]: dot product of each decoder row with the probe's weights."""
    W_dec_ME = run.coder.W_dec.detach()
    return (W_dec_ME @ torch.from_numpy(probe.coef_[0]).to(W_dec_ME)).double().cpu().numpy()


def difference(f_TM: scipy.sparse.csr_array, is_it_T: np.ndarray) -> np.ndarray:
    """[M]: how much more each latent fires on texts of the class than on others."""
    result: np.ndarray = (np.asarray(f_TM[is_it_T].mean(0)) - np.asarray(f_TM[~is_it_T].mean(0))).ravel()
    return result


def ablated(y_TE: np.ndarray, f_TM: scipy.sparse.csr_array, effect_M: np.ndarray, n: int, run: Run) -> np.ndarray:
    chosen = np.argsort(-effect_M, kind="stable")[:n]
    chosen = chosen[effect_M[chosen] > 0]
    if not len(chosen):
        return y_TE
    result: np.ndarray = (
        y_TE - f_TM[:, chosen] @ run.coder.W_dec.detach()[torch.from_numpy(chosen)].double().cpu().numpy()
    )
    return result


def right(probes: Sequence[LogisticRegression], y_TE: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """float [T, C]: whether each class' probe is right about each text, weighted so that its mean is the balanced
    accuracy."""
    columns = []
    for c, probe in enumerate(probes):
        is_it = labels == c
        weight = np.where(is_it, 0.5 / is_it.mean(), 0.5 / (~is_it).mean())
        columns.append((probe.predict(y_TE) == is_it) * weight)
    return np.stack(columns, 1)


def counts(ablate: Sequence[int], run: Run) -> list[int]:
    return [n for n in ablate if n < run.coder.cfg.width]
