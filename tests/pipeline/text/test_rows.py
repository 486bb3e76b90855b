"""Documents become rows, each row of documents of its unit's split."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig, ModelConfig, SourceKind
from skipcoder.pipeline.model import load as model
from skipcoder.pipeline.text.chat import TEXT
from skipcoder.pipeline.text.rows import PIECE, Encoded, Packer, encoded, hash_of, rows_of
from skipcoder.pipeline.text.splits import TRAIN, split_of

CONTEXT = 8


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return model.load_tokenizer(ModelConfig(name="tiny", id=str(tiny_model)))


def lines(path: Path, documents: list[str], **more: Any) -> DataConfig:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return DataConfig(kind=SourceKind.jsonl, path=str(path), context=CONTEXT, **more)


def packed(documents: list[tuple[int, int]], **more: Any) -> tuple[list[np.ndarray], Packer]:
    """Rows of documents (hash, tokens), each of whose tokens is its place in the document."""
    settings = {"context": CONTEXT, "bos": 0, "unit_rows": 2, **more}
    packer = Packer(**settings)
    rows = [packer.add(Encoded(i, key, list(range(1, size + 1)), TEXT)) for i, (key, size) in enumerate(documents)]
    return list(chain.from_iterable(map(list, rows))), packer


some_documents = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), max_size=200)


@settings(deadline=None)
@given(documents=some_documents, unit_rows=st.integers(1, 3), most=st.none() | st.integers(1, 3))
def test_no_document_is_in_two_splits_and_training_loses_none(
    documents: list[tuple[int, int]], unit_rows: int, most: int | None
) -> None:
    documents = [(key, 5 + key) for key, _ in documents]  # equal texts have equal lengths
    rows, packer = packed(documents, unit_rows=unit_rows, most=most)
    split_of_document: dict[int, str] = {}
    of_split: dict[str, list[np.ndarray]] = {}
    for i, row in enumerate(rows):
        assert row.dtype == PIECE and len(row) == CONTEXT and row["tokens"][0] == 0
        assert row["document"][0] == row["document"][1]  # BOS is the next token's document's
        split = split_of(i // unit_rows)
        of_split.setdefault(split, []).append(row[1:])
        for key in np.unique(row["document"]):
            assert split_of_document.setdefault(int(key), split) == split
    # Rows of one split are its documents one behind the other, whole but for those that repeat.
    body = np.concatenate(of_split.get(TRAIN, [np.empty(0, PIECE)]))
    starts = np.flatnonzero(np.diff(body["document_number"].astype(int), prepend=-1))
    for start, stop in zip(starts, [*starts[1:], len(body)], strict=False):
        number = int(body["document_number"][start])
        assert body["tokens"][start:stop].tolist() == list(range(1, stop - start + 1))
        if stop < len(body):
            assert stop - start == documents[number][1]
    used = {int(n) for n in body["document_number"]}
    left_out = [i for i in range(max(used, default=0)) if i not in used and documents[i][0] in split_of_document]
    in_training = [i for i in left_out if split_of_document[documents[i][0]] == TRAIN]
    assert len(in_training) <= packer.left_out  # nothing is lost silently


@given(documents=some_documents, more=some_documents)
def test_rows_of_a_sources_beginning_stay(documents: list[tuple[int, int]], more: list[tuple[int, int]]) -> None:
    few, many = packed(documents)[0], packed(documents + more)[0]
    assert np.array_equal(np.array(few), np.array(many[: len(few)]))


@given(documents=some_documents)
def test_what_waits_is_a_unit_and_a_document_at_most(documents: list[tuple[int, int]]) -> None:
    _, packer = packed(documents)
    assert max(packer.waiting.values()) < 2 * (CONTEXT - 1) + max((size for _, size in documents), default=0) + 1


def test_held_out_documents_give_so_many_rows_at_most() -> None:
    documents = [(key, 100) for key in range(1, 400)]
    rows, _ = packed(documents, most=2)
    for i, row in enumerate(rows):
        spans = {key: np.count_nonzero(row["document"][1:] == key) for key in np.unique(row["document"])}
        if split_of(i // 2) != TRAIN:
            assert len(spans) == 1  # two rows each, exactly
    held_out = [row for i, row in enumerate(rows) if split_of(i // 2) != TRAIN]
    assert len({int(row["document"][1]) for row in held_out}) == -(-len(held_out) // 2)
    starts = {int(row["tokens"][1]) for row in held_out[::2]}
    assert len(starts) > 1  # not always the beginning


@pytest.mark.parametrize("unit_rows", [None, 100])
def test_packing_loses_nothing_but_the_last_partial_row(tokenizer: Any, tmp_path: Path, unit_rows: int | None) -> None:
    documents = ["alpha beta", "", "gamma " * 40, "delta"]
    stream = [(one.number, token) for one in encoded(documents, tokenizer) for token in one.ids]
    assert {i for i, _ in stream} == {0, 2, 3}
    assert [token for i, token in stream if i == 3] == [*tokenizer("delta", add_special_tokens=False).input_ids, 1]
    count = len(stream) // (CONTEXT - 1)
    rows = np.stack(list(rows_of(lines(tmp_path / "x.jsonl", documents), tokenizer, count, unit_rows)))
    assert (rows["tokens"][:, 0] == tokenizer.bos_token_id).all()
    body = rows[:, 1:].ravel()
    assert list(zip(body["document_number"], body["tokens"], strict=True)) == stream[: len(body)]
    assert set(body["document"].tolist()) <= {hash_of(text) for text in documents}


def test_golden_rows(tokenizer: Any, text_file: Path) -> None:
    """Stores grow: the same source must give the same rows for ever."""
    cfg = DataConfig(kind=SourceKind.jsonl, path=str(text_file), context=16, held_out_rows=1)
    rows = np.stack(list(rows_of(cfg, tokenizer, 64, 2)))
    numbers = [rows["document_number"][2 * unit, 1] for unit in (0, 6, 7, 8, 15, 16, 31)]
    assert numbers == GOLDEN and rows["document"][0, 0] == GOLDEN_HASH


def test_too_little_text_states_both_numbers(tmp_path: Path, tokenizer: Any) -> None:
    cfg = lines(tmp_path / "x.jsonl", [f"a few words only, {i} times" for i in range(40)])
    with pytest.raises(UserError, match=r"holds \d+ tokens in full rows of 8, but data.tokens asks for 80,000"):
        list(rows_of(cfg, tokenizer, 10000, 2))
    cfg.repeat = True
    assert len(list(rows_of(cfg, tokenizer, 10000, 2))) == 10000


@pytest.mark.parametrize("repeat", [False, True])
def test_one_document_cannot_be_in_two_splits(tmp_path: Path, tokenizer: Any, repeat: bool) -> None:
    cfg = lines(tmp_path / "x.jsonl", ["one long text, " * 400], repeat=repeat)
    with pytest.raises(
        UserError, match=r"The next row is for validation, .* 1 documents .* of train tokens.*a chapter"
    ):
        list(rows_of(cfg, tokenizer, 100, 2))
    assert len(list(rows_of(cfg, tokenizer, 14, 2))) == 14
    assert len(list(rows_of(cfg, tokenizer, 100, None))) == 100  # a store of before grows on


@pytest.mark.parametrize("documents", [100, 10])
def test_text_that_is_used_again_is_said_to_be(
    documents: int, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"Document number {i} of a hundred, of many words." for i in range(documents)]
    cfg = lines(tmp_path / "x.jsonl", texts, repeat=True)
    rows = list(rows_of(cfg, tokenizer, 150, 1))
    assert len(rows) == 150
    said = capsys.readouterr().out
    assert said.count("is used again; documents stay in their splits") == (documents == 10)
    assert said.count("times a document that came before") == (documents == 10)
    held_out = {int(d) for i, row in enumerate(rows) for d in row["document"] if split_of(i) != TRAIN}
    assert held_out and not held_out & {
        int(d) for i, row in enumerate(rows) for d in row["document"] if split_of(i) == TRAIN
    }


def test_repeating_nothing_ends(tmp_path: Path, tokenizer: Any) -> None:
    cfg = lines(tmp_path / "x.jsonl", [""], repeat=True)
    with pytest.raises(UserError, match="holds 0 tokens"):
        list(rows_of(cfg, tokenizer, 1, 1))


GOLDEN = [0, 3, 4, 3, 7, 6, 13]
GOLDEN_HASH = 17076933094255350507
