"""Chunks read directly are those that zarr reads."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr

from skipcoder.errors import UserError
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.place import Directory
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.shards import ShardReader, encode

NAMES = ("index", "layers.1.mlp/input", "layers.1.mlp/output")


@pytest.mark.parametrize("name", NAMES)
def test_every_chunk_equals_zarrs(store: ActivationStore, name: str) -> None:
    array = store.array(name)
    reader = ShardReader.of(store.place, name, array)
    assert reader is not None
    rows, length = array.chunks[0], array.shape[0]
    for start in range(0, length, rows):
        for stop in {min(start + rows, length), start + 1}:
            found = reader.read(start, stop)
            assert found is not None and found.dtype == array.dtype
            np.testing.assert_array_equal(found, array[start:stop])
    assert reader.read(1, 2) is None and reader.read(0, rows + 1) is None  # not a chunk: left to zarr


def test_foreign_coding_is_left_to_zarr(tmp_path: Path) -> None:
    plain = zarr.create_array(tmp_path / "plain", shape=(8, 2), chunks=(4, 2), dtype="uint16")
    sharded = zarr.create_array(tmp_path / "sharded", shape=(8, 2), chunks=(2, 2), shards=(4, 2), dtype="uint16")
    assert ShardReader.of(Directory(tmp_path), "plain", plain) is None
    assert ShardReader.of(Directory(tmp_path), "sharded", sharded) is None  # zstd of zarr's own, no checksum


@pytest.mark.parametrize("rows", [64, 63, 16, 5])
def test_a_shard_made_in_memory_is_the_one_that_zarr_writes(store: ActivationStore, tmp_path: Path, rows: int) -> None:
    """Whole and short, the latter as in a last unit; one and two dimensions."""
    for name, described in layout.arrays(store.attrs).items():
        values = store.array(name)[:rows]
        zarr.create_array(tmp_path / name, **{**described, "shape": values.shape})[:] = values
        written = tmp_path.joinpath(name, "c", *["0"] * values.ndim).read_bytes()
        if len(values) <= described["shards"][0]:
            assert encode(described, values) == written


@pytest.mark.parametrize("place", ["body", "index"])
def test_a_flipped_bit_is_named(store: ActivationStore, tmp_path: Path, place: str) -> None:
    """Files that are short or gone are found when the store is opened."""
    shutil.copytree(store.path, tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "layers.1.mlp" / "input" / "c" / "0" / "0"
    content = bytearray(file.read_bytes())
    content[40 if place == "body" else -8] ^= 1
    file.write_bytes(content)
    damaged = ActivationStore.open(tmp_path / "s.zarr")
    says = r"layers.1.mlp/input: rows 0-\d+ \(unit 0\) cannot be decoded .*re-run the capture"
    with pytest.raises(UserError, match=says):
        damaged.activations("layers.1.mlp", "input", 0, damaged.chunk_rows)


@pytest.mark.parametrize("place", ["cut", "gone"])
def test_files_that_vanish_while_reading_are_named(store: ActivationStore, tmp_path: Path, place: str) -> None:
    shutil.copytree(store.path, tmp_path / "s.zarr")
    opened = ActivationStore.open(tmp_path / "s.zarr")
    file = tmp_path / "s.zarr" / "layers.1.mlp" / "input" / "c" / "0" / "0"
    file.write_bytes(file.read_bytes()[:10]) if place == "cut" else file.unlink()
    with pytest.raises(UserError, match=r"layers.1.mlp/input: rows 0-\d+ \(unit 0\) cannot be decoded"):
        opened.activations("layers.1.mlp", "input", 0, opened.chunk_rows)
