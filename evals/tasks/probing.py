"""Sparse probing: how well a few latents tell two classes of texts apart.

For each data set: mean activations over a text's tokens; the k latents whose means differ most between the classes of
the *training* texts; a logistic regression on them; accuracy and AUC on the test texts, which neither step has seen.
To compare: a dense probe on x and on y, the k dimensions of y chosen in the same way, a coder of the same size with
random weights, and the coder's own probe trained on permuted labels (chance: 0.5).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
import torch
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from skipcoder.errors import UserError
from skipcoder.evals.config import ProbingConfig
from skipcoder.evals.core.results import Result
from skipcoder.evals.stats.intervals import of_mean
from skipcoder.evals.tasks import labelled
from skipcoder.evals.tasks.texts import TextReader, pool_dense, pooled
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind
from skipcoder.trainer.run.run import Run

TRAIN_SHARE = 2 / 3
PERMUTATIONS = 8


def probing(reader: TextReader, runs: Sequence[Run], cfg: ProbingConfig) -> list[Result]:
    """Results of each of the runs, all of one hookpoint; the model reads every text once."""
    details: list[list[Result]] = [[] for _ in runs]
    for name in chosen(cfg):
        data = labelled.find(name)
        if len(data.classes) != 2:
            raise UserError(f"probing.datasets: {name} has {len(data.classes)} classes; probing wants two")
        data, rows = labelled.distinct(data, reader.tokens(data.texts, cfg.tokens))
        places = labelled.balanced(data.labels, cfg.texts, name)
        split = int(len(places) * TRAIN_SHARE)
        labels = data.labels[places]
        if split < 8 or len(np.unique(labels[:split])) < 2 or len(np.unique(labels[split:])) < 2:
            raise UserError(
                f"probing: {name} gives only {len(places)} texts; it needs both classes in training and test"
            )
        task = LabelledSplit(labels[:split], labels[split:], cfg.ks)
        batches = list(reader.read([rows[i] for i in places]))
        dense = {side: pool_dense(batches, side, len(places)) for side in ("input", "output")}
        shared = {"dense_x": task.dense(dense["input"]), "dense_y": task.dense(dense["output"])}
        shared |= {f"y_dims_{key}": value for key, value in task.sparse(dense["output"]).items()}
        random: dict[tuple[str, int, int], dict[str, float]] = {}
        for run, found in zip(runs, details, strict=True):
            side = run.read_site.side
            same = (side, run.coder.cfg.width, run.coder.cfg.k)
            if same not in random:
                twin = random_twin(run, dense[side].mean(0))
                random[same] = task.sparse(pooled(twin, batches, side, len(places)))
            features = pooled(run.coder, batches, side, len(places))
            row: Result = {
                "dataset": name,
                "train": split,
                "test": len(places) - split,
                **task.sparse(features),
                **shared,
            }
            row |= {f"random_{key}": value for key, value in random[same].items()}
            row |= {f"gain_{key}": row[key] - row[f"random_{key}"] for key in random[same]}
            row |= {f"permuted_{key}": value for key, value in task.sparse(features, permuted=True).items()}
            found.append(row)
    return [_summary(found) for found in details]


def chosen(cfg: ProbingConfig) -> list[str]:
    """Names of the data sets: all, those asked for, or `count` of them spread over the list."""
    names = labelled.binary_names() if cfg.datasets is None or cfg.datasets == ["all"] else cfg.datasets
    if cfg.datasets is None:
        return [names[i] for i in np.linspace(0, len(names) - 1, cfg.count).astype(int)]
    return list(names)


class LabelledSplit:
    """One data set's labels, for features whose rows are its training texts, then its test texts."""

    def __init__(self, train: np.ndarray, test: np.ndarray, ks: Sequence[int]) -> None:
        self.train, self.test, self.ks = train, test, ks

    def sparse(self, features: Any, permuted: bool = False) -> dict[str, float]:
        """`k1`, `k1_auc`, ...: scores of probes on the k columns that differ most between the classes in training."""
        if permuted:  # one permutation is not enough if a column is informative: its slope has a random sign
            rng = np.random.default_rng(0)
            found = [self._sparse(features, rng.permutation(self.train)) for _ in range(PERMUTATIONS)]
            return {key: float(np.mean([one[key] for one in found])) for key in found[0]}
        return self._sparse(features, self.train)

    def _sparse(self, features: Any, labels: np.ndarray) -> dict[str, float]:
        train, test = features[: len(labels)], features[len(labels) :]
        difference = train[labels == 1].mean(0) - train[labels == 0].mean(0)
        order = np.argsort(-np.abs(np.asarray(difference)), kind="stable")
        found: dict[str, float] = {}
        for k in self.ks:
            columns = order[:k]
            probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
            probe.fit(_dense(train[:, columns]), labels)
            found |= self._score(f"k{k}", probe, _dense(test[:, columns]))
        return found

    def dense(self, features: np.ndarray) -> float:
        """Accuracy of a probe on all columns, its penalty chosen by cross-validation in training."""
        train, test = features[: len(self.train)], features[len(self.train) :]
        probe = make_pipeline(
            StandardScaler(),
            LogisticRegressionCV(
                Cs=np.logspace(-4, 0, 5),
                cv=3,
                scoring="accuracy",
                max_iter=1000,
                l1_ratios=(0.0,),
                use_legacy_attributes=False,
            ),
        )
        probe.fit(train, self.train)
        return float((probe.predict(test) == self.test).mean())

    def _score(self, name: str, probe: Any, test: np.ndarray) -> dict[str, float]:
        return {
            name: float((probe.predict(test) == self.test).mean()),
            f"{name}_auc": float(roc_auc_score(self.test, probe.decision_function(test))),
        }


def random_twin(run: Run, mean_D: np.ndarray) -> SparseCoder:
    """A coder of the same size with fresh, untrained weights."""
    cfg = CoderConfig(kind=Kind.transcoder, k=run.coder.cfg.k, width=run.coder.cfg.width)
    twin = SparseCoder(cfg, len(mean_D), run.coder.d_out).requires_grad_(False).eval()
    twin.init_biases(torch.from_numpy(mean_D).float(), twin.b_dec)
    return twin.to(run.coder.W_dec.device)


def _dense(columns: Any) -> np.ndarray:
    return columns.toarray() if scipy.sparse.issparse(columns) else np.asarray(columns)


def _summary(found: list[Result]) -> Result:
    keys = [key for key, value in found[0].items() if isinstance(value, float)]
    result: Result = {"probing_datasets": len(found)}
    for key in keys:
        values = np.array([row[key] for row in found])
        result[f"probing_{key}"] = float(values.mean())
        if not key.startswith(("permuted", "random", "y_dims")):
            result[f"probing_{key}_ci"] = of_mean(values)
    return result | {"probing_details": found}
