"""Stores of earlier formats open, grow and are recoded; a recoded store is the old one to everything but the disk."""

import hashlib
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline import cache
from skipcoder.pipeline.config import Compression
from skipcoder.pipeline.store import commit, writer
from skipcoder.pipeline.store.attrs import identity_hash, new_attrs
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.recode import recode
from skipcoder.pipeline.store.verify import problems
from skipcoder.trainer.data.stream import ActivationStream
from tests.conftest import REPO
from tests.pipeline.store.test_writer import files

HERE, MLP = Path(__file__).parent, "layers.1.mlp"
BF16 = {"index": "4126e85c8be617c4", "input": "f93d3636c1da175d", "output": "cf422f238c7c171f"}
INT8 = {"index": "4126e85c8be617c4", "input": "9f569e84c6cd9bae", "output": "4cfe80aa314042ce"}
DOCUMENTS = {"index": "4126e85c8be617c4", "input": "a1fde41135d7bf59", "output": "094a8aa5020ef08c"}
DOCUMENTS |= {"document": "8894e055885557ba", "document_number": "14b0106851d9857a"}
CONTENT = {
    f"format-{version}-{codec}": found for version in (2, 3) for codec, found in (("bf16", BF16), ("int8", INT8))
} | {"format-3-documents": DOCUMENTS}
"""Hashes of what the versions that wrote the stores, of the same text and model, read in them."""


def unpacked(name: str, folder: Path) -> ActivationStore:
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return ActivationStore.open(folder / f"{name}.zarr")


def content(store: ActivationStore) -> dict[str, str]:
    n = store.rows * store.context
    arrays = {"index": store.read("index", 0, n)}
    arrays |= {side: store.activations(MLP, side, 0, n).view(torch.int16).numpy() for side in commit.SIDES}
    if store.split_scheme is not None:
        arrays |= {name: store.read(name, 0, store.rows) for name in ("document", "document_number")}
    return {name: hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16] for name, a in arrays.items()}


@pytest.mark.parametrize("name", CONTENT)
def test_released_formats_are_read(name: str, tmp_path: Path) -> None:
    store = unpacked(name, tmp_path)
    assert content(store) == CONTENT[name]
    assert list(problems(store.place)) == []


@pytest.mark.parametrize("name", CONTENT)
def test_documents_of_every_format(name: str, tmp_path: Path) -> None:
    """Stored, or counted by what separates them."""
    store = unpacked(name, tmp_path)
    for unit in store.units:
        documents, tokens = store.documents(unit).ravel(), store.tokens(unit).ravel()
        ends = np.flatnonzero(tokens == 1)  # the tokenizer's end-of-text token
        inside = np.diff(documents) != 0
        cut = (np.arange(1, len(tokens)) % store.context == 0) & ("documents" in name)  # of a held-out document a part
        assert (inside[~cut] == np.isin(np.arange(len(tokens) - 1), ends)[~cut]).all()
    splits = {split: store.split(split) for split in ("train", "validation", "test")}
    by_unit = {"train": [u for u in store.units if u != 15], "validation": [15], "test": [15]}
    by_document = by_unit | {"train": [u for u in store.units if u not in (7, 15)], "validation": [7]}
    assert splits == (by_document if "documents" in name else by_unit)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
@pytest.mark.parametrize("name", CONTENT)
def test_a_recoded_store_is_the_old_one(name: str, compression: str, tmp_path: Path) -> None:
    """Values, statistics, order; interrupted after every unit."""
    old, new = unpacked(name, tmp_path), place_at(tmp_path / "new.zarr")
    for done in range(len(old.units)):
        for _ in recode(old, new, compression):
            if len(commit.committed_units(new)) > done:
                break  # one more than before
        assert len(commit.committed_units(new)) == done + 1
    list(recode(old, new, compression))
    store = ActivationStore.open(new)
    assert content(store) == CONTENT[name] and store.attrs["version"] == 3
    assert list(problems(new)) == []
    for side in commit.SIDES:
        for field, value in vars(old.moments(MLP, side)).items():
            np.testing.assert_array_equal(getattr(store.moments(MLP, side), field), value)
    before, after = (ActivationStream(s, MLP, 100, epochs=1) for s in (old, store))
    assert before.layout_hash() == after.layout_hash()  # what a checkpoint of a run asks for
    assert all(torch.equal(a.x, b.x) for a, b in zip(before, after, strict=True))


