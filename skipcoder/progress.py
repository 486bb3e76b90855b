"""Progress of long work: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int, unit: str = "tokens") -> Iterator[Callable[..., None]]:
    """Show a live bar on a terminal, else a plain line for every tenth. Yield `advance(n, **facts)`."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("{task.fields[facts]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=total, facts="")
        done, printed, begun = 0, 0, time.perf_counter()

        def advance(n: int, **facts: object) -> None:
            nonlocal done, printed
            done += n
            text = "  ".join(f"{key} {value}" for key, value in facts.items())
            bar.update(task, completed=done, facts=text)
            if not console.is_terminal and done * 10 // total > printed:
                printed = done * 10 // total
                left = (time.perf_counter() - begun) * (total - done) / done
                line = f"{label}: {done:,}/{total:,} {unit}, {duration(left)} left  {text}"
                print(line.rstrip(), file=sys.stderr, flush=True)

        yield advance


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725.4)
    '1:02:05'
    """
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
