"""The files that interpretation writes into a run's directory.

RUN/interpretation/latents/00000012.json   explanation and scores of one latent
RUN/interpretation/summary.json            means over latents, baselines, calibration, tokens and cost
"""

import json
from pathlib import Path
from typing import Any, NotRequired, cast

from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.records import checked
from skipcoder.trainer.run.run import Run

FOLDER = "interpretation"
_REMEDY = "delete it and interpret the run again"


class LatentRecord(TypedDict):
    """One latent: its explanation and how well it scores."""

    latent: int
    settings: str
    """Fingerprint of everything that the record depends on."""
    firing: int
    largest: float
    explanation: str | None
    problem: str | None
    failed: int
    scores: dict[str, dict[str, Any]]
    """Keyed by scorer."""


class Score(TypedDict):
    """Means over latents for one scorer; further keys hold balanced accuracy, F1, AUROC or correlation, each with its
    interval and the number of latents that have it."""

    latents: int
    failed: int
    balanced_accuracy: NotRequired[float | None]
    balanced_accuracy_ci: NotRequired[list[float] | None]


class Calibration(Score):
    """Scores of planted latents."""

    usable: bool | None
    """Whether the judge can judge; None where no latents could be planted."""


class InterpretationSummary(TypedDict):
    """Means over latents of a run. Further keys hold a `Score` for each scorer."""

    settings: str
    weights: str
    judge: str | None
    latents: int
    explained: int
    too_few_examples: int
    failed_explanations: int
    calibration: Calibration
    shuffled_explanations: Score
    always_no: dict[str, float]
    use: NotRequired[dict[str, float]]
    problems: NotRequired[dict[str, int]]
    detection: NotRequired[Score]
    fuzzing: NotRequired[Score]


def read_summary(run: Run) -> InterpretationSummary | None:
    """The last interpretation of these weights, if there is one; UserError where the file is damaged."""
    found = _read(_summary_file(run))
    if found is None:
        return None
    summary = checked(InterpretationSummary, found, str(_summary_file(run)), _REMEDY)
    return summary if summary["weights"] == run.weights else None


def write_summary(run: Run, summary: InterpretationSummary) -> None:
    """Write the summary of a run's interpretation."""
    write_atomically(_summary_file(run), json.dumps(summary, indent=2).encode())


def read_latent(run: Run, latent: int) -> LatentRecord | None:
    """A latent's record, if there is one that can be read (else it is made again)."""
    try:
        return checked(LatentRecord, _read(_file(run, latent)), "", "")
    except UserError:
        return None


def read_latents(run: Run, settings: str) -> list[LatentRecord]:
    """All records that were made with these settings."""
    files = sorted((run.path / FOLDER / "latents").glob("*.json"))
    records = [checked(LatentRecord, _read(file), str(file), _REMEDY) for file in files]
    return [record for record in records if record["settings"] == settings]


def explanations(run: Run) -> dict[int, str | None]:
    """{latent: its explanation} of the run's interpretation; {} without one."""
    found = read_summary(run)
    return {r["latent"]: r["explanation"] for r in read_latents(run, found["settings"])} if found else {}


def write_latent(run: Run, record: LatentRecord) -> None:
    """Write a latent's record."""
    content = json.dumps(record, indent=2, ensure_ascii=False).encode()
    write_atomically(_file(run, record["latent"]), content)


def judged(run: Run) -> dict[str, Any]:
    """What a table shows of a run's interpretation: `detection` and `fuzzing` (balanced accuracy) with their intervals,
    and whether the judge could judge; {} without an interpretation."""
    found = read_summary(run)
    if found is None:
        return {}
    row: dict[str, Any] = {"judge": found["judge"], "judge_usable": found["calibration"]["usable"]}
    for scorer in ("detection", "fuzzing"):
        score = cast(Score | None, found.get(scorer))
        if score is not None:
            row |= {scorer: score.get("balanced_accuracy"), f"{scorer}_ci": score.get("balanced_accuracy_ci")}
    return row


def _file(run: Run, latent: int) -> Path:
    return run.path / FOLDER / "latents" / f"{latent:08d}.json"


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {_REMEDY}") from None


def _summary_file(run: Run) -> Path:
    return run.path / FOLDER / "summary.json"
