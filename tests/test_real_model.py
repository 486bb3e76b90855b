"""The whole job on SmolLM2-135M: real weights, real text, a real Ray cluster."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from skipcoder.pipeline import model
from skipcoder.pipeline.cache import model_config

from skipcoder import ActivationStore
from tests.conftest import REPO

pytestmark = pytest.mark.slow
HOOKPOINT = "layers.10.mlp"


def command(script: str, *args: str) -> str:
    done = subprocess.run([sys.executable, str(REPO / script), *args], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("real")
    command("pipeline/cache.py", f"store.path={path / 's.zarr'}", "data.tokens=16384", "store.unit_rows=2")
    return path


def test_captured_bits_are_those_of_plain_hooks_on_the_whole_model(folder: Path) -> None:
    """The capture loads 11 of 30 layers and stops early; the reference is the full model, run to its end."""
    store = ActivationStore.open(folder / "s.zarr")
    lm = model.load_causal_lm(model_config(store.attrs), "cpu")
    seen: dict[str, torch.Tensor] = {}
    lm.model.layers[10].mlp.register_forward_hook(
        lambda _, args, out: seen.update(input=args[0].flatten(0, 1), output=out.flatten(0, 1))
    )
    for unit in (0, 17, 31):
        start, stop = store.unit_range(unit)
        with torch.no_grad():
            lm(torch.from_numpy(store.tokens(unit)).long())
        index = store.read("index", start, stop).astype(np.int64) - start
        for side, reference in seen.items():
            assert reference.dtype == torch.bfloat16
            assert torch.equal(store.activations(HOOKPOINT, side, start, stop), reference[index])


def test_sweep_and_evaluation(folder: Path) -> None:
    command(
        *("trainer/train.py", "-m", f"store.path={folder / 's.zarr'}", f"hydra.sweep.dir={folder / 'sweep'}"),
        *("coder=sae,transcoder,skip_transcoder", "coder.k=32", "coder.width=1152", "optim.lr=3e-3"),
        *("train.tokens=250000", "train.batch_tokens=2048"),
    )
    out = folder / "summary.json"
    command("evals/evaluate.py", f"runs={folder / 'sweep'}/*", f"out={out}", "ce_tokens=512", "intervals=false")
    rows = {row["kind"]: row for row in json.loads(out.read_text())}
    assert all(row["fvu"] < 0.7 for row in rows.values())
    assert rows["skip_transcoder"]["fvu"] < rows["transcoder"]["fvu"]
    for row in rows.values():
        assert row["ce_clean"] < row["ce_spliced"] < row["ce_zero"] or row["ce_recovered_zero"] > 0.5
    assert (folder / "report.html").exists()


@pytest.fixture
def judge() -> Iterator[str]:
    """A real server of the chat API; its base URL."""
    pytest.importorskip("xllamacpp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = REPO / "tests" / "evals" / "llama_server.py"
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
    run = folder / "sweep" / "1"
    words = (
        *(f"run={run}", f"judge.base_url={judge}", "judge.model=smollm2", "judge.timeout=300", "judge.concurrency=2"),
        *("latents=2", "examples.train=5", "examples.test=5"),
    )
    said = command("evals/interpret.py", *words)
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
        command("evals/interpret.py", *words)
        assert json.loads((run / "interpretation" / "summary.json").read_text())["use"]["requests"] == 0


def test_every_evaluation_on_real_texts(folder: Path) -> None:
    """Small numbers of each; what they must be is only what a trained model on real text cannot miss."""
    run = folder / "sweep" / "2"
    command(
        *("evals/evaluate.py", f"run={run}", "tasks=[probing,absorption,tpp,scr,ravel]", "intervals=false"),
        *("probing.datasets=[92_glue_sst2]", "probing.texts=120", "probing.tokens=24", "absorption.words=400"),
        *("erasure.texts=160", "erasure.tokens=16", "ravel.pairs=24", "ravel.steps=3", "ravel.batch=4"),
    )
    found = json.loads((run / "evaluation.json").read_text())
    assert found["fvu"] < 0.7  # what was found before is kept
    assert found["probing_dense_x"] > 0.6
    assert found["absorption_words"] == 200 and 0 < found["absorption_probe_f1"] < 1
    assert found["tpp_500"] > 0 and found["scr_texts"] == 80
    assert found["ravel_prompts"] > 20 and found["ravel_isolation_dense"] > 0.3
