"""Commit records: the one place that says which units of a store exist.

A record is a small JSON file, `commits/<unit>.json`, created last and in one step. It names no time, host or attempt,
so the same unit always has the same record.
"""

import json
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from google_crc32c import value as crc32c
from safetensors import SafetensorError

from skipcoder.errors import UserError
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.stats import Moments, unpack

SIDES = ("input", "output")
POSITIONS = ("first", "special", "other")


@dataclass(frozen=True)
class Commit:
    """What a committed unit holds."""

    identity: str
    unit: int
    rows: tuple[int, int]
    tokens_crc32c: int
    shards: dict[str, dict[str, int]]
    """File, relative to the store -> {bytes, crc32c}: a shard of every array, and the unit's statistics."""

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Commit":
        """Inverse of `vars`."""
        return cls(**{**data, "rows": tuple(data["rows"])})


def record_file(unit: int) -> str:
    """File of a unit's record, relative to the store."""
    return f"commits/{unit:08d}.json"


def statistics_file(hookpoint: str, unit: int) -> str:
    """File of a unit's statistics, relative to the store."""
    return f"statistics/{hookpoint}/{unit:08d}.safetensors"


def read_statistics(place: Place, hookpoint: str, record: Commit) -> dict[str, Moments]:
    """`<side>/<class of positions>` -> moments. UserError names a file that is not what was written."""
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
    """Units that have a record, by file name alone."""
    stems = (PurePosixPath(name).stem for name in place.sizes("commits"))
    return {int(stem) for stem in stems if stem.isdigit()}  # not zarr.json, and no file in the making


def read(place: Place, unit: int) -> Commit:
    """Read one record. UserError names a file that does not parse."""
    name = record_file(unit)
    try:
        return Commit.from_json(json.loads(place.read(name)))
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place}/{name} is not a commit record ({error}); delete it and re-run the capture") from None


def write(place: Place, record: Commit) -> None:
    """Commit a unit whose files are written. Another capture may have done so a moment ago, with the same bytes."""
    name, content = record_file(record.unit), json.dumps(vars(record), sort_keys=True).encode()
    if not place.create(name, content) and place.read(name) != content:
        raise UserError(
            f"{place}: unit {record.unit} was committed by another capture at the same time, with other content; "
            "let one capture of this store run at a time, and run it again"
        )


def refuse_other_rows(place: Place, record: Commit, rows: tuple[int, int]) -> None:
    """UserError for a record that a shorter capture made while the store was growing."""
    if record.rows != rows:
        raise UserError(
            f"{place}/{record_file(record.unit)} is of rows {record.rows}, not {rows}: it was written while the store "
            "grew; delete it and re-run the capture"
        )


def withdraw(place: Place, unit: int) -> None:
    """Undo a commit, before its unit is written anew."""
    place.delete(record_file(unit))


def checksum(content: bytes) -> dict[str, int]:
    """Size and CRC32C of a file."""
    return {"bytes": len(content), "crc32c": crc32c(content)}
