"""The quick start (docs/index.md) as it stands, with a wheel in an empty environment, in another directory."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.conftest import REPO

pytestmark = pytest.mark.slow
PAGE = (REPO / "docs" / "index.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.+?)```", PAGE, re.S)


def test_quick_start_from_an_installed_wheel(tmp_path: Path) -> None:
    dist, venv, anywhere = tmp_path / "dist", tmp_path / "venv", tmp_path / "anywhere"
    anywhere.mkdir()
    # Neither this environment's packages nor the checkout's folders are to be found.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON"))}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "PIP_CONSTRAINT": str(REPO / "constraints.txt"), "PIP_QUIET": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=anywhere, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--outdir", str(dist), str(REPO))
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    with tarfile.open(sdist) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    assert {name for name in tracked if not name.startswith(".")} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith(("build", "runs", "."))]

    run(sys.executable, "-m", "venv", str(venv))
    install, *steps = blocks("sh")
    assert "'.[demo]'" in install
    run("bash", "-euc", install.replace("'.[demo]'", f"'{wheel}[demo]'"))
    said = [run("bash", "-euc", step) for step in steps]
    assert "32,768 in 128 rows of 256" in said[1] and "layers.10.mlp" in said[1]
    rows = {row["kind"]: row for row in json.loads((anywhere / "runs" / "sweep" / "summary.json").read_text())}
    assert rows["skip_transcoder"]["fvu"] < rows["transcoder"]["fvu"] < 0.8
    for made in ("runs/sweep/report.html", "runs/sweep/1/features/index.html", "exported/skip/sae.safetensors"):
        assert (anywhere / made).is_file(), made
    (example,) = blocks("python")
    where = run("python", "-c", f"{example}\nimport skipcoder; print(tuple(y_hat.shape), skipcoder.__file__)")
    assert where.startswith("(512, 576)") and str(venv) in where
