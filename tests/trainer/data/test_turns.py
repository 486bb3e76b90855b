"""Works that give way to each other run in one order, and fail as one."""

import threading
from functools import partial

import pytest
import torch

from skipcoder.trainer.data.turns import give_way, in_turns


def test_two_are_under_way_and_one_runs() -> None:
    said: list[str] = []

    def work(name: str) -> str:
        for part in "123":
            said.append(f"{name}{part}")
            give_way()
        return name

    assert in_turns([partial(work, name) for name in "abcd"]) == list("abcd")
    assert said == ["a1", "b1", "a2", "b2", "a3", "b3", "c1", "d1", "c2", "d2", "c3", "d3"]


def test_alone_there_is_nobody_to_give_way_to() -> None:
    give_way()
    assert in_turns([lambda: threading.current_thread().name]) == [threading.current_thread().name]


def test_what_fails_ends_the_others() -> None:
    ended: list[str] = []

    def fails() -> None:
        give_way()
        raise ValueError("no")

    def waits() -> None:
        try:
            give_way()
            give_way()
        finally:
            ended.append("waits")

    before = threading.active_count()
    with pytest.raises(ValueError, match="no"):
        in_turns([waits, fails, fails])
    assert ended == ["waits"] and threading.active_count() == before


def test_gradients_are_made_in_threads_as_outside() -> None:
    weight = torch.ones(3, requires_grad=True)

    def work(factor: float) -> None:
        loss = (factor * weight).sum()
        give_way()
        loss.backward()

    in_turns([partial(work, factor) for factor in (1.0, 2.0, 4.0)])
    assert torch.equal(weight.grad, torch.full((3,), 7.0))  # type: ignore[arg-type]
