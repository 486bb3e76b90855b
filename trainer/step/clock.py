"""Measure where the time of a step goes, without making anything wait."""

import time
from typing import Any

import torch


class Clock:
    """`start()` begins a step, `lap(name)` ends a phase; `read()` gives the mean milliseconds per step of each phase
    since the last reading. On CUDA the marks are events on the stream, which only `read` looks at."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.marks: list[tuple[str | None, Any]] = []

    def start(self) -> None:
        """Begin a step."""
        self.lap(None)

    def lap(self, name: str | None) -> None:
        """End the phase `name`, which began at the last mark."""
        if self.cuda and torch.cuda.is_current_stream_capturing():
            return  # a graph's phases cannot be told apart
        if not self.cuda:
            self.marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def read(self) -> dict[str, float]:
        """Return {phase: mean ms per step}."""
        if self.cuda:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            if name is not None:
                took = before.elapsed_time(after) if self.cuda else 1e3 * (after - before)
                totals[name] = totals.get(name, 0.0) + took
        steps = max(sum(name is None for name, _ in self.marks), 1)
        self.marks.clear()
        return {name: round(total / steps, 3) for name, total in totals.items()}
