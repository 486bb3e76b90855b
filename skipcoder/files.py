"""Files that are whole or absent, also after a power cut, and what to say of a full disk."""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from skipcoder.errors import UserError

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)

PARTIAL = re.compile(r"\..+\.\d+-\d+\.partial")
"""What `partial_file` names its files."""


def write_atomically(path: Path, content: bytes | Callable[[BinaryIO], object]) -> None:
    """Write (or let `content` write), sync and rename: the file is whole or absent, also after a power cut."""
    make_folder(path.parent)
    with partial_file(path, content if callable(content) else lambda file: file.write(content)) as partial:
        partial.replace(path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """With its parents, which are on the disk then."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


@contextlib.contextmanager
def partial_file(path: Path, write: Callable[[BinaryIO], object]) -> Iterator[Path]:
    """A finished file beside `path`, which is gone in the end."""
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
    """Bring the names of a folder's files to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def no_space(error: OSError) -> str:
    """What to say of a full disk."""
    return f"no space left on the disk ({error.filename or 'unknown file'}); free some and run again"


def refuse_full(path: Path, key: str) -> None:
    """UserError where a folder that is to be made is there already, with something in it."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{key}={path} is not empty; choose another folder, or delete it")
