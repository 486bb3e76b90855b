"""skipcoder in Python: capture, train, evaluate, and what its objects say of themselves."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import skipcoder
from skipcoder import CoderConfig, DataConfig, LoopConfig, OptimConfig
from skipcoder.pipeline.api import model_named
from skipcoder.pipeline.capture import job
from skipcoder.pipeline.capture.worker import Worker
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.config import OptimName
from tests.conftest import CONTEXT, D_MODEL, REPO, UNIT_ROWS, UNITS, make_tiny_model

pytestmark = pytest.mark.slow


def here(place: Any, attrs: Any, units: list[int], model: Any, ray: Any) -> None:
    Worker(place.address, model, 2, "cpu")({"item": np.array(units)})


def test_capture_train_evaluate(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Ray, which captures in the tutorial."""
    monkeypatch.setattr(job, "run", here)
    text = DataConfig(kind="jsonl", path=str(text_file), tokens=UNITS * UNIT_ROWS * CONTEXT, context=CONTEXT)
    place = skipcoder.StoreConfig(path=str(tmp_path / "s.zarr"), unit_rows=UNIT_ROWS)
    store = skipcoder.capture(place, tiny_model, ["layers.1.mlp"], text, micro_batch_tokens=32)
    assert repr(store) == (
        f"<ActivationStore {tmp_path}/s.zarr: {tiny_model.name}, {UNITS * UNIT_ROWS * CONTEXT:,} tokens in rows of "
        f"{CONTEXT}; layers.1.mlp ({D_MODEL} to {D_MODEL})>"
    )
    loop, adam = LoopConfig(tokens=512, batch_tokens=64, device="cpu"), OptimConfig("adam", 1e-3)  # type: ignore[arg-type]
    size = {"train": loop, "optim": adam}  # "adam" as one types it
    kinds = [CoderConfig(kind=kind, k=4, width=64) for kind in ("sae", "transcoder")]
    coders = skipcoder.train(store, kinds, tmp_path / "runs", **size)
    assert repr(coders[0]) == (f"<SparseCoder sae, topk k=4, 64 latents, {D_MODEL} to {D_MODEL}, of layers.1.mlp>")
    alone = skipcoder.train(store, kinds[1], tmp_path / "alone", **size)
    assert torch.equal(alone.W_enc, coders[1].W_enc)  # as if trained by itself
    from_typed = skipcoder.train(
        store, kinds[1], tmp_path / "typed", **size | {"optim": OptimConfig(OptimName.adam, 1e-3)}
    )
    assert torch.equal(alone.W_enc, from_typed.W_enc)
    of_input = skipcoder.train(store, CoderConfig(kind="sae", k=4, width=64, side="input"), tmp_path / "in", **size)  # type: ignore[arg-type]
    assert of_input.meta["read"] == of_input.meta["write"] == {"module": "layers.1.mlp", "side": "input"}
    rows = skipcoder.evaluate([*coders, tmp_path / "alone"], ce_tokens=128)
    assert [row["kind"] for row in rows] == ["sae", "transcoder", "transcoder"]
    assert rows[1]["fvu"] == rows[2]["fvu"] and 0 < rows[0]["fvu"] < 1
    assert skipcoder.evaluate(str(tmp_path / "runs" / "*"), ce_tokens=128)[0]["fvu"] == rows[0]["fvu"]
    model, tokenizer = store.load_model(), store.load_tokenizer()
    tokens = tokenizer("a text", return_tensors="pt").input_ids
    with skipcoder.splice(model, {"layers.1.mlp": coders[1]}):
        assert model(tokens).logits.isfinite().all()


def test_the_page_about_python_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With smaller numbers, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "run", here)
    code = "\n".join(re.findall(r"```python\n(.+?)```", (REPO / "docs" / "python.md").read_text(), re.S))
    for shown, small in (
        ('"smollm2-135m"', repr(str(tiny_model))), ("layers.10", "layers.1"), ("131_072", "8_192"), ("3072", "128"),
        ("300_000", "5_000"), ("2048", "512"),
    ):  # fmt: skip
        assert shown in code
        code = code.replace(shown, small)
    names: dict[str, Any] = {}
    exec(code, names)
    assert [row["k"] for row in names["rows"]] == [32, 64, 32, 64] and Path("runs/python/report.html").exists()


