"""The scripts that need a GPU, or only compilers for one, work here as far as they can."""

import os
import re
import subprocess
import sys
from itertools import product

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
    lines = run("compile_report.py").splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if " | sm_" in line or " | gfx" in line]
    sources = "".join(file.read_text() for file in (REPO / "kernels" / "gpu").glob("*.py"))
    kernels = set(re.findall(r"^def (\w+)_kernel\(", sources, re.MULTILINE))
    assert {tuple(row[:3]) for row in rows} == set(product(kernels, ("fp32", "bf16"), ("sm_80", "sm_90", "gfx942"))) - {
        ("quantise", dtype, "sm_80") for dtype in ("fp32", "bf16")
    }  # which has no 8-bit floats
    assert {row[4] for row in rows} == {"0"}
    assert {row[0] for row in rows if row[6] != "yes"} <= {"rank", "two"}  # a few numbers a token; groups of a few


@pytest.mark.cli
def test_gpu_check_is_complete() -> None:
    text = run("gpu_check.py", "--device", "cpu", "--tiny", "--rounds", "1", "--queued", "1")
    for line in (
        "- relative errors",
        "| ours (",
        "| bare bf16 product |",
        "| jumprelu |",
        "Eight coders:",
        "An eager step, ",
    ):
        assert line in text
