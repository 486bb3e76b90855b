"""Run a generator in a thread of its own, one item ahead of its consumer."""

import queue
import threading
from collections.abc import Generator
from contextlib import closing
from typing import Any, TypeVar

T = TypeVar("T")


def ahead(items: Generator[T]) -> Generator[T]:
    """Yield the items; exceptions of the generator are raised here."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=1)
    stop = threading.Event()
    end = object()

    def put(item: object) -> bool:
        while not stop.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            with closing(items):
                for item in items:
                    if not put(item):
                        return
            put(end)
        except BaseException as error:
            put(error)

    thread = threading.Thread(target=work, daemon=True, name="activation-stream")
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
