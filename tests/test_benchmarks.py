"""The scripts that need a GPU, or only compilers for one, work here as far as they can."""

import os
import subprocess
import sys

import pytest

from tests.conftest import REPO


def run(*args: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(REPO / "benchmarks" / args[0]), *args[1:]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.cli
def test_every_kernel_compiles_for_three_gpus_without_spills_and_with_wide_loads() -> None:
    rows = [line.split(" | ") for line in run("compile_report.py").splitlines() if " | sm_" in line or " | gfx" in line]
    assert len(rows) == 6 * 2 * 5 * 3  # kernels, dtypes, widths, targets
    assert {row[5] for row in rows} == {"0"}
    assert {row[7].strip(" |") for row in rows} == {"yes"}


@pytest.mark.cli
def test_gpu_check_is_complete() -> None:
    text = run("gpu_check.py", "--device", "cpu", "--tiny", "--rounds", "1")
    for operation in ("encode", "decode", "backward", "step"):
        assert f"| {operation} | ours" in text
