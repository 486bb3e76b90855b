"""Files of an interpretation, as if a judge had been asked."""

from typing import Any

from skipcoder.evals.explain.records import InterpretationSummary, LatentRecord, write_latent, write_summary
from skipcoder.trainer.run.run import Run


def summary(run: Run, **facts: Any) -> None:
    """Write summary.json with these facts."""
    score = {"latents": 1, "failed": 0, "balanced_accuracy": None, "balanced_accuracy_ci": None}
    found: InterpretationSummary = {
        "settings": "these",
        "weights": run.weights,
        "judge": "j",
        "latents": 1,
        "explained": 1,
        "too_few_examples": 0,
        "failed_explanations": 0,
        "calibration": {**score, "usable": True},  # type: ignore[typeddict-item]
        "shuffled_explanations": score,  # type: ignore[typeddict-item]
        "always_no": {},
    }
    for name, value in facts.items():
        found[name] = {**found.get(name, score), **value} if isinstance(value, dict) else value  # type: ignore
    write_summary(run, found)


def latent(run: Run, number: int, explanation: str, scores: dict[str, dict[str, Any]], settings: str = "these") -> None:
    """Write a latent's record."""
    record: LatentRecord = {
        "latent": number,
        "settings": settings,
        "firing": 1,
        "largest": 1.0,
        "explanation": explanation,
        "problem": None,
        "failed": 0,
        "scores": scores,
    }
    write_latent(run, record)
