"""The work of a stream on a GPU: copies, decoding and gathering, in a queue of their own beside the training step's."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Mark = torch.cuda.Event | None
"""A place in a lane; on a CPU, None."""


class Lane:
    """A queue on a device; on a CPU, nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._queue = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> AbstractContextManager[Any]:
        """Context in which what this thread asks of the device goes into the queue."""
        return nullcontext() if self._queue is None else torch.cuda.stream(self._queue)

    def settle(self) -> None:
        """Make the device that of the calling thread, which begins with the first one."""
        if self._queue is not None:
            torch.cuda.set_device(self.device)

    def wait(self) -> None:
        """Wait for the end of what has been asked so far."""
        if self._queue is not None:
            self._queue.synchronize()

    def mark(self) -> Mark:
        """Mark the end of what has been asked so far."""
        return None if self._queue is None else self._queue.record_event(torch.cuda.Event(blocking=True))

    def after(self, mark: Mark) -> None:
        """Let what is asked from now on wait until the device has come to a mark in another queue."""
        if mark is not None and self._queue is not None:
            self._queue.wait_event(mark)

    def hand_over(self, mark: Mark, tensors: Iterable[Tensor]) -> None:
        """Let the caller's own queue use tensors that were made here, as soon as the device has come to the mark."""
        if mark is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(mark)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(current)  # their memory is not used again before the caller is done