def test_what_cannot_be_recoded(tmp_path: Path) -> None:
    store = unpacked("format-2-bf16", tmp_path)
    with pytest.raises(UserError, match="onto itself"):
        list(recode(store, store.place, "zstd"))
    list(recode(store, place_at(tmp_path / "new.zarr"), "zstd"))
    with pytest.raises(UserError, match="another store, or has another compression"):
        list(recode(store, place_at(tmp_path / "new.zarr"), "lz4"))
    commit.withdraw(store.place, 3)
    with pytest.raises(UserError, match="is unfinished"):
        list(recode(ActivationStore.open(store.place), place_at(tmp_path / "more.zarr"), "zstd"))


def format_2(patch: pytest.MonkeyPatch) -> None:
    """Have captures lay out stores as before."""

    def as_before(described: Any, compression: str) -> Any:
        found: Any = {**new_attrs(described, compression), "version": 2}
        del found["compression"]
        found["identity"]["compression"] = compression
        del found["identity"]["split_scheme"], found["identity"]["held_out_rows"]
        return {**found, "identity_hash": identity_hash(found["identity"])}

    patch.setattr(cache, "new_attrs", as_before)
    patch.setattr(writer, "refuse_other_identity", lambda *_: None)


@pytest.mark.slow
def test_an_unfinished_layout_of_format_2_makes_room(
    tmp_path: Path, cache_config: Any, capture_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fresh").mkdir()
    whole = capture_here(cache_config(tmp_path / "fresh" / "s.zarr"))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        format_2(patch)
        patch.setattr(cache, "rows_of", lambda *_: 1 / 0)
        capture_here(cache_config(tmp_path / "s.zarr"))
    assert files(capture_here(cache_config(tmp_path / "s.zarr")).path) == files(whole.path)


@pytest.mark.slow
def test_a_store_of_format_2_grows_as_it_is(
    tmp_path: Path, cache_config: Any, capture_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bytes as captured at once; recoded, it grows as format 3 does."""
    with monkeypatch.context() as patch:
        format_2(patch)
        capture_here(cache_config(tmp_path / "grown.zarr", rows=70))
        capture_here(cache_config(tmp_path / "whole.zarr", rows=100))
    list(recode(ActivationStore.open(tmp_path / "grown.zarr"), place_at(tmp_path / "new.zarr"), "zstd"))
    for path in ("grown.zarr", "new.zarr"):
        capture_here(cache_config(tmp_path / path, rows=100))
    assert files(tmp_path / "grown.zarr") == files(tmp_path / "whole.zarr")
    grown, recoded = (ActivationStore.open(tmp_path / f"{name}.zarr") for name in ("grown", "new"))
    assert content(grown) == content(recoded) and recoded.attrs["version"] == 3
    with pytest.raises(UserError, match=r"compressed with zstd, not store.compression=lz4.*skipcoder-store recode"):
        cache.capture(cache_config(tmp_path / "new.zarr", rows=100, compression=Compression.lz4))


@pytest.mark.parametrize("plane", ["", "_exponent"])
def test_a_plane_without_the_other_is_named(copy: Path, plane: str) -> None:
    (copy / f"layers.2.mlp/input{plane}/c/4/0").unlink()
    with pytest.raises(UserError, match=rf"layers.2.mlp/input{plane}/c/4/0: expected \d+ bytes, found no such file"):
        ActivationStore.open(copy)


def test_the_command(tmp_path: Path) -> None:
    store = unpacked("format-2-bf16", tmp_path)
    command = [sys.executable, str(REPO / "pipeline/store_cli.py"), "recode", str(store.path), "new.zarr"]
    run = subprocess.run([*command, "--compression", "lz4"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "new.zarr holds what" in run.stdout, run.stderr
    assert content(ActivationStore.open(tmp_path / "new.zarr")) == CONTENT["format-2-bf16"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".x.1-1.partial").write_text("mine")
    run = subprocess.run([*command[:-1], "home"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "is not an activation store" in run.stderr
    assert [path.name for path in (tmp_path / "home").iterdir()] == [".x.1-1.partial"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 2 and "has another compression" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.cli
def test_killed_by_signal_9_and_run_again(store: ActivationStore, tmp_path: Path) -> None:
    """In the middle of its work, again and again: the bytes of a recoding that was left alone."""
    list(recode(store, place_at(tmp_path / "whole.zarr"), "lz4"))
    new = place_at(tmp_path / "new.zarr")
    command = [sys.executable, str(REPO / "pipeline/store_cli.py"), "recode", str(store.path), str(new)]
    command += ["--compression", "lz4"]
    for least in (1, 8, 20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as job:
            while job.poll() is None and len(commit.committed_units(new)) < least:
                time.sleep(0.001)
            job.kill()
        assert least <= len(commit.committed_units(new)) < len(store.units)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert files(tmp_path / "new.zarr") == files(tmp_path / "whole.zarr")
