"""Commit records: the one place that says which units of a store exist.

A record is a small JSON file, `commits/<unit>.json`, created last and in one step. It names no time, host or attempt,
so the same unit always has the same record.
"""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated

from annotated_types import Len
from google_crc32c import value as crc32c
from safetensors import SafetensorError
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.stats import Moments, unpack
from skipcoder.records import checked

SIDES = ("input", "output")
POSITIONS = ("first", "special", "other")


class FileFacts(TypedDict):
    """Size and checksum of a file."""

    bytes: int
    crc32c: int


class Record(TypedDict):
    """A commit record as JSON."""

    identity: str
    unit: int
    rows: Annotated[list[int], Len(2, 2)]
    tokens_crc32c: int
    shards: dict[str, FileFacts]


@dataclass(frozen=True)
class Commit:
    """What a committed unit holds."""

    identity: str
    unit: int
    rows: tuple[int, int]
    tokens_crc32c: int
    shards: dict[str, FileFacts]
    """File (relative to the store) -> its facts: a shard of every array, and the unit's statistics."""


def record_file(unit: int) -> str:
    """File of a unit's record, relative to the store."""
    return f"commits/{unit:08d}.json"


def statistics_file(hookpoint: str, unit: int) -> str:
    """File of a unit's statistics, relative to the store."""
    return f"statistics/{hookpoint}/{unit:08d}.safetensors"


def read_statistics(place: Place, hookpoint: str, record: Commit) -> dict[str, Moments]:
    """`<side>/<class of positions>` -> moments. UserError names a file that is missing or damaged."""
    name = statistics_file(hookpoint, record.unit)
    try:
        content = place.read(name)
        if crc32c(content) != record.shards[name]["crc32c"]:
            raise ValueError("its checksum does not match")
        return unpack(content)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        mend = f"delete {place}/{record_file(record.unit)} and re-run the capture to mend it"
        raise UserError(f"{place}/{name} cannot be read ({error}); {mend}") from None


def committed_units(place: Place) -> set[int]:
    """Units that have a record, judged by file names alone."""
    stems = (PurePosixPath(name).stem for name in place.sizes("commits"))
    return {int(stem) for stem in stems if stem.isdigit()}  # not zarr.json or a partial file


def read(place: Place, unit: int) -> Commit:
    """Read one record. UserError names a file that is damaged, and the field at fault."""
    file, remedy = f"{place}/{record_file(unit)}", "delete it and re-run the capture"
    content = place.read(record_file(unit))
    try:
        found = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file} is not a commit record ({error}); {remedy}") from None
    record = checked(Record, found, file, remedy)
    start, stop = record["rows"]
    return Commit(record["identity"], record["unit"], (start, stop), record["tokens_crc32c"], record["shards"])


def write(place: Place, record: Commit) -> None:
    """Commit a unit whose files are written. Another capture may have done so a moment ago, with the same bytes."""
    name, content = record_file(record.unit), json.dumps(vars(record), sort_keys=True).encode()
    if not place.create(name, content) and place.read(name) != content:
        raise UserError(
            f"{place}: unit {record.unit} was committed by another capture at the same time, with other content; "
            "let one capture of this store run at a time, and run it again"
        )


def refuse_other_rows(place: Place, record: Commit, rows: tuple[int, int]) -> None:
    """Raise UserError for a record that a shorter capture made while the store was growing."""
    if record.rows != rows:
        raise UserError(
            f"{place}/{record_file(record.unit)} is of rows {record.rows}, not {rows}: it was written while the store "
            "grew; delete it and re-run the capture"
        )


def withdraw(place: Place, unit: int) -> None:
    """Undo a commit, before its unit is written anew."""
    place.delete(record_file(unit))


def checksum(content: bytes) -> FileFacts:
    """Size and CRC32C of a file."""
    return {"bytes": len(content), "crc32c": crc32c(content)}
