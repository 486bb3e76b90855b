"""Passages that two texts share, against the plain way of finding them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcoder import cli
from skipcoder.pipeline import store_cli
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.chat import TEXT
from skipcoder.pipeline.text.overlap import NGRAM, shared
from skipcoder.pipeline.text.rows import Encoded, Packer
from skipcoder.pipeline.text.splits import SPLITS, split_of

rows = st.lists(st.lists(st.integers(0, 2), min_size=8, max_size=8), min_size=1, max_size=5)


@settings(deadline=None)
@given(mine=rows, theirs=rows, n=st.integers(1, 9))
def test_shared_is_what_sets_of_tuples_say(mine: Any, theirs: Any, n: int) -> None:
    def grams(rows: Any) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + n]) for row in rows for i in range(8 - n + 1)]

    found = shared([np.array([row]) for row in mine], [np.array(theirs)], n)
    both = [gram in set(grams(theirs)) for gram in grams(mine)]
    assert found == (pytest.approx(np.mean(both)) if both else None)


def by_split(split: Any, documents: list[tuple[int, np.ndarray]], unit_rows: int | None) -> float | None:
    packer = Packer(64, 0, unit_rows)
    rows = [
        row["tokens"]
        for i, (key, ids) in enumerate(documents)
        for row in packer.add(Encoded(i, key, ids.tolist(), TEXT))
    ]
    of: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    for i, row in enumerate(rows):
        of[split(i // 4)].append(row[None])
    return shared(of["test"], of["train"])


def test_planted_duplicates_and_long_documents_share_nothing_across_splits() -> None:
    """Documents of many rows, one in three of them twice, of tokens so many that no passage occurs twice by chance."""
    rng = np.random.default_rng(0)
    documents = [(key, rng.integers(0, 50_000, rng.integers(20, 900))) for key in range(200)]
    documents += [documents[i] for i in range(0, 200, 3)]
    documents = [documents[i] for i in rng.permutation(len(documents))]
    assert by_split(split_of, documents, 4) == 0
    crossing = by_split(split_of, documents, None)  # rows as they come, as stores once had them
    assert crossing is not None and crossing > 0.1


def test_info_says_what_the_splits_are_made_of(store: ActivationStore, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # found, and found again beside the store
        assert store_cli.info(store.place) == cli.DONE
        said = capsys.readouterr().out
        for split in SPLITS:
            documents = {int(d) for unit in store.split(split) for d in store.documents(unit).flat}
            tokens = sum(store.tokens(unit).size for unit in store.split(split))
            assert f"\n{split:12}{tokens:,} tokens of {len(documents)} documents" in said
        assert ("stands in train, too" in said) == (store.context > NGRAM)
        assert "document-1" in said
