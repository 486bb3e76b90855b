"""Commit records: the one place that says which units of a store exist.

A record is a small JSON file, `commits/<unit>.json`, written last and atomically. It names no time, host
or attempt, so the same unit always has the same record.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from google_crc32c import value as crc32c
from safetensors import SafetensorError
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.stats import Moments, unpack

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


def path_of(store: Path, unit: int) -> Path:
    """File of a unit's record."""
    return store / "commits" / f"{unit:08d}.json"


def statistics_file(hookpoint: str, unit: int) -> str:
    """File of a unit's statistics, relative to the store."""
    return f"statistics/{hookpoint}/{unit:08d}.safetensors"


def read_statistics(store: Path, hookpoint: str, record: Commit) -> dict[str, Moments]:
    """`<side>/<class of positions>` -> moments. UserError names a file that is not what was written."""
    name = statistics_file(hookpoint, record.unit)
    try:
        content = (store / name).read_bytes()
        if crc32c(content) != record.shards[name]["crc32c"]:
            raise ValueError("its checksum does not match")
        return unpack(content)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        mend = f"delete {path_of(store, record.unit)} and re-run the capture to mend it"
        raise UserError(f"{store / name} cannot be read ({error}); {mend}") from None


def committed_units(store: Path) -> set[int]:
    """Units that have a record, by file name alone."""
    return {int(path.stem) for path in (store / "commits").glob("????????.json")}


def read(store: Path, unit: int) -> Commit:
    """Read one record. UserError names a file that does not parse."""
    path = path_of(store, unit)
    try:
        return Commit.from_json(json.loads(path.read_text()))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a commit record ({error}); delete it and re-run the capture") from None


def write(store: Path, record: Commit) -> None:
    """Commit a unit: its shards reach the disk first, then the record appears in one step."""
    for shard in record.shards:
        sync(store / shard)
        sync((store / shard).parent)
    write_atomically(path_of(store, record.unit), json.dumps(vars(record), sort_keys=True).encode())


def withdraw(store: Path, unit: int) -> None:
    """Undo a commit, before its unit is written anew."""
    path_of(store, unit).unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write (or let `content` write), sync and rename: the file is whole or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content) if isinstance(content, bytes) else content(file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


@contextlib.contextmanager
def only_writer(store: Path) -> Iterator[None]:
    """Hold the store against a second capture job. The lock lies beside the store and goes with the process, however
    that ends; on file systems without locks it holds nobody back."""
    store.parent.mkdir(parents=True, exist_ok=True)
    with store.with_name(f".{store.name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another capture is at work on {store}; wait for it, or stop it") from None
        except OSError:
            pass
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)


def remove_partials(store: Path) -> None:
    """Delete what writers killed in the middle of a file left behind."""
    for partial in store.rglob("*.partial"):
        partial.unlink(missing_ok=True)


def shard_checksum(path: Path) -> dict[str, int]:
    """Size and CRC32C of a file."""
    content = path.read_bytes()
    return {"bytes": len(content), "crc32c": crc32c(content)}


def sync(path: Path) -> None:
    """Bring a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
