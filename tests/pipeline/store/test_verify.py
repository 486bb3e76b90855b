"""`skipcoder-store`: damage of every kind is named, and nothing else."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from skipcoder.pipeline.config import CacheConfig
from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.verify import problems
from tests.conftest import CONTEXT, REPO, UNIT_ROWS

pytestmark = pytest.mark.slow

SHARD = Path("layers.1.mlp/input/c/3/0")


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_record(path: Path, unit: int, change: Callable[[dict], object]) -> None:
    file = path / commit.record_file(unit)
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record, sort_keys=True))


def test_nothing_is_wrong_with_what_was_captured(
    store: ActivationStore, cache_config: Callable[..., CacheConfig], capture_here: Callable, tmp_path: Path
) -> None:
    assert list(problems(place_at(store.path))) == []
    assert list(problems(place_at(capture_here(cache_config(tmp_path / "s.zarr", codec="int8")).path))) == []


def test_a_flipped_bit_is_found_twice_by_its_file_and_its_chunk(copy: Path) -> None:
    flip(copy / SHARD, 40)
    found = list(problems(place_at(copy)))
    assert len(found) == 2 and all(line.startswith("unit 3: ") for line in found)
    assert f"{SHARD}: expected bytes: " in found[0]
    begin = 3 * UNIT_ROWS * CONTEXT
    assert f"layers.1.mlp/input: rows {begin}-" in found[1] and "re-run the capture" in found[1]


@pytest.mark.parametrize("size", [10, None])
def test_short_and_missing_files(copy: Path, size: int | None) -> None:
    file = copy / SHARD
    file.write_bytes(file.read_bytes()[:size]) if size else file.unlink()
    found = list(problems(place_at(copy)))
    assert str(SHARD) in found[0] and ("no such file" in found[0]) == (size is None)


def test_other_values_with_right_checksums_differ_in_statistics(copy: Path) -> None:
    """A shard rewritten whole, its record made to match: only the statistics tell."""
    array: Any = zarr.open_group(copy, mode="r+")["layers.1.mlp/input"]
    start = 3 * UNIT_ROWS * CONTEXT
    span = slice(start, start + UNIT_ROWS * CONTEXT)
    array[span] = np.roll(array[span], 1, axis=1)
    edit_record(copy, 3, lambda r: r["shards"].update({str(SHARD): commit.checksum((copy / SHARD).read_bytes())}))
    found = list(problems(place_at(copy)))
    assert found and all("layers.1.mlp/input: statistics of" in line for line in found)


def test_records_of_other_stores_other_rows_and_no_record(copy: Path) -> None:
    edit_record(copy, 1, lambda r: r.update(identity="0" * 32))
    edit_record(copy, 2, lambda r: r.update(rows=[0, 4]))
    (copy / commit.record_file(4)).write_text("{")
    commit.withdraw(place_at(copy), 5)
    found = list(problems(place_at(copy)))
    assert found[0] == "1 of 33 units are not captured (5); run the same capture command again"
    assert "unit 1: its record belongs to another store" in found[1]
    assert found[2].startswith("unit 2: its record is of rows (0, 4), not (8, 12)")
    assert found[3].startswith("unit 4: ") and "is not a commit record" in found[3]
    assert len(found) == 4


def test_edited_tokens_and_attributes(copy: Path) -> None:
    metadata = json.loads((copy / "zarr.json").read_text())
    metadata["attributes"]["identity"]["seed"] = 9
    (copy / "zarr.json").write_text(json.dumps(metadata))
    tokens: Any = zarr.open_group(copy, mode="r+")["tokens"]
    tokens[0, 5] = 7
    found = list(problems(place_at(copy)))
    assert "the identity does not match its hash" in found[0]
    assert any("unit 0: tokens: other ids" in line for line in found)


@pytest.mark.cli
def test_commands_and_exit_codes(store: ActivationStore, copy: Path, tmp_path: Path) -> None:
    def run(*words: object) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, REPO / "pipeline" / "store_cli.py", *map(str, words)], capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    code, said = run("info", store.path)
    assert code == 0
    for fact in ("132 rows of 16", "33 of 33", "bf16, zstd", "layers.2.mlp", "0.0e+00"):
        assert fact in said
    assert run("verify", store.path) == (0, f"{store.path}: all as captured\n")
    flip(copy / SHARD, 40)
    code, said = run("verify", copy)
    assert code == 1 and said.endswith("2 problems\n")
    assert run("verify", tmp_path / "nowhere")[0] == 2


def test_a_document_in_two_splits_is_named(copy: Path) -> None:
    group: Any = zarr.open_group(copy, mode="r+")
    document = int(group["document"][0, 3])
    group["document"][7 * UNIT_ROWS, 3] = document  # unit 7 is for validation
    name = "document/c/7/0"
    edit_record(copy, 7, lambda r: r["shards"].update({name: commit.checksum((copy / name).read_bytes())}))
    assert list(problems(place_at(copy))) == [
        f"unit 7: document: {document:016x} is in the validation split and in the train split"
    ]
