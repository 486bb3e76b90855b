"""Where a store's files lie: a directory, or a prefix of an object store (`s3://bucket/x.zarr`, `gs://...`).

Both give the same guarantees, on which everything that writes a store relies:

- `write` leaves the whole file on disk, or the previous one; even after a power cut.
- `create` does so only if no such file exists, and of several that try at once one succeeds.

Files are named relative to the place, with `/` between folders.
"""

import contextlib
import errno
import fcntl
import os
import resource
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
    """Number of reads worth running at the same time."""

    @property
    def stem(self) -> str:
        """`x` of `some/where/x.zarr`."""
        return str(self).rsplit("/", 1)[-1].removesuffix(".zarr")

    @abstractmethod
    def read(self, name: str) -> bytes:
        """Read a whole file; FileNotFoundError if there is none."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> np.ndarray:
        """Read bytes of a file, fewer if it ends before; a negative `start` counts from the end. The array is read-only
        and valid until this thread's next call."""

    def read_into(self, name: str, start: int, *buffers: memoryview) -> bool:
        """Fill one buffer of bytes after another; False if the file ends before they are full."""
        found = self.read_range(name, start, sum(map(len, buffers)))
        at = 0
        for buffer in buffers:
            part = found[at : at + len(buffer)].data
            buffer[: len(part)] = part
            at += len(buffer)
        return len(found) == at

    @abstractmethod
    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        """Create or replace a file, of these pieces."""

    @abstractmethod
    def create(self, name: str, content: bytes) -> bool:
        """Create a file; if it exists, change nothing and return False."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file if it exists."""

    @abstractmethod
    def sizes(self, folder: str = "") -> dict[str, int]:
        """Size in bytes of every file in a folder and below, by name."""

    @abstractmethod
    def is_empty(self) -> bool:
        """Whether the place is empty."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether a file exists."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Path or address that is valid from any working directory."""

    @property
    @abstractmethod
    def parent(self) -> "Place":
        """The folder that this place lies in."""

    @abstractmethod
    def neighbours(self) -> list["Place"]:
        """The other places in the same folder that end in .zarr."""

    @abstractmethod
    def zarr(self) -> Any:
        """The path or store that zarr opens."""

    @abstractmethod
    def only_writer(self) -> contextlib.AbstractContextManager[bool]:
        """Keep a second capture out; yield False if that is impossible."""

    def clear(self) -> None:
        """Remove every file; call only as the sole writer."""
        raise NotImplementedError

    def sweep(self) -> None:  # noqa: B027 (most places have nothing to sweep)
        """Remove the partial files of writers that were killed; call only as the sole writer."""


_ALLOWED = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
KEPT_OPEN = min(256, _ALLOWED // 8) if _ALLOWED > 0 else 256
"""Files of a directory that are kept open for reading: a share of those that this process may open."""


class _OpenFile:
    """A file descriptor that is closed when nobody holds it any more."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


class Directory(Place):
    """A directory of a local or shared file system."""

    parallel = 2
    _local = threading.local()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: dict[str, _OpenFile] = {}

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> np.ndarray:
        scratch = self._scratch(length)
        file = self._opened(name)
        if start < 0:
            start = max(os.fstat(file.descriptor).st_size + start, 0)
        read = os.preadv(file.descriptor, [scratch.data], start)
        scratch.flags.writeable = False
        return scratch[:read]

    def _scratch(self, size: int) -> np.ndarray:
        """Reuse this thread's memory: the first touch of fresh memory costs as much as reading."""
        if len(getattr(self._local, "memory", ())) < size:
            self._local.memory = np.empty(size, np.uint8)
        result: np.ndarray = self._local.memory[:size]
        return result

    def read_into(self, name: str, start: int, *buffers: memoryview) -> bool:
        file = self._opened(name)
        return os.preadv(file.descriptor, buffers, start) == sum(map(len, buffers))

    def _opened(self, name: str) -> "_OpenFile":
        """A file, kept open for the next reads of it: a shard is read in many pieces, and threads that read wait for
        each other at every call into the system."""
        file = self._open.get(name)
        if file is None:
            if len(self._open) >= KEPT_OPEN:
                self._open.clear()  # those in use are closed when they are let go
            file = self._open[name] = _OpenFile(f"{self.path}/{name}")
        return file

    def write(self, name: str, *pieces: bytes | memoryview) -> None:
        self._open.pop(name, None)
        files.write_atomically(self.path / name, lambda file: files.write_all(file.fileno(), pieces))

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
                if (self.path / name).exists():  # no hard links here: this is as near to atomic as it gets
                    return False
                partial.replace(self.path / name)
        files.sync((self.path / name).parent)
        return True

    def delete(self, name: str) -> None:
        self._open.pop(name, None)
        with contextlib.suppress(FileNotFoundError):
            (self.path / name).unlink()
            files.sync((self.path / name).parent)

    def sizes(self, folder: str = "") -> dict[str, int]:
        found = {}
        for at, _, names in os.walk(self.path / folder):
            inside = os.path.relpath(at, self.path)
            prefix = "" if inside == "." else f"{inside}/"
            for name in names:
                with contextlib.suppress(FileNotFoundError):
                    found[prefix + name] = os.stat(f"{at}/{name}").st_size
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
        """Hold a lock beside the store; it is released when the process ends, however that happens."""
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
        """Remove zarr.json, which marks it as a store, last."""
        for child in sorted(self.path.iterdir(), key=lambda child: child.name == "zarr.json"):
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()

    def sweep(self) -> None:
        for partial in self.path.rglob("*.partial"):
            if files.PARTIAL.fullmatch(partial.name):
                partial.unlink(missing_ok=True)
