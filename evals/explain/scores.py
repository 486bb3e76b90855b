"""Turn a judge's answers into scores, per latent and over latents."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

from skipcoder.evals.stats.intervals import of_mean


@dataclass
class Answers:
    """Answers to one latent's questions of one kind."""

    truth: list[int] = field(default_factory=list)
    said: list[int] = field(default_factory=list)
    probability: list[float | None] = field(default_factory=list)
    failed: int = 0
    """Excerpts without an answer; they are counted, not scored."""

    def scores(self) -> dict[str, float | int | None]:
        """Balanced accuracy, F1 and AUROC (from probabilities; null where the judge gives none)."""
        truth, said = np.array(self.truth, bool), np.array(self.said or [0] * len(self.truth), bool)
        found: dict[str, float | int | None] = {"n": len(truth), "failed": self.failed}
        if truth.all() or not truth.any():  # nothing, or only one side, was answered
            return found | {"balanced_accuracy": None, "f1": None, "auroc": None}
        found |= {"balanced_accuracy": None, "f1": None}
        if self.said:  # embeddings say how near, not whether
            found["balanced_accuracy"] = float(((said[truth]).mean() + (~said[~truth]).mean()) / 2)
            found["f1"] = float(2 * (truth & said).sum() / (truth.sum() + said.sum()))
        sure = None not in self.probability and len(self.probability) == len(truth)
        found["auroc"] = float(roc_auc_score(truth, np.array(self.probability, float))) if sure else None
        return found


def over_latents(scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over latents with 95 % intervals, null below 20 latents."""
    found: dict[str, Any] = {"latents": len(scores), "failed": sum(score["failed"] for score in scores)}
    for key in ("balanced_accuracy", "f1", "auroc", "correlation"):
        if scores and key not in scores[0]:
            continue
        values = np.array([score[key] for score in scores if score[key] is not None])
        found[key] = float(values.mean()) if len(values) else None
        found[f"{key}_ci"] = of_mean(values) if len(values) else None
        found[f"{key}_latents"] = len(values)
    return found
