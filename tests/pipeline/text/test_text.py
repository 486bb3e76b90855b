from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig, SourceKind
from skipcoder.pipeline.text import sources as text
from skipcoder.testing import SourceTests


def source(kind: SourceKind, path: Path, **more: Any) -> DataConfig:
    return DataConfig(kind=kind, path=str(path), **more)


def test_every_local_source_reads_the_same_documents(tmp_path: Path) -> None:
    documents = ["first", "zweites, mit ü", "third"]
    for i, document in enumerate(documents):
        (tmp_path / f"{i + 9}.txt").write_text(document)  # 9, 10, 11: natural order, not alphabetical
    (tmp_path / "d.jsonl").write_text("".join(f'{{"text": "{d}"}}\n' for d in documents))
    pq.write_table(pa.table({"text": documents}), tmp_path / "d.parquet")
    for kind, path in (("text", "*.txt"), ("jsonl", "d.jsonl"), ("parquet", "d.parquet")):
        assert list(text.documents(source(SourceKind(kind), tmp_path / path))) == documents


class TestStdlib(SourceTests):
    @pytest.fixture
    def cfg(self) -> DataConfig:
        return DataConfig(kind=SourceKind.stdlib)


class TestText(SourceTests):
    @pytest.fixture
    def cfg(self, tmp_path: Path) -> DataConfig:
        for i in range(3):
            (tmp_path / f"{i}.txt").write_text(f"document {i}")
        return source(SourceKind.text, tmp_path)


class TestJsonl(SourceTests):
    @pytest.fixture
    def cfg(self, text_file: Path) -> DataConfig:
        return source(SourceKind.jsonl, text_file)


class TestParquet(SourceTests):
    @pytest.fixture
    def cfg(self, tmp_path: Path) -> DataConfig:
        pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "d.parquet")
        return source(SourceKind.parquet, tmp_path)


def test_identity_follows_content_not_place(tmp_path: Path) -> None:
    prints = []
    for folder, content in (("a", "same"), ("b", "same"), ("c", "else")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(content)
        prints.append(text.identity(source(SourceKind.text, tmp_path / folder)))
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("text", b"good \xe9 bad", r"x\.dat is not UTF-8 \(byte 5 is 0xe9\).*iconv"),
        ("jsonl", b'{"text": "a"}\n{oops\n', r"x\.dat, line 2: not JSON"),
        ("jsonl", b'{"body": "a"}\n', r"line 1: no text under 'text' \(it has: body\); set data.field"),
        ("parquet", b"nonsense", r"x\.dat is not a readable Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, kind: str, content: bytes, message: str) -> None:
    (tmp_path / "x.dat").write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(text.documents(source(SourceKind(kind), tmp_path / "x.dat")))


def test_parquet_without_the_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a"]}), tmp_path / "d.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(it has: body\)"):
        list(text.documents(source(SourceKind.parquet, tmp_path / "d.parquet")))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no file"):
        list(text.documents(source(SourceKind.text, tmp_path / "none.txt")))


def test_a_stream_from_the_hub_that_breaks_off_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real streamed data set whose source fails now and then; in order, nothing twice, nothing lost."""
    import datasets

    faults = iter([3, 3, 7, 20])
    at = [next(faults)]

    def source() -> Iterator[dict[str, str]]:
        for i in range(25):
            if i == at[0]:
                at[0] = next(faults, -1)
                raise ConnectionError("the line is dead")
            yield {"text": f"document {i}"}

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(source))
    monkeypatch.setattr(text, "PAUSES", (0, 0))
    cfg = DataConfig(kind=SourceKind.huggingface, path="some/text")
    assert list(text.documents(cfg)) == [f"document {i}" for i in range(25)]
    faults, at = iter([5, 5, 5]), [5]  # three times at one place
    with pytest.raises(UserError, match=r"some/text: cannot read this dataset from the hub \(the line is dead\)"):
        list(text.documents(cfg))
    faults, at = iter([]), [0]  # at once
    with pytest.raises(UserError, match="cannot read this dataset"):
        list(text.documents(cfg))
