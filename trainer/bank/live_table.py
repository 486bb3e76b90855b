"""Show the members of a bank in one live table; without a terminal, print a line for every tenth of the way."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from skipcoder.progress import duration
from skipcoder.trainer.bank.member import Member
from skipcoder.trainer.run.run import MetricsLine


@contextmanager
def live_table(members: Sequence[Member], outcomes: Mapping[Path, Any]) -> Iterator[Callable[[], None]]:
    """Yield `show()`, to be called after every step. `outcomes`: by directory, filled in as runs end."""
    console = Console(stderr=True)
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2, get_renderable=lambda: _render(members, outcomes)):
            yield lambda: None
        return
    total, printed, begun = sum(member.steps for member in members), 0, time.perf_counter()
    before = sum(member.done for member in members)

    def show() -> None:
        nonlocal printed
        done = sum(member.done for member in members)
        if done * 10 // total > printed:
            printed = done * 10 // total
            left = duration((time.perf_counter() - begun) / max(done - before, 1) * (total - done))
            print(f"training: {done:,}/{total:,} steps, {left} left  {_fvu(members)}", file=sys.stderr, flush=True)

    yield show


def _fvu(members: Sequence[Member]) -> str:
    """The FVU of one coder, or the least and the largest of several."""
    found = sorted((member.last["fvu"], member.label) for member in members if member.last)
    ends = found if len(found) < 2 else [found[0], found[-1]]
    return "FVU " + " to ".join(f"{fvu:.4f} ({label})" for fvu, label in ends) if ends else ""


def _render(members: Sequence[Member], outcomes: Mapping[Path, Any]) -> Table:
    grid = Table(box=None, pad_edge=False)
    for name in ("run", "coder", "step", "FVU", "dead", "ms/step", "left"):
        grid.add_column(name, justify="left" if name in ("run", "coder") else "right")
    for member in members:
        last, step = member.last, f"{member.done}/{member.steps}"
        if member.directory in outcomes and outcomes[member.directory].error is not None:
            facts = ["failed"]
        elif last:
            facts = [f"{last['fvu']:.4f}", str(last["dead"]), f"{sum(last['ms'].values()):.0f}", _left(member, last)]
        else:
            facts = []
        grid.add_row(member.directory.name, member.label, step, *facts)
    return grid


def _left(member: Member, last: MetricsLine) -> str:
    left = member.steps - member.done
    return duration(left * last["seconds"] / last["step"])