def test_errors_name_what_was_given(store: ActivationStore, tmp_path: Path) -> None:
    coder = skipcoder.SparseCoder(CoderConfig(k=4, width=64), 24, 24)
    for call, said in (
        (lambda: store.activations("layers.9.mlp", "input", 0, 8), "no hookpoint 'layers.9.mlp': .* holds layers.0"),
        (
            lambda: store.activations("layers.1.mlp", "inputs", 0, 8),
            "side 'inputs' of layers.1.mlp: .* has only its input and output",
        ),
        (lambda: coder(torch.zeros(3, 23)), "reads 24 dimensions, not 23"),
        (lambda: skipcoder.evaluate(coder), "comes from no run's folder"),
        (lambda: skipcoder.evaluate(str(tmp_path / "*")), "matches no run directory"),
        (lambda: skipcoder.train(store, CoderConfig(), tmp_path, lr=1e-3), "lr: no setting of training; there are"),
        (lambda: skipcoder.capture(tmp_path, tokens=9), "tokens: no setting of a capture; there are ray, micro_batch"),
        (lambda: skipcoder.capture(tmp_path, plan=True), "plan: no setting of a capture"),
        (lambda: skipcoder.evaluate(tmp_path, taks=[]), "taks: no setting of an evaluation; there are out, tasks"),
        (lambda: skipcoder.train(store, CoderConfig(), tmp_path, optim=OptimConfig("adamw")), "adamw"),  # type: ignore[arg-type]
        (lambda: skipcoder.capture(tmp_path, "gpt5"), r"model 'gpt5': no preset \(gemma-2-2b, .*, no folder"),
        (lambda: CoderConfig(k=9, width=4), "coder.k=9 must be between 1"),
    ):
        with pytest.raises(skipcoder.UserError, match=said):
            call()


def test_models_by_name(tiny_model: Path) -> None:
    assert model_named("gemma-2-2b").write_modules and model_named("smollm2-135m").gguf_file
    assert model_named(str(tiny_model)).name == tiny_model.name
    assert model_named("google/gemma-2-2b").name == "gemma-2-2b"


def test_all_that_is_public_is_there() -> None:
    assert {"capture", "train", "evaluate", "CoderConfig"} <= set(dir(skipcoder))
    for name in skipcoder.__all__:
        assert getattr(skipcoder, name).__doc__


def cells(kind: str) -> Iterator[tuple[str, list[str]]]:
    """Source and tags of the tutorial's cells."""
    for cell in json.loads((REPO / "docs" / "tutorial.ipynb").read_text())["cells"]:
        if cell["cell_type"] == kind:
            yield "".join(cell["source"]), cell["metadata"].get("tags", [])


@pytest.mark.ray
def test_ray_starts_where_the_user_has_imported_it_before() -> None:
    """Ray reads on import whether it asks for a token."""
    script = "import ray; from skipcoder.cluster import cluster\nwith cluster(None): print(len(ray.nodes()))"
    env = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "1", done.stderr[-2000:]


@pytest.mark.ray
def test_the_tutorial_runs(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cell by cell, on a small model, with small numbers; Ray captures."""
    make_tiny_model(tmp_path / "tiny", text_file, layers=11)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    small = "MODEL, HOOKPOINT, TOKENS, TRAIN_TOKENS, WIDTH = './tiny', 'layers.10.mlp', 32_768, 20_000, 128"
    for source, tags in cells("code"):
        if "parameters" in tags:
            exec(source, names)
            assert {"MODEL", "HOOKPOINT", "TOKENS", "TRAIN_TOKENS", "WIDTH"} <= names.keys()
        exec(small if "parameters" in tags else source, names)
    printed = capsys.readouterr().out
    assert len(names["coders"]) == 4 == len(names["rows"]) and len(names["x"]) == 32_768 // 16
    assert printed.count(" >>>") == 12 and "a latent added" in printed


def test_the_tutorial_s_links_lead_to_pages() -> None:
    found = [page for source, _ in cells("markdown") for page in re.findall(r"\]\((\w+)\.html\)", source)]
    assert found and all((REPO / "docs" / f"{page}.md").exists() for page in found)
