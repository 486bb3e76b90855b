"""Where a store's files lie: a directory, or a prefix of an object store (`s3://bucket/x.zarr`, `gs://...`).

Both keep the same promises, and all that writes a store rests on them:

- `write` leaves the whole file, on the disk, or the one that was there before; also after a power cut.
- `create` does so only where no such file is, and of several that try at once one succeeds.

Files are named relative to the place, with `/` between folders.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from skipcoder import files
from skipcoder.errors import UserError


class Place(ABC):
    """A folder of files; `str` gives its path or address."""

    parallel: int
    """How many reads are worth having under way at once."""

    @property
    def stem(self) -> str:
        """`x` of `some/where/x.zarr`."""
        return str(self).rsplit("/", 1)[-1].removesuffix(".zarr")

    @abstractmethod
    def read(self, name: str) -> bytes:
        """A whole file; FileNotFoundError where there is none."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> np.ndarray:
        """Bytes of a file, read-only, valid until this thread's next call; a negative `start` counts from the end.
        Fewer where the file ends."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Replace a file, or make it."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Make a file; False, and nothing changes, where there is one."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of every file in a folder and below, by name."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether nothing is there."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is such a file."""

    @property
    @abstractmethod
    def address(self) -> str:
        """What finds it from any working directory."""

    @property
    @abstractmethod
    def parent(self) -> "Place":
        """The folder that this place lies in."""

    @abstractmethod
    def neighbours(self) -> list["Place"]:
        """What else ends in .zarr where this place is."""

    @abstractmethod
    def zarr(self) -> Any:
        """What zarr opens."""

    @abstractmethod
    def only_writer(self) -> contextlib.AbstractContextManager[bool]:
        """Keep a second capture away; False where that cannot be done."""

    def clear(self) -> None:
        """Remove every file. For who is the only writer."""
        raise NotImplementedError

    def sweep(self) -> None:  # noqa: B027 (most places have nothing to sweep)
        """Remove what writers that were killed in the middle of a file left. For who is the only writer."""


class Directory(Place):
    """A directory of a local or shared file system."""

    parallel = 2
    _local = threading.local()

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> np.ndarray:
        scratch = self._scratch(length)
        with (self.path / name).open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size + start, 0) if start < 0 else start)
            read = file.readinto(scratch.data)
        scratch.flags.writeable = False
        return scratch[:read]

    def _scratch(self, size: int) -> np.ndarray:
        """Memory of this thread, used again: the first touch of fresh memory costs as much as reading."""
        if len(getattr(self._local, "memory", ())) < size:
            self._local.memory = np.empty(size, np.uint8)
        result: np.ndarray = self._local.memory[:size]
        return result

    def write(self, name: str, content: bytes) -> None:
        files.write_atomically(self.path / name, content)

    def create(self, name: str, content: bytes) -> bool:
        files.make_folder((self.path / name).parent)
        with files.partial_file(self.path / name, lambda file: file.write(content)) as partial:
            try:
                os.link(partial, self.path / name)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
                    raise
                if (self.path / name).exists():  # no hard links here: next to at once is the best there is
                    return False
                partial.replace(self.path / name)
        files.sync((self.path / name).parent)
        return True

    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()
            files.sync((self.path / name).parent)

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        for at, _, names in os.walk(self.path / folder):
            for name in names:
                file = os.path.join(at, name)
                with contextlib.suppress(FileNotFoundError):
                    found[os.path.relpath(file, self.path)] = os.stat(file).st_size
        return found

    def is_empty(self) -> bool:
        return not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir()))

    def exists(self, name: str) -> bool:
        return (self.path / name).is_file()

    @property
    def address(self) -> str:
        return str(self.path.resolve())

    @property
    def parent(self) -> Place:
        return Directory(self.path.absolute().parent)

    def neighbours(self) -> list[Place]:
        return [Directory(p) for p in sorted(self.path.parent.glob("*.zarr")) if p != self.path]

    def zarr(self) -> Any:
        return self.path

    @contextlib.contextmanager
    def only_writer(self) -> Iterator[bool]:
        """The lock lies beside the store and goes with the process, however that ends."""
        lock = self.path.with_name(f".{self.path.name}.lock")
        files.make_folder(lock.parent)
        with contextlib.ExitStack() as stack:
            try:
                while True:
                    file = stack.enter_context(lock.open("w"))
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if lock.exists() and os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                        break  # else its last holder removed it between the two steps
            except BlockingIOError:
                raise UserError(f"another capture is at work on {self}; wait for it, or stop it") from None
            except OSError:  # a file system without locks
                yield False
                return
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)

    def clear(self) -> None:
        """What tells that this is a store goes last."""
        for child in sorted(self.path.iterdir(), key=lambda child: child.name == "zarr.json"):
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    def sweep(self) -> None:
        for partial in self.path.rglob("*.partial"):
            if files.PARTIAL.fullmatch(partial.name):
                partial.unlink(missing_ok=True)
