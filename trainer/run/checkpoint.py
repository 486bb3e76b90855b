"""The point from which an interrupted run resumes. It appears whole or not at all.

Of a coder in several processes each writes its own part, all at once; then an index names the parts, and takes the
place of the last. Any number of processes can go on from it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.records import checked
from skipcoder.trainer.coder.files import FOLDER
from skipcoder.trainer.data.ranks import ALONE, Ranks
from skipcoder.trainer.data.stream import Position
from skipcoder.trainer.step.state import LearnerState, take_latents

WHOLE, INDEX = "state.pt", "state.json"
REMEDY = "delete it to start this run over"


class State(TypedDict):
    """All that a resumed run depends on."""

    learner: LearnerState
    stream: Position
    window: list[dict[str, Any]]
    """Losses since the last line of metrics."""
    seconds: float
    """Seconds spent in training so far."""


class Part(TypedDict):
    """A file of the index, and the latents from `first` to before `end` in it."""

    file: str
    first: int
    end: int


def save_state(state: State, latents: range, directory: Path, ranks: Ranks = ALONE) -> None:
    """Write the resume point of a run directory, replacing the last one in one step; `latents`: those here."""
    folder = directory / FOLDER / "state"
    before = {path.name for path in folder.glob("state*")} if folder.is_dir() else set()
    group = ranks.latents
    if group.size == 1:
        with ranks.together():
            if ranks.is_main:
                write_atomically(folder / WHOLE, lambda file: torch.save(state, file))
        written = {WHOLE}
    else:
        parts: list[Part] = [
            {
                "file": f"state-{state['learner']['step']}-{r}-of-{group.size}.pt",
                "first": first,
                "end": first + len(latents),
            }
            for r, first in enumerate(range(0, group.size * len(latents), len(latents)))
        ]
        with ranks.together():
            if ranks.data.is_main:
                write_atomically(folder / parts[group.rank]["file"], lambda file: torch.save(state, file))
        with ranks.together():
            if ranks.is_main:
                write_atomically(folder / INDEX, json.dumps(parts, indent=2).encode())
        written = {INDEX, *(part["file"] for part in parts)}
    if ranks.is_main:
        for name in before - written:
            (folder / name).unlink(missing_ok=True)


def load_state(directory: Path, latents: range | None = None) -> State | None:
    """Return the resume point, or None if there is none; raise UserError if it is damaged. `latents`: those wanted, if
    not all."""
    folder = directory / FOLDER / "state"
    index = folder / INDEX
    if index.is_file():
        try:
            parts = checked(list[Part], json.loads(index.read_text()), str(index), REMEDY)
        except ValueError as error:
            raise UserError(f"{index} is damaged ({error}); {REMEDY}") from None
    elif (folder / WHOLE).is_file():
        state = _read(folder / WHOLE)
        if latents is None:
            return state
        parts = [{"file": WHOLE, "first": 0, "end": len(state["learner"]["since_fired"])}]
    else:
        return None
    wanted = range(parts[-1]["end"]) if latents is None else latents
    read = [
        (range(part["first"], part["end"]), _read(folder / part["file"]))
        for part in parts
        if part["first"] < wanted.stop and wanted.start < part["end"]
    ]
    learner = take_latents([(held, state["learner"]) for held, state in read], wanted)
    return {**read[0][1], "learner": learner}


def _read(file: Path) -> State:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is damaged or gone ({error}); {REMEDY}") from None
    return checked(State, state, str(file), REMEDY)
