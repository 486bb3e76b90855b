"""Pack documents into full rows of tokens, dropping only the last partial row."""

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig
from skipcoder.pipeline.text import sources

_DOCUMENTS_AT_ONCE = 64


def bos_of(tokenizer: Any) -> int | None:
    """Token that the tokenizer itself puts before a text, or None if it puts none."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def pack(documents: Iterable[str], tokenizer: Any, context: int) -> Iterator[np.ndarray]:
    """Yield rows, int32 [context]: documents joined by the end-of-text token and cut; each row begins with BOS
    if the tokenizer adds one. Empty documents are skipped."""
    bos = bos_of(tokenizer)
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    body = context - (bos is not None)
    pending: list[int] = []
    source = filter(None, documents)
    for some in iter(lambda: list(islice(source, _DOCUMENTS_AT_ONCE)), []):
        encoded = tokenizer(some, add_special_tokens=False, verbose=False).input_ids
        for ids in encoded:
            pending += ids
            if separator is not None:
                pending.append(separator)
        full = len(pending) // body * body
        for start in range(0, full, body):
            row = pending[start : start + body]
            yield np.array(row if bos is None else [bos, *row], dtype=np.int32)
        del pending[:full]


def rows_of(cfg: DataConfig, tokenizer: Any, rows: int) -> Iterator[np.ndarray]:
    """Yield exactly `rows` rows of the configured source, or raise UserError stating how many there are. Says so where
    the text is used again."""
    count = begun = 0
    said = False

    def passes() -> Iterator[Iterable[str]]:
        nonlocal begun
        while cfg.repeat or not begun:
            begun += 1
            yield sources.documents(cfg)

    for row in pack(chain.from_iterable(_nonempty(passes())), tokenizer, cfg.context):
        if count == rows:
            return
        if begun > 1 and not said:
            said = True
            print(
                f"data.repeat=true: the text ends after {count * cfg.context:,} tokens and is used again; so held-out "
                "text is trained on, too, and what is measured on it is not of unseen text"
            )
        count += 1
        yield row
    if count < rows:
        raise UserError(
            f"the data source holds {count * cfg.context:,} tokens in full rows of {cfg.context}, "
            f"but data.tokens asks for {rows * cfg.context:,}; ask for fewer, add data, or set data.repeat=true"
        )


def _nonempty(passes: Iterable[Iterable[str]]) -> Iterator[Iterable[str]]:
    """Yield passes over the source; stop after one without any text, so that `repeat` cannot loop for ever."""
    for documents in passes:
        seen = False

        def watched(source: Iterable[str] = documents) -> Iterator[str]:
            nonlocal seen
            for document in source:
                seen = seen or bool(document)
                yield document

        yield watched()
        if not seen:
            return
