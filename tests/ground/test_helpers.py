"""Helper processes and the memory that is shared with them."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from skipcoder.errors import UserError
from skipcoder.helpers import Helper, SharedArrays
from tests.conftest import REPO
from tests.ground.echo import start


def test_answers_come_in_order_and_errors_as_they_were() -> None:
    helper = Helper(start, {})
    for request in (1, "interrupt", None):  # what a terminal sends to all is for the process that started it
        helper.ask(request)
    assert [helper.answer() for _ in range(3)] == [1, "interrupt", None]
    helper.ask("refuse")
    with pytest.raises(UserError, match="refused; do otherwise") as caught:
        helper.answer()
    assert "in a helper process:" in caught.value.__notes__[0]
    helper.ask("full")
    with pytest.raises(OSError, match="some file") as full:
        helper.answer()
    assert full.value.errno == errno.ENOSPC
    helper.ask(2)
    assert helper.answer() == 2  # it goes on
    helper.close()


def test_a_failed_start_is_said_at_the_first_answer() -> None:
    helper = Helper(start, {"fail": "no such store"})
    helper.ask(1)
    with pytest.raises(UserError, match="no such store"):
        helper.answer()
    helper.close()


def test_a_helper_that_was_killed_is_named() -> None:
    helper = Helper(start, {})
    helper.ask(1)
    assert helper.answer() == 1
    os.kill(helper._process.pid, signal.SIGKILL)
    helper._process.wait()
    helper.ask(2)
    with pytest.raises(RuntimeError, match=r"helper process tests.ground.echo.start has ended \(exit code -9\)"):
        helper.answer()
    helper.close()


def test_a_helper_ends_with_the_process_that_started_it() -> None:
    code = "import time; from skipcoder.helpers import Helper; from tests.ground.echo import start; "
    code += "h = Helper(start, {}); h.ask(1); h.answer(); print(h._process.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=REPO, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        helper = int(starter.stdout.readline())
        assert _runs(helper)
        starter.kill()
    deadline = time.monotonic() + 30
    while _runs(helper):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")  # nobody waits for it


def test_memory_is_shared_and_let_go() -> None:
    specs = {"a": ((3,), "uint8"), "b": ((2, 5), "float32"), ("none", 1): ((0, 4), "int64")}
    shared = SharedArrays(specs)
    descriptor = shared.descriptor
    assert all(not z.any() and z.shape == specs[name][0] for name, z in shared.arrays.items())
    helper = Helper(start, {"specs": specs, "descriptor": descriptor}, [descriptor])
    for _ in range(2):
        helper.ask(1)
        helper.answer()
    helper.close()
    np.testing.assert_array_equal(shared.arrays["b"], [[0] * 5, [2] * 5])
    assert not shared.arrays["a"].any()
    shared.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
