"""Processes that help this one, where threads would wait for Python's lock, and memory that is shared with them.

A helper is a function that a Python of its own imports. It ends when the process that started it does, however that
ends: it notices that the connection is closed. It is no fork, so it can be started beside a GPU, and imports only what
its function needs.
"""

import contextlib
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

ALIGNED = 4096
"""Arrays in shared memory begin at multiples of so many bytes: a page."""

PORTABLE = 1
"""CUDA's flag for memory that counts as pinned for every GPU."""


class HelperEndedError(RuntimeError):
    """A helper has ended by itself, or was killed."""


class Helper:
    """A process that answers requests one after another. Ask for few at a time: hundreds of unread answers block it."""

    def __init__(
        self, start: Callable[[Any], Callable[[Any], Any]], setup: Any, descriptors: Sequence[int] = ()
    ) -> None:
        """Start it, without waiting. There, `start(setup)` returns the function that answers requests; the file
        `descriptors` are open under the same numbers."""
        self._name = f"{start.__module__}.{start.__qualname__}"
        self._connection, there = Pipe()
        where = str(there.fileno()), start.__module__, start.__qualname__
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from skipcoder.helpers import serve; serve()", *where],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno(), *descriptors],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
        )
        there.close()
        self.ask(setup)

    def ask(self, request: Any) -> None:
        """Send a request; `answer` gives the answers in order."""
        with contextlib.suppress(ConnectionError):  # `answer` will say why
            self._connection.send(request)

    def answer(self) -> Any:
        """Wait for the next answer, or raise what was raised there."""
        try:
            answer = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            raise HelperEndedError(f"the helper process {self._name} has ended (exit code {code})") from None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        """End it; what it is doing is not finished."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


def serve() -> None:
    """What a helper runs: answer requests until the other side closes."""
    for signum in (signal.SIGINT, signal.SIGTERM):  # meant for the process that started this one
        signal.signal(signum, signal.SIG_IGN)
    descriptor, module, name = sys.argv[1:]
    connection = Connection(int(descriptor))
    with contextlib.suppress(EOFError, ConnectionError):
        setup = connection.recv()
        try:
            answer = getattr(import_module(module), name)(setup)
        except Exception as error:
            return connection.send(_noted(error))
        while True:
            request = connection.recv()
            try:
                answered = answer(request)
            except Exception as error:
                answered = _noted(error)
            try:
                connection.send(answered)
            except (TypeError, AttributeError, pickle.PicklingError):  # an error that cannot be pickled
                connection.send(RuntimeError(f"in a helper process: {answered!r}"))


def _noted(error: Exception) -> Exception:
    error.add_note("in a helper process:\n" + traceback.format_exc())
    return error


class SharedArrays:
    """Named arrays in one piece of shared memory, zero at first. It is gone with the last process that holds it: it has
    no name that could be left over, and /dev/shm, which is small in containers, is not used.

    A helper makes its own from the same `specs` and the `descriptor` that it was given.
    """

    def __init__(self, specs: Mapping[Any, tuple[Sequence[int], Any]], descriptor: int | None = None) -> None:
        """`specs`: (shape, dtype) of each array."""
        starts, size = {}, 0
        for name, (shape, dtype) in specs.items():
            starts[name] = size
            size += -(-math.prod(shape) * np.dtype(dtype).itemsize // ALIGNED) * ALIGNED
        self.descriptor = _reserve(size) if descriptor is None else descriptor
        self._closing: list[Callable[[], Any]] = [weakref.finalize(self, os.close, self.descriptor)]
        memory = mmap.mmap(self.descriptor, size)
        whole = np.frombuffer(memory, np.uint8)
        self._address, self._size = whole.ctypes.data, size
        self.arrays = {
            name: np.ndarray(shape, dtype, memory, offset=starts[name]) for name, (shape, dtype) in specs.items()
        }

    def pin(self) -> None:
        """Keep the memory in its place, so that a GPU copies from it and to it by itself, until `close`."""
        import torch

        cuda: Any = torch.cuda.cudart()
        if result := int(cuda.cudaHostRegister(self._address, self._size, PORTABLE)):
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device="cuda")  # takes note of the error, which would else be the next kernel's
            warnings.warn(f"memory could not be pinned (CUDA error {result}): copies will be slow", stacklevel=2)
            return
        unpin = weakref.finalize(self, cuda.cudaHostUnregister, self._address)
        unpin.atexit = False
        self._closing.insert(0, unpin)

    def close(self) -> None:
        """Let go of the memory as soon as nobody holds an array of it; no copy may be under way."""
        self.arrays = {}
        for let_go in self._closing:
            let_go()


def _reserve(size: int) -> int:
    """A descriptor of memory without a name."""
    with contextlib.ExitStack() as stack:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("skipcoder")
        else:  # macOS
            descriptor = os.dup(stack.enter_context(tempfile.TemporaryFile()).fileno())
    os.ftruncate(descriptor, size)
    return descriptor
