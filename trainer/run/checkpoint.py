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


class Index(TypedDict):
    """state.json."""

    step: int
    parts: list[Part]


def save_state(state: State, latents: range, directory: Path, ranks: Ranks = ALONE) -> None:
    """Write the resume point of a run directory, replacing the last one in one step; `latents`: those here."""
    folder, group, step = directory / FOLDER / "state", ranks.latents, state["learner"]["step"]
    parts: list[Part] = [
        {"file": f"state-{step}-{rank}-of-{group.size}.pt", "first": first, "end": first + len(latents)}
        for rank, first in enumerate(range(0, group.size * len(latents), len(latents)))
    ]
    mine = WHOLE if group.size == 1 else parts[group.rank]["file"]
    with ranks.together():
        if ranks.data.is_main:
            write_atomically(folder / mine, lambda file: torch.save(state, file))
    with ranks.together():
        if ranks.is_main:
            kept = {mine}
            if group.size > 1:
                index: Index = {"step": step, "parts": parts}
                write_atomically(folder / INDEX, json.dumps(index, indent=2).encode())
                kept = {INDEX, *(part["file"] for part in parts)}
            for name in sorted({path.name for path in folder.glob("state*")} - kept, key=lambda name: name != INDEX):
                (folder / name).unlink(missing_ok=True)


def load_state(directory: Path, latents: range | None = None) -> State | None:
    """Return the resume point, or None if there is none; raise UserError if it is damaged. `latents`: those wanted, if
    not all."""
    folder = directory / FOLDER / "state"
    whole, index = folder / WHOLE, _index(folder / INDEX)
    if whole.is_file() and (index is None or index["step"] <= _read(whole)["learner"]["step"]):
        if latents is None:
            return _read(whole)
        state = _read(whole, mmap=True)
        parts = [(range(len(state["learner"]["since_fired"])), state)]
    elif index is None:
        return None
    else:
        held = [(range(part["first"], part["end"]), folder / part["file"]) for part in index["parts"]]
        latents = range(held[-1][0].stop) if latents is None else latents
        wanted = [one for one in held if one[0].start < latents.stop and latents.start < one[0].stop]
        parts = [(rows, _read(file, mmap=True)) for rows, file in wanted]
    first = parts[0][1]
    learner = take_latents([(rows, state["learner"]) for rows, state in parts], latents)
    window = [{key: value.clone() for key, value in line.items()} for line in first["window"]]
    return {**first, "learner": learner, "window": window}


def _index(file: Path) -> Index | None:
    if not file.is_file():
        return None
    try:
        return checked(Index, json.loads(file.read_text()), str(file), REMEDY)
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {REMEDY}") from None


def _read(file: Path, mmap: bool = False) -> State:
    """Read a file; with `mmap` its tensors stay on the disk until they are used, and must be copied."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        raise UserError(f"{file} is damaged or gone ({error}); {REMEDY}") from None
    return checked(State, state, str(file), REMEDY)
