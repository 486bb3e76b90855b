"""Everything that is stored names the file and the field at fault when it is damaged, before anything is made of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typing_extensions import TypedDict

from skipcoder.errors import UserError
from skipcoder.evals.core import results
from skipcoder.evals.explain import records
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.place import Directory
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.records import checked
from skipcoder.trainer.bank import bank
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.run import checkpoint
from skipcoder.trainer.run.run import Run, RunDirectory
from tests.evals.explain import made
from tests.trainer.run.test_run import config


class Example(TypedDict):
    name: str
    counts: list[int]


def test_what_is_right_comes_back_as_it_is_and_more_may_stand_beside() -> None:
    data = {"name": "x", "counts": [1, 2], "more": None}
    assert checked(Example, data, "here", "mend it") is data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"name": "x"}, "counts: Field required"),
        ({"name": "x", "counts": [1, "2"]}, r"counts\.1: Input should be a valid integer"),
        ({"name": None, "counts": []}, "name: Input should be a valid string"),
        ([], "content: Input should be a valid dictionary"),
    ],
)
def test_the_field_is_named(data: Any, says: str) -> None:
    with pytest.raises(UserError, match=rf"^here is damaged or not ours \({says}.*\); mend it$"):
        checked(Example, data, "here", "mend it")


@pytest.fixture(scope="module")
def finished(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, evaluated and interpreted run."""
    path = tmp_path_factory.mktemp("runs") / "run"
    bank.train(config(store), path)
    run = Run.open(path)
    results.record(run, {"fvu": 0.5})
    made.summary(run)
    made.latent(run, 3, "zebras", {})
    return path


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("name", "change", "read", "says"),
    [
        ("summary.json", lambda d: d.pop("width"), lambda p: RunDirectory(p).summary, "width: Field required"),
        ("summary.json", lambda d: d.update(k="4"), lambda p: Run.open(p), "k: Input should be a valid integer"),
        (
            "evaluation.json",
            lambda d: d.update(fvu=[1]),
            lambda p: results.read(Run.open(p)),
            "fvu: Input should be a valid number",
        ),
        (
            "interpretation/summary.json",
            lambda d: d["calibration"].pop("usable"),
            lambda p: records.read_summary(Run.open(p)),
            r"calibration\.usable: Field required",
        ),
        (
            "interpretation/latents/00000003.json",
            lambda d: d.update(scores=None),
            lambda p: records.read_latents(Run.open(p), "these"),
            "scores: Input should be a valid dictionary",
        ),
    ],
)
def test_files_of_a_run(
    finished: Path,
    tmp_path: Path,
    name: str,
    change: Callable[[dict[str, Any]], object],
    read: Callable[[Path], object],
    says: str,
) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    read(path)
    edit(path / name, change)
    with pytest.raises(UserError, match=rf"{name} is damaged or not ours \({says}"):
        read(path)
    (path / name).write_text("{")
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        read(path)


def test_coder_json_inside_the_tensors(finished: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(finished, tmp_path / "run"))
    file = path / "checkpoint" / "coder.safetensors"
    described = json.loads((path / "checkpoint" / "coder.json").read_text())
    described["read"]["side"] = 5
    save_file(load_file(file), file, {"coder.json": json.dumps(described)})
    with pytest.raises(UserError, match=r"coder\.safetensors: coder\.json is damaged .*read\.side: .*valid string"):
        SparseCoder.load(path)


def test_metrics_and_state(store: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store)
    bank.train(cfg, tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines[:1], '{"step": 2}', *lines[1:]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged or not ours \(tokens: Field required"):
        _ = RunDirectory(tmp_path).metrics
    file = tmp_path / "checkpoint" / "state" / "state.pt"
    state = torch.load(file, weights_only=True)
    del state["stream"]["block"]
    torch.save(state, file)
    with pytest.raises(UserError, match=r"state\.pt is damaged or not ours \(stream\.block: .*; delete it"):
        checkpoint.load_state(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("zarr.json", lambda d: d["attributes"]["identity"].pop("codec"), r"identity\.codec: Field required"),
        ("zarr.json", lambda d: d["attributes"].update(rows="many"), "rows: Input should be a valid integer"),
        ("commits/00000003.json", lambda d: d.update(rows=[0]), "rows: .*2 items"),
        ("commits/00000003.json", lambda d: d["shards"].update(x={}), r"shards\.x\.bytes: Field required"),
    ],
)
def test_files_of_a_store(
    store: ActivationStore, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    path = Path(shutil.copytree(store.path, tmp_path / "s.zarr"))
    edit(path / name, change)
    with pytest.raises(UserError, match=rf"{name}.* is damaged or not ours \({says}"):
        ActivationStore.open(path)


def test_a_store_that_cannot_be_reached_is_not_called_damaged(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bucket's error says what is wrong with the bucket, and must not advise to delete a good record."""

    def unreachable(self: object, name: str) -> bytes:
        raise UserError("s3://bucket: no credentials")

    monkeypatch.setattr(Directory, "read", unreachable)
    with pytest.raises(UserError, match=r"^s3://bucket: no credentials$"):
        commit.read(store.place, 3)
