"""Chunks read directly are those that zarr reads."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from skipcoder.errors import UserError
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.shards import ShardReader, encode

NAMES = ("index", "layers.1.mlp/input", "layers.1.mlp/output", "layers.1.mlp/output_exponent")


@pytest.mark.parametrize("name", NAMES)
def test_every_range_equals_zarrs(store: ActivationStore, name: str) -> None:
    """Chunks, parts of them, and ranges over several shards."""
    array = store.array(name)
    reader = ShardReader(store.place, name, layout.arrays(store.attrs)[name])
    rows, length = array.chunks[0], array.shape[0]
    spans = [(start, stop) for start in range(0, length, rows) for stop in (min(start + rows, length), start + 1)]
    for start, stop in [*spans, (1, 2), (rows - 1, 2 * rows + 3), (0, length)]:
        found = reader.read(start, stop)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array[start:stop])
        assert reader.read(start, stop, found) is found


@pytest.mark.parametrize("rows", [64, 63, 16, 5])
@pytest.mark.parametrize("codec", ["bf16", "bf16 lz4", "int8", "format 2"])
def test_a_shard_made_in_memory_is_the_one_that_zarr_writes(
    store: ActivationStore, tmp_path: Path, rows: int, codec: str
) -> None:
    """Whole and short, the latter as in a last unit; one and two dimensions."""
    attrs: Any = {**store.attrs, "identity": {**store.attrs["identity"], "codec": codec.split()[0]}}
    attrs["compression"] = "lz4" if "lz4" in codec else "zstd"
    if codec == "format 2":
        attrs["version"], attrs["identity"]["codec"] = 2, "bf16"
    rng = np.random.default_rng(0)
    for name, array in layout.arrays(attrs).items():
        values = rng.integers(0, 9, (min(rows, array.shard[0]), *array.shard[1:])).astype(array.spec.dtype)
        zarr.create_array(tmp_path / name, **array.create, shape=values.shape)[:] = values
        assert b"".join(encode(array, values)) == tmp_path.joinpath(name, "c", *["0"] * values.ndim).read_bytes(), name


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


@pytest.mark.parametrize("array", ["input", "input_exponent"])
def test_a_hole_cannot_pass_for_data(copy: Path, array: str) -> None:
    """A shard in which only the first chunk was written, whole and with right checksums."""
    opened, name = ActivationStore.open(copy), f"layers.1.mlp/{array}"
    described = layout.arrays(opened.attrs)[name]
    short = described._replace(chunk=(16, *described.chunk[1:]))  # of a store with several chunks to a unit
    values = np.ones((16, *short.shard[1:]), np.uint8)
    (copy / name / "c/0/0").write_bytes(b"".join(encode(short, values)))
    reader = ShardReader(opened.place, name, short)
    np.testing.assert_array_equal(reader.read(0, 16), values)
    with pytest.raises(ValueError, match="the chunk is missing from its shard"):
        reader.read(16, 32)


def test_a_shard_of_another_array_is_named(copy: Path) -> None:
    opened = ActivationStore.open(copy)
    shutil.copy(copy / "layers.1.mlp/input_exponent/c/0/0", copy / "layers.1.mlp/input/c/0/0")
    with pytest.raises(UserError, match=r"layers.1.mlp/input: rows 0-\d+ .*its shard's index does not fit"):
        opened.activations("layers.1.mlp", "input", 0, opened.chunk_rows)
