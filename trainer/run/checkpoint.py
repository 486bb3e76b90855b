"""The point from which an interrupted run resumes. The file appears whole or not at all."""

from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.records import checked
from skipcoder.trainer.coder.files import FOLDER
from skipcoder.trainer.data.stream import Position
from skipcoder.trainer.step.learner import LearnerState


class State(TypedDict):
    """All that a resumed run depends on."""

    learner: LearnerState
    stream: Position
    window: list[dict[str, Any]]
    """Losses since the last line of metrics."""
    seconds: float
    """Seconds spent in training so far."""


def save_state(state: State, directory: Path) -> None:
    """Write the resume point of a run directory, replacing the last one in one step."""
    write_atomically(_file(directory), lambda file: torch.save(state, file))


def load_state(directory: Path) -> State | None:
    """Return the resume point, or None if there is none; raise UserError if it is damaged."""
    file = _file(directory)
    if not file.is_file():
        return None
    remedy = "delete it to start this run over"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None
    return checked(State, state, str(file), remedy)


def _file(directory: Path) -> Path:
    return directory / FOLDER / "state" / "state.pt"
