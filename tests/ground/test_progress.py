"""Progress without a terminal: few lines, each with its label and the time left."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

from skipcoder.progress import progress
from skipcoder.trainer.bank.live_table import live_table


def test_a_line_for_every_tenth_says_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    with progress("capture", 1000) as advance:
        for _ in range(100):
            advance(10, speed="fast")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"capture: 100/1,000 tokens, 0:00:0\d left  speed fast", lines[0])
    assert lines[-1].startswith("capture: 1,000/1,000 tokens, 0:00:00 left")


def test_training_names_the_least_and_the_largest_fvu(capsys: pytest.CaptureFixture[str]) -> None:
    members: Any = [
        SimpleNamespace(steps=10, done=0, last=None, label=label) for label in ("sae k=4", "transcoder k=4", "sae k=8")
    ]
    with live_table(members, {}) as show:
        for step in range(1, 11):
            for place, member in enumerate(members):
                member.done, member.last = step, {"fvu": 0.1 * (3 - place)}
            show()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"training: 3/30 steps, 0:00:0\d left  FVU 0.1000 \(sae k=8\) to 0.3000 \(sae k=4\)", lines[0])
