"""The whole job on SmolLM2-135M: real weights, real text, a real Ray cluster."""

import json
import subprocess
import sys
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
    command("evals/evaluate.py", f"runs={folder / 'sweep'}/*", f"out={out}", "ce_tokens=512")
    rows = {row["kind"]: row for row in json.loads(out.read_text())}
    assert all(row["fvu"] < 0.7 for row in rows.values())
    assert rows["skip_transcoder"]["fvu"] < rows["transcoder"]["fvu"]
    for row in rows.values():
        assert row["ce_clean"] < row["ce_spliced"] < row["ce_zero"] or row["ce_recovered_zero"] > 0.5
    assert (folder / "report.html").exists()
