"""Mixtures: each source has its share of the tokens."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig, ModelConfig, SourceConfig, SourceKind
from skipcoder.pipeline.model.load import load_tokenizer
from skipcoder.pipeline.text import sources
from skipcoder.pipeline.text.chat import ROLES
from skipcoder.pipeline.text.rows import Encoded, Mixture, rows_of
from tests.pipeline.text.test_chat import TEMPLATE, talks


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    found = load_tokenizer(ModelConfig(name="tiny", id=str(tiny_model)))
    found.chat_template = TEMPLATE
    return found


def write_lines(file: Path, records: list[dict[str, Any]]) -> SourceConfig:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return SourceConfig(path=str(file))


def mixture(tmp_path: Path, *weights: float, many: int = 4000, **more: Any) -> DataConfig:
    """Short texts, long ones, and conversations."""
    short = write_lines(tmp_path / "short.jsonl", [{"text": f"a few words {i}"} for i in range(20 * many)])
    long = write_lines(tmp_path / "long.jsonl", [{"text": f"number {i} of many words, " * 40} for i in range(many)])
    talk = write_lines(tmp_path / "talk.jsonl", [{"messages": talk} for talk in talks(6 * many)])
    talk.chat = True
    ones = [short, long, talk][: len(weights)]
    for one, weight in zip(ones, weights, strict=True):
        one.weight = weight
    return DataConfig(kind=SourceKind.mix, sources=ones, context=32, **more)


def source_of(one: Encoded, tokenizer: Any) -> int:
    if isinstance(one.roles, np.ndarray):
        return 2
    return 1 if len(one.ids) > 100 else 0


@pytest.mark.slow
def test_sources_hold_their_shares(tokenizer: Any, tmp_path: Path) -> None:
    """Within 1 % over a million tokens, and within a document everywhere; the same at every start."""
    cfg = mixture(tmp_path, 5.0, 3.0, 2.0)
    given, total = np.zeros(3), 0
    first: list[Encoded] = []
    for one in Mixture(cfg, tokenizer):
        first += [one] if len(first) < 500 else []
        given[source_of(one, tokenizer)] += len(one.ids)
        total += len(one.ids)
        if total > 20_000:
            np.testing.assert_allclose(given / total, [0.5, 0.3, 0.2], atol=0.03)
        if total > 1_000_000:
            break
    np.testing.assert_allclose(given / total, [0.5, 0.3, 0.2], rtol=0.01)
    again = list(islice(Mixture(cfg, tokenizer), 500))
    assert [(a.number, list(a.ids)) for a in first] == [(b.number, list(b.ids)) for b in again]
    few, more = (list(rows_of(cfg, tokenizer, rows, 4)) for rows in (40, 60))
    assert all(np.array_equal(a, b) for a, b in zip(few, more, strict=False))  # a store that grows goes on with it
    assert {ROLES[role] for row in more for role in row["role"]} >= {"text", "user", "assistant", "template"}


def test_a_source_that_ends(tokenizer: Any, tmp_path: Path) -> None:
    cfg = mixture(tmp_path, 1.0, 1.0, many=3)
    with pytest.raises(
        UserError, match=r"data.sources: .*short.jsonl ends after \d+ tokens, its share of [\d,]+; give"
    ):
        list(rows_of(cfg, tokenizer, 1000, None))
    cfg.repeat = True
    assert len(list(rows_of(cfg, tokenizer, 300, None))) == 300
    few = [write_lines(tmp_path / f"{name}.jsonl", [{"text": f"{name} {i}"} for i in range(3)]) for name in "ab"]
    none_left = DataConfig(kind=SourceKind.mix, sources=few, context=8, repeat=True)
    with pytest.raises(UserError, match=r"but data.tokens asks for 80,000"):
        list(rows_of(none_left, tokenizer, 10_000, 16))  # the same few documents, and none for another split
    facts = sources.identity(cfg)
    cfg.sources[0].weight = 2.0
    assert facts["kind"] == "mix" and sources.identity(cfg)["fingerprint"] != facts["fingerprint"]
    for bad, said in (
        (DataConfig(kind=SourceKind.mix, chat=True, sources=cfg.sources), "each source of data.kind=mix has a chat"),
        (DataConfig(kind=SourceKind.mix), "data.kind=mix needs data.sources"),
        (DataConfig(kind=SourceKind.jsonl, path="x", sources=cfg.sources), "data.sources is for data.kind=mix"),
        (DataConfig(kind=SourceKind.mix, sources=[SourceConfig()]), "data.path is missing"),
    ):
        with pytest.raises(UserError, match=said):
            sources.check(bad)
    with pytest.raises(UserError, match=r"weight=-1 must be above 0"):
        SourceConfig(weight=-1)
