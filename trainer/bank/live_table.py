"""Show the members of a bank in one live table; without a terminal, print a line for every tenth of the way."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

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
    total, printed = sum(member.steps for member in members), 0

    def show() -> None:
        nonlocal printed
        done = sum(member.done for member in members)
        if done * 10 // total > printed:
            printed = done * 10 // total
            fvu = "  ".join(f"{member.last['fvu']:.4f}" for member in members if member.last)
            print(
                f"{members[0].label}{_more(members)}: {done:,}/{total:,} steps  fvu {fvu}", file=sys.stderr, flush=True
            )

    yield show


def _more(members: Sequence[Member]) -> str:
    return f" and {len(members) - 1} more" if len(members) > 1 else ""


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
    seconds = int(left * last["seconds"] / last["step"])
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
