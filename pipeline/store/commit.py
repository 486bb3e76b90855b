"""Commit records: the one place that says which units of a store exist.

A record is a small JSON file, `commits/<unit>.json`, created last and in one step. It names no time, host or attempt,
so the same unit always has the same record.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Len
from crc32c import crc32c
from safetensors import SafetensorError
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.stats import Moments, merge_all, pack, unpack
from skipcoder.records import checked

INDEX, INDEXED_FROM = "commits.json", 256
"""Name of the index of records, and the number of units from which there is one."""

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
    return {int(stem) for stem, _ in _records(place)}


def _records(place: Place) -> Iterator[tuple[str, int]]:
    """Stem and size of every record."""
    for name, size in place.sizes("commits").items():
        stem = name.removeprefix("commits/").removesuffix(".json")
        if stem.isdigit():  # not zarr.json or a partial file
            yield stem, size


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


def read_all(place: Place, derived: Place, identity: str) -> dict[int, Commit]:
    """Read the record of every unit, in unit order. Of a store with many they are kept in one file beside it, an index,
    and then only those are read that the index lacks or knows with another size; an index that is damaged or of another
    identity is ignored."""
    sizes = {int(stem): size for stem, size in _records(place)}
    known = _read_index(derived, identity) if len(sizes) >= INDEXED_FROM else {}
    found = {unit: known[unit][1] for unit, size in sizes.items() if unit in known and known[unit][0] == size}
    others = sorted(sizes.keys() - found.keys())
    with ThreadPoolExecutor(place.parallel) as pool:
        found |= dict(zip(others, pool.map(lambda unit: read(place, unit), others), strict=True))
    if others and len(sizes) >= INDEXED_FROM:
        content = json.dumps([[sizes[unit], vars(record)] for unit, record in sorted(found.items())]).encode()
        with suppress(OSError, UserError):  # not writable, as beside a shared store
            derived.write(INDEX, f"{crc32c(content)} {identity}\n".encode() + content)
    return dict(sorted(found.items()))


def _read_index(derived: Place, identity: str) -> dict[int, tuple[int, Commit]]:
    """Unit -> the size of its record, and the record."""
    with suppress(OSError, ValueError):
        head, _, content = derived.read(INDEX).partition(b"\n")
        if head == f"{crc32c(content)} {identity}".encode():
            return {
                facts["unit"]: (size, Commit(**facts | {"rows": tuple(facts["rows"])}))
                for size, facts in json.loads(content)
            }
    return {}


def forget_index(derived: Place) -> None:
    """Remove the index before records are replaced: a new one may have the size of the old."""
    with suppress(OSError, UserError):
        derived.delete(INDEX)


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


def checksum(*pieces: bytes | memoryview) -> FileFacts:
    """Size and CRC32C of a file made of these pieces."""
    value = 0
    for piece in pieces:
        value = crc32c(piece, value)
    return {"bytes": sum(map(len, pieces)), "crc32c": value}


def merged_statistics(
    place: Place,
    derived: Place,
    content: str,
    hookpoint: str,
    records: Sequence[Commit],
    names: Sequence[str],
    merged: Moments,
) -> Moments:
    """These statistics of these units, merged into `merged` in order, once: the result is kept in `derived`. `content`:
    the hash of the store's."""
    key = json.dumps([content, [record.unit for record in records], hookpoint, names])
    file = f"moments-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # missing or damaged: merge again
        return unpack(derived.read(file))["merged"]
    at_once = 4 * place.parallel  # a unit's statistics may take hundreds of kilobytes
    with ThreadPoolExecutor(place.parallel) as pool:
        for some in (records[i : i + at_once] for i in range(0, len(records), at_once)):
            read = pool.map(lambda record: read_statistics(place, hookpoint, record), some)
            merged = merge_all((found[name] for found in read for name in names), merged)
    with suppress(OSError, UserError):  # not writable, as beside a shared store
        derived.write(file, pack({"merged": merged}))
    return merged
