"""The index of commit records: one file instead of a read for every unit, and never wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipcoder.pipeline.store import commit
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.places import beside
from skipcoder.pipeline.store.reader import ActivationStore


@pytest.fixture(autouse=True)
def index_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "INDEXED_FROM", 1)


@pytest.fixture
def read_from_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units whose records are read one by one."""
    units: list[int] = []
    read = commit.read

    def noting(place: Place, unit: int) -> commit.Commit:
        units.append(unit)
        return read(place, unit)

    monkeypatch.setattr(commit, "read", noting)
    return units


def index_of(store: Path) -> Path:
    return store.parent / f"{store.stem}.derived" / commit.INDEX


def test_a_second_opening_reads_one_file(copy: Path, read_from_files: list[int]) -> None:
    first = ActivationStore.open(copy)
    assert len(read_from_files) == len(first.commits) > 20
    read_from_files.clear()
    assert ActivationStore.open(copy).commits == first.commits
    assert not read_from_files


def test_only_new_records_are_read(copy: Path, read_from_files: list[int]) -> None:
    record = copy / commit.record_file(5)
    content = record.read_bytes()
    record.unlink()
    assert 5 not in ActivationStore.open(copy).commits
    record.write_bytes(content)
    read_from_files.clear()
    assert 5 in ActivationStore.open(copy).commits and read_from_files == [5]
    record.unlink()  # what is gone is gone, whatever the index says
    assert 5 not in ActivationStore.open(copy).commits


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "another file"])
def test_a_damaged_index_is_made_anew(copy: Path, damage: str, read_from_files: list[int]) -> None:
    wanted = ActivationStore.open(copy).commits
    index = index_of(copy)
    whole = index.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    index.write_bytes({"truncated": whole[:-9], "flipped": bytes(flipped), "empty": b"", "another file": b"{}"}[damage])
    read_from_files.clear()
    assert ActivationStore.open(copy).commits == wanted
    assert len(read_from_files) == len(wanted) and index.read_bytes() == whole


def test_where_nothing_can_be_written_records_are_read(copy: Path) -> None:
    (copy.parent / f"{copy.stem}.derived").write_text("in the way")
    assert len(ActivationStore.open(copy).commits) > 20


def test_a_store_that_grows_forgets_it(cache_config: Any, capture_here: Any, tmp_path: Path) -> None:
    """The last unit's record is replaced by one of the same size or another."""
    path = tmp_path / "grows.zarr"
    first = capture_here(cache_config(path, rows=34)).commits  # unit 8 has two of its four rows
    assert index_of(path).exists()
    grown = capture_here(cache_config(path, rows=35)).commits
    assert first[8].rows == (32, 34) and grown[8].rows == (32, 35)
    store = ActivationStore.open(path)
    assert store.commits == {unit: commit.read(store.place, unit) for unit in grown}


def test_a_record_of_the_same_size_needs_the_index_forgotten(copy: Path) -> None:
    """What a capture does before it replaces records."""
    store = ActivationStore.open(copy)
    record, checksum = copy / commit.record_file(3), str(store.commits[3].tokens_crc32c)
    record.write_text(record.read_text().replace(checksum, "1" * len(checksum)))
    assert ActivationStore.open(copy).commits[3] == store.commits[3]
    commit.forget_index(beside(store.place))
    assert ActivationStore.open(copy).commits[3] != store.commits[3]


@pytest.mark.parametrize("grow", [True, False])
def test_a_capture_forgets_the_index_before_it_writes_records(
    cache_config: Any, capture_here: Any, tmp_path: Path, grow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store.zarr"
    capture_here(cache_config(path, rows=34))
    if not grow:
        (path / commit.record_file(3)).unlink()
    seen: list[bool] = []

    def noting(what: Callable[..., None]) -> Callable[..., None]:
        def act(*args: Any) -> None:
            seen.append(index_of(path).exists())
            what(*args)

        return act

    monkeypatch.setattr(commit, "write", noting(commit.write))
    monkeypatch.setattr(commit, "withdraw", noting(commit.withdraw))
    capture_here(cache_config(path, rows=36 if grow else 34))
    assert seen and not any(seen)
