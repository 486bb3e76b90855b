"""Micro-batches in turns: while one waits for what other processes send, the next computes.

A micro-batch gives way wherever it has begun to exchange tensors. Two are under way at a time, each in a thread of its
own, and only one of these ever runs: what happens, and in which order, is the same every time and in every process.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
AT_ONCE = 2

_here = threading.local()


def give_way() -> None:
    """Let the next micro-batch run, if this is one of several."""
    turn: _Turn[Any] | None = getattr(_here, "turn", None)
    if turn is not None:
        turn.give_way()


def in_turns(works: Sequence[Callable[[], T]], at_once: int = AT_ONCE) -> list[T]:
    """Do all works, each of which may `give_way`, with `at_once` under way; return what they return. They end in their
    order if they give way equally often."""
    if len(works) == 1:
        return [works[0]()]
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    turns = [_Turn(work, stream) for work in works]
    coming, active = deque(turns), deque[_Turn[T]]()
    try:
        while coming or active:
            turn = coming.popleft() if coming and len(active) < at_once else active.popleft()
            if turn.run():
                active.append(turn)
    finally:
        for turn in active:  # after a failure
            turn.abandon()
    return [turn.result for turn in turns]


class _AbandonedError(BaseException):
    """Another micro-batch has failed."""


class _Turn(Generic[T]):
    """A work in a thread that runs when it is told to."""

    result: T

    def __init__(self, work: Callable[[], T], stream: torch.cuda.Stream | None) -> None:
        self._work, self._stream = work, stream
        self._may_run, self._rests = threading.Semaphore(0), threading.Semaphore(0)
        self._over = self._abandoned = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def run(self) -> bool:
        """Let it run until it gives way or ends; return whether it goes on. Raises what it raises."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._do, name="micro-batch", daemon=True)
            self._thread.start()
        self._may_run.release()
        self._rests.acquire()
        if self._error is not None:
            raise self._error
        return not self._over

    def give_way(self) -> None:
        """Called by the work itself."""
        self._rests.release()
        self._may_run.acquire()
        if self._abandoned:
            raise _AbandonedError

    def abandon(self) -> None:
        """End it."""
        self._abandoned = True
        if self._thread is not None:
            self._may_run.release()
            self._thread.join()

    def _do(self) -> None:
        self._may_run.acquire()
        _here.turn = self
        try:
            with torch.cuda.stream(self._stream):  # a thread has a device and a stream of its own; None: does nothing
                self.result = self._work()
        except _AbandonedError:
            pass
        except BaseException as error:
            self._error = error
        self._over = True
        self._rests.release()
