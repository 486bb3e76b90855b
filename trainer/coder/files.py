"""The files of a coder, coder.safetensors and coder.json (docs/formats.md): their types, writing and reading.

A coder that several processes trained comes in several files of tensors, each with some of the latents, and an index.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.files import write_atomically
from skipcoder.pipeline.model.load import ModelIdentity
from skipcoder.records import checked

FORMAT_VERSION = 1
FOLDER = "checkpoint"
"""Where a run directory keeps them."""
TENSORS = "coder.safetensors"
INDEX = "coder.safetensors.index.json"
DESCRIPTION = "coder.json"


class SiteFacts(TypedDict):
    """A place in a model: the `input` or `output` of a module."""

    module: str
    side: str


class SideFacts(SiteFacts):
    """One of the sides that a coder over several hookpoints reads or writes, in the order of its rows."""

    hookpoint: str
    width: int
    scale: float
    """What training divided it by."""
    variance: float
    """Total variance of a token of the training units, in the model's units squared."""


class FilterFacts(TypedDict):
    """The positions that training left out."""

    first_positions: int
    special_tokens: bool
    roles: NotRequired[list[str]]
    max_norm: NotRequired[float]
    longest: NotRequired[list[float | None]]
    """Longest input and output of the MLP that were trained on, in the model's units; null of a side that was not
    stored."""


class DataFacts(TypedDict, total=False):
    """The activations that a coder was trained on."""

    store_identity: str
    source: dict[str, Any]
    """The configuration of the text."""
    filter: FilterFacts
    train_tokens: int | None
    long_tokens: int
    """Tokens of the store that the filter's `longest` leaves out."""


class ScaleFacts(TypedDict):
    """What training divided activations by."""

    input: float
    output: float
    folded: bool
    """Whether the weights take raw activations (always, in our files)."""


class Provenance(TypedDict, total=False):
    """Where a coder comes from and where it attaches. A coder made by hand has none of these keys."""

    model: ModelIdentity
    other_model: ModelIdentity
    """The second one, for a coder between two models."""
    hookpoint: str
    read: SiteFacts
    write: SiteFacts
    sides: list[SideFacts]
    """Of a coder over several hookpoints what it writes, in place of `read`, `write` and `scales`."""
    read_sides: list[SideFacts]
    """What it reads, unless that is the same."""
    data: DataFacts
    scales: ScaleFacts
    seed: int
    imported: dict[str, Any]
    """For a coder from another tool's files: the format, and what those files say."""


class Description(Provenance):
    """coder.json: the coder's configuration, its widths, and its provenance."""

    format_version: int
    kind: str
    k: int
    width: int
    activation: str
    prefixes: list[int] | None
    side: str
    normalize_decoder: bool
    skip_init: str | None
    d_in: int
    d_out: int
    dtype: str
    subtract_decoder_bias: bool


class Index(TypedDict):
    """coder.safetensors.index.json."""

    files_by_latent: list[str]
    """Files of tensors, which follow one another in each parameter with a row for each latent."""


class Loaded(NamedTuple):
    """What the files of a coder hold."""

    tensors: dict[str, Tensor]
    description: Description


def shareable(facts: Any) -> Any:
    """The same facts with absolute paths, which lead nowhere on other machines and tell of this one, cut to their last
    part."""
    if isinstance(facts, dict):
        return {key: shareable(value) for key, value in facts.items()}
    if isinstance(facts, list):
        return [shareable(value) for value in facts]
    is_path = isinstance(facts, str) and Path(facts).is_absolute()
    return Path(facts).name if is_path else facts


def write_coder(folder: Path, tensors: dict[str, Tensor], description: Description) -> None:
    """Write both files. The tensors carry the description too, so that a reader never mixes an old file and
    a new one."""
    text = json.dumps(description, indent=2)
    _write(folder / TENSORS, tensors, text)
    write_atomically(folder / DESCRIPTION, text.encode())


def write_part(folder: Path, tensors: dict[str, Tensor], description: Description, part: int, parts: int) -> None:
    """Write one of the files of a coder in several: the parameters of its latents and, into the first, all others."""
    _write(folder / part_name(part, parts), tensors, json.dumps(description, indent=2))


def _write(path: Path, tensors: dict[str, Tensor], description: str) -> None:
    """Write tensors from where they are, as a copy in memory may not fit."""

    def write(file: BinaryIO) -> None:
        try:
            save_file(tensors, file.name, {DESCRIPTION: description})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))  # a full disk, say
            raise (OSError(int(number[1]), os.strerror(int(number[1])), str(path)) if number else error) from None

    write_atomically(path, write)


def write_index(folder: Path, description: Description, parts: int) -> None:
    """Write what says that all parts are there."""
    names = [part_name(part, parts) for part in range(parts)]
    write_atomically(folder / DESCRIPTION, json.dumps(description, indent=2).encode())
    write_atomically(folder / INDEX, json.dumps({"files_by_latent": names}, indent=2).encode())


def part_name(part: int, parts: int) -> str:
    """Return the name of a file of tensors, counted from 0."""
    return f"coder-{part + 1:05}-of-{parts:05}.safetensors"


def find_tensors(path: Path) -> list[Path]:
    """Return the files of tensors of a coder; `path` may be the run, its checkpoint folder or the folder itself. Empty
    if there is no coder; UserError if its index is damaged."""
    for folder in (path / FOLDER, path):
        if (folder / TENSORS).is_file():
            return [folder / TENSORS]
        if (folder / INDEX).is_file():
            try:
                index = json.loads((folder / INDEX).read_text())
            except ValueError as error:
                raise UserError(f"{folder / INDEX} is damaged ({error}); train or fetch the coder again") from None
            names = checked(Index, index, str(folder / INDEX), "train or fetch the coder again")["files_by_latent"]
            return [folder / Path(name).name for name in names]
    return []


def read_coder(path: Path) -> Loaded:
    """Read what was written; `path` as for `find_tensors`.

    Raises UserError if there is no coder, or if it is damaged (naming the field at fault) or of another version.
    """
    files = find_tensors(path)
    if not files:
        raise UserError(f"no {TENSORS} in {path} or {path / FOLDER}; has this run been trained to its end?")
    first, *others = [_read(file) for file in files]
    for file, part in zip(files[1:], others, strict=True):
        if part.description != first.description or set(part.tensors) - set(first.tensors):
            raise UserError(f"{file} and {files[0].name} are of different coders; train or fetch the coder again")
    if others:
        for name in list(others[0].tensors):
            if any(name not in part.tensors for part in others):
                raise UserError(f"{files[0].parent}: not all of a coder's files hold {name}; train or fetch it again")
            first.tensors[name] = torch.cat([part.tensors.pop(name) for part in (first, *others)])
    return first


def _read(file: Path) -> Loaded:
    try:
        tensors = load_file(file)  # stays on the disk until it is copied
        with safe_open(file, "pt") as opened:
            description = json.loads(opened.metadata()[DESCRIPTION])
    except Exception as error:  # safetensors, json and missing keys raise different types
        raise UserError(f"{file} is damaged or not a skipcoder checkpoint ({error})") from None
    if not isinstance(description, dict) or description.get("format_version") != FORMAT_VERSION:
        version = description.get("format_version") if isinstance(description, dict) else None
        raise UserError(f"{file} has format version {version}, this skipcoder reads {FORMAT_VERSION}")
    return Loaded(tensors, checked(Description, description, f"{file}: {DESCRIPTION}", "train or import it again"))
