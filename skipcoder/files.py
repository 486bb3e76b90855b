"""Write files that are whole or absent, even after a power cut; the message for a full disk."""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from skipcoder.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT)

PARTIAL = re.compile(r"\..+\.\d+-\d+\.partial")
"""Pattern of the names that `partial_file` gives its files."""


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write (or let `content` write), sync and rename: the file is whole or absent, even after a power cut."""
    make_folder(path.parent)
    with partial_file(path, content if callable(content) else lambda file: file.write(content)) as partial:
        partial.replace(path)
    sync(path.parent)


def write_all(descriptor: int, pieces: Sequence[bytes | memoryview]) -> None:
    """Write pieces one after another in as few system calls as will do: each lets another thread run, and comes back
    only when that one lets go."""
    left = [memoryview(piece).cast("B") for piece in pieces if len(piece)]
    while left:
        written = os.writev(descriptor, left[:1024])
        while left and written >= len(left[0]):
            written -= len(left.pop(0))
        if left:
            left[0] = left[0][written:]


def make_folder(path: Path) -> None:
    """Create a folder and its parents, synced to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextlib.contextmanager
def partial_file(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """Yield a finished temporary file beside `path`; remove it on exit."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def sync(folder: Path) -> None:
    """Sync the names of a folder's files to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def explained(error: OSError) -> str | None:
    """The message for a full disk, or for a place that cannot be used; None for any other error."""
    if error.errno in DISK_FULL:
        return f"no space left on the disk ({error.filename or 'unknown file'}); free some and run again"
    if error.errno in _UNUSABLE and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno)}; name another place, or make it readable and writable"
    return None


def refuse_unwritable(folder: Path) -> None:
    """Make a folder, before work whose results will go there; raise what keeps a file from being written in it."""
    make_folder(folder)
    probe = folder / f".{os.getpid()}-{threading.get_ident()}.partial"
    probe.touch()
    probe.unlink()


def refuse_full(path: Path, key: str) -> None:
    """Raise UserError if `path` exists and is not an empty folder; `key` is the setting that names it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{key}={path} is not empty; choose another folder, or delete it")
