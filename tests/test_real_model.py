"""The whole job on SmolLM2-135M: real weights, real text, a real Ray cluster.

It is done as the quick start (docs/index.md) says, word for word, with a wheel in an empty environment, in another
directory; what follows looks at what came out.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from skipcoder import ActivationStore
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.store.attrs import model_config
from tests.conftest import REPO

pytestmark = pytest.mark.slow
HOOKPOINT = "layers.10.mlp"
PAGE = (REPO / "docs" / "index.md").read_text()


def command(script: str, *args: str, cwd: Path | None = None) -> str:
    run = [sys.executable, str(REPO / script), *args]
    done = subprocess.run(run, cwd=cwd, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class QuickStart(NamedTuple):
    """What is left when the page has been followed."""

    folder: Path
    """Where the commands ran."""
    dist: Path
    venv: Path
    said: list[str]
    """What each block printed."""
    run: Callable[..., str]
    """Run a program in that environment; what it prints."""


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> QuickStart:
    path = tmp_path_factory.mktemp("real")
    folder, dist, venv = path / "anywhere", path / "dist", path / "venv"
    folder.mkdir()
    # Neither this environment's packages nor the checkout's folders are to be found.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "TRITON"))}
    env |= {"PATH": f"{venv / 'bin'}:{env['PATH']}", "PIP_CONSTRAINT": str(REPO / "constraints.txt"), "PIP_QUIET": "1"}

    def run(*words: str) -> str:
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "build", "--outdir", str(dist), str(REPO))
    run(sys.executable, "-m", "venv", str(venv))
    install, *steps = re.findall(r"```sh\n(.+?)```", PAGE, re.S)
    (wheel,) = dist.glob("*.whl")
    assert "'.[demo]'" in install
    run("bash", "-euc", install.replace("'.[demo]'", f"'{wheel}[demo]'"))
    return QuickStart(folder, dist, venv, [run("bash", "-euc", step) for step in steps], run)


@pytest.fixture(scope="module")
def folder(quick_start: QuickStart) -> Path:
    return quick_start.folder


def test_quick_start(quick_start: QuickStart) -> None:
    folder = quick_start.folder
    assert "32,768 in 128 rows of 256" in quick_start.said[1] and HOOKPOINT in quick_start.said[1]
    rows = {row["kind"]: row for row in json.loads((folder / "runs" / "sweep" / "summary.json").read_text())}
    assert all(row["fvu"] < 0.7 for row in rows.values())
    assert rows["skip_transcoder"]["fvu"] < rows["transcoder"]["fvu"]
    for row in rows.values():
        assert row["ce_clean"] < row["ce_spliced"] < row["ce_zero"] or row["ce_recovered_zero"] > 0.5
    for made in ("runs/sweep/report.html", "runs/sweep/2/features/index.html", "exported/skip/sae.safetensors"):
        assert (folder / made).is_file(), made
    for name in ("skipcoder-import", "skipcoder-interpret"):
        assert "Settings (key=value)" in quick_start.run(name, "--help")
    (example,) = re.findall(r"```python\n(.+?)```", PAGE, re.S)
    shown = quick_start.run("python", "-c", f"{example}\nimport skipcoder; print(*y_hat.shape, skipcoder.__file__)")
    assert shown.startswith("512 576 ") and str(quick_start.venv) in shown


def test_source_distribution_and_wheel_leave_nothing_out(quick_start: QuickStart) -> None:
    """Both hold real folders in place of the links in skipcoder/; the sdist holds the rest of the repository, too."""
    (sdist,), (wheel,) = quick_start.dist.glob("*.tar.gz"), quick_start.dist.glob("*.whl")
    with tarfile.open(sdist) as tar:
        of_sdist = {member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()}
    of_wheel = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout.split()
    links = {path.name for path in (REPO / "skipcoder").iterdir() if path.is_symlink()}
    for name in tracked:
        top, _, below = name.partition("/")
        if name.startswith(".") or (REPO / name).is_symlink():
            continue
        if name.startswith("trainer/hydra_plugins/"):
            assert name in of_sdist and below in of_wheel, name
        elif top in (*links, "skipcoder"):
            installed = name if top == "skipcoder" else f"skipcoder/{name}"
            assert installed in of_sdist and installed in of_wheel, name
        else:
            assert name in of_sdist, name
    assert not [n for n in of_sdist | of_wheel if "__pycache__" in n or n.startswith(("build", "runs", "."))]


def test_captured_bits_are_those_of_plain_hooks_on_the_whole_model(folder: Path) -> None:
    """The capture loads 11 of 30 layers and stops early; the reference is the full model, run to its end."""
    store = ActivationStore.open(folder / "stores" / "smollm2.zarr")
    lm: Any = model.load_causal_lm(model_config(store.attrs), "cpu")
    seen: dict[str, torch.Tensor] = {}
    lm.model.layers[10].mlp.register_forward_hook(
        lambda _, args, out: seen.update(input=args[0].flatten(0, 1), output=out.flatten(0, 1))
    )
    for unit in (0, 17, 63):
        start, stop = store.unit_range(unit)
        with torch.no_grad():
            lm(torch.from_numpy(store.tokens(unit)).long())
        index = store.read("index", start, stop).astype(np.int64) - start
        for side, reference in seen.items():
            assert reference.dtype == torch.bfloat16
            assert torch.equal(store.activations(HOOKPOINT, side, start, stop), reference[index])


@pytest.fixture
def judge() -> Iterator[str]:
    """A real server of the chat API; its base URL."""
    pytest.importorskip("xllamacpp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = REPO / "tests" / "evals" / "explain" / "llama_server.py"
    with subprocess.Popen([sys.executable, str(script), str(port)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            while not (line := server.stdout.readline()).startswith("http"):
                assert line or server.poll() is None, "the server did not start"
            yield f"{line.strip()}/v1"
        finally:
            server.kill()


def test_a_real_judge_explains_and_is_found_too_weak(folder: Path, judge: str) -> None:
    """SmolLM2 itself: everything runs, nothing is asked twice, and calibration says that it cannot judge."""
    run = folder / "runs" / "sweep" / "1"
    words = (
        *(f"run={run}", f"judge.base_url={judge}", "judge.model=smollm2", "judge.timeout=300", "judge.concurrency=2"),
        *("latents=2", "examples.train=5", "examples.test=5"),
    )
    said = command("evals/interpret.py", *words, cwd=folder)
    summary = json.loads((run / "interpretation" / "summary.json").read_text())
    assert summary["use"]["requests"] > 30 and summary["use"]["completion_tokens"] > 100
    assert summary["latents"] == 2
    assert not summary["calibration"]["usable"] and "WARNING: the judge smollm2 is unusable" in said
    if summary["explained"]:
        assert summary["detection"]["auroc"] is not None and 0 <= summary["detection"]["auroc"] <= 1
    assert 0 <= summary["calibration"]["auroc"] <= 1
    page = run / "features" / "index.html"
    assert page.exists() and (run / "features" / "data" / "latents-0.js").exists()
    if not summary["use"]["failures"]:
        command("evals/interpret.py", *words, cwd=folder)
        assert json.loads((run / "interpretation" / "summary.json").read_text())["use"]["requests"] == 0


def test_a_circuit_of_the_real_model(folder: Path) -> None:
    """With a coder in one of 30 layers, the others' MLPs as they are."""
    (folder / "set").mkdir()
    (folder / "set" / HOOKPOINT).symlink_to(folder / "runs" / "sweep" / "2")
    said = command(
        "evals/circuit.py", "run=set", "keep_missing=true", "prompt=The capital of France is", "out=circuit", cwd=folder
    )
    assert "nodes" in said and (folder / "circuit" / "index.html").exists()
    found = json.loads((folder / "circuit" / "circuit.json").read_text())
    assert found["departure"] < 1e-5 and len(found["layers"]) == 30 and found["visited"] == found["active"] > 50
    form = json.loads((folder / "circuit" / "circuit_tracer.json").read_text())
    assert any(node["clerp"].startswith('Output " Paris"') for node in form["nodes"])


def test_every_evaluation_on_real_texts(folder: Path) -> None:
    """Small numbers of each; what they must be is only what a trained model on real text cannot miss."""
    run = folder / "runs" / "sweep" / "2"
    command(
        *("evals/evaluate.py", f"run={run}", "tasks=[probing,absorption,tpp,scr,ravel]", "intervals=false"),
        *("probing.datasets=[92_glue_sst2]", "probing.texts=120", "probing.tokens=24", "absorption.words=400"),
        *("erasure.texts=160", "erasure.tokens=16", "ravel.pairs=24", "ravel.steps=3", "ravel.batch=4"),
        cwd=folder,
    )
    found = json.loads((run / "evaluation.json").read_text())
    assert found["fvu"] < 0.7  # what was found before is kept
    assert found["probing_dense_x"] > 0.6
    assert found["absorption_words"] == 200 and 0 < found["absorption_probe_f1"] < 1
    assert found["tpp_500"] > 0 and found["scr_texts"] == 80
    assert found["ravel_prompts"] > 20 and found["ravel_isolation_dense"] > 0.3
