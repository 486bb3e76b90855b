"""Pack documents into full rows of tokens. All rows of a unit are of documents of the unit's split, so that no document
is trained on in part and held out in part.

Legend: T tokens of a row.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig
from skipcoder.pipeline.text import sources
from skipcoder.pipeline.text.splits import SPLITS, TRAIN, split_of

PIECE = np.dtype([("tokens", "<i4"), ("document", "<u8"), ("document_number", "<u4")])
"""A position of a row: its token, the hash of its document's text, the document's place in the source. BOS belongs to
the document that it precedes, a separator to the one that it ends."""

_DOCUMENTS_AT_ONCE = 64


def bos_of(tokenizer: Any) -> int | None:
    """Token that the tokenizer itself puts before a text, or None if it puts none."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def hash_of(text: str) -> int:
    """A document's 64 bits: equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


class Packer:
    """Makes rows of documents, which are joined by a separator and cut.

    A new document goes to the split of the next row, and one whose text came before to the split where it was first. So
    rows depend only on what came before, and what waits for a row of its split is a unit at most (repeated documents
    are left out then) and a document.
    """

    def __init__(self, context: int, bos: int | None, unit_rows: int | None, most: int | None = None) -> None:
        """`unit_rows`: None takes the documents as they come, whatever the splits. `most`: rows that a document gives
        to validation and test at most; the part is chosen by its hash."""
        self._bos, self._body, self._unit_rows = bos, context - (bos is not None), unit_rows
        self._most = most and most * self._body
        self._first: dict[int, str] = {}
        self._waiting = {split: np.empty(0, PIECE) for split in SPLITS}
        self.rows = self.left_out = 0

    @property
    def next_split(self) -> str:
        """The split of the next row."""
        return TRAIN if self._unit_rows is None else split_of(self.rows // self._unit_rows)

    @property
    def waiting(self) -> dict[str, int]:
        """Tokens of each split that are in no row yet."""
        return {split: len(pieces) for split, pieces in self._waiting.items()}

    def add(self, number: int, document: int, ids: list[int]) -> Iterator[np.ndarray]:
        """Add a document, yield the rows [T] of PIECE that it fills. `document`: its hash."""
        split = self.next_split
        if self._unit_rows is not None:
            split = self._first.setdefault(document, split)
            if split != self.next_split and len(self._waiting[split]) >= self._unit_rows * self._body:
                self.left_out += 1
                return
        if self._most and split != TRAIN and len(ids) > self._most:
            start = document % (len(ids) - self._most + 1)
            ids = ids[start : start + self._most]
        pieces = np.empty(len(ids), PIECE)
        pieces["tokens"], pieces["document"], pieces["document_number"] = ids, document, number
        self._waiting[split] = np.concatenate([self._waiting[split], pieces])
        while len(self._waiting[self.next_split]) >= self._body:
            row, self._waiting[self.next_split] = np.split(self._waiting[self.next_split], [self._body])
            if self._bos is not None:
                first = row[:1].copy()
                first["tokens"] = self._bos
                row = np.concatenate([first, row])
            self.rows += 1
            yield row


def encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[tuple[int, int, list[int]]]:
    """(place in the source, hash, tokens with the end-of-text token behind) of each document that is not empty."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    behind = [] if separator is None else [separator]
    source = ((number, text) for number, text in enumerate(documents) if text)
    for some in iter(lambda: list(islice(source, _DOCUMENTS_AT_ONCE)), []):
        tokens = tokenizer([text for _, text in some], add_special_tokens=False, verbose=False).input_ids
        for (number, text), ids in zip(some, tokens, strict=True):
            yield number, hash_of(text), ids + behind


def rows_of(cfg: DataConfig, tokenizer: Any, rows: int, unit_rows: int | None) -> Iterator[np.ndarray]:
    """Yield exactly `rows` rows [T] of PIECE, or raise UserError stating how many there are. Says so where the text is
    used again. `unit_rows`: rows of a unit, None if documents may cross splits."""
    packer = Packer(cfg.context, bos_of(tokenizer), unit_rows, cfg.held_out_rows)
    found, again = 0, False
    while True:
        before = packer.rows, packer.waiting[packer.next_split]
        for number, document, ids in encoded(sources.documents(cfg), tokenizer):
            found += not again
            for row in packer.add(number, document, ids):
                yield row
                if packer.rows == rows:
                    return _say_what_is_left_out(packer)
        if not cfg.repeat or before == (packer.rows, packer.waiting[packer.next_split]):
            raise _too_little(cfg, packer, rows, found)
        if not again:
            again = True
            apart = "held-out text is trained on, too" if unit_rows is None else "documents stay in their splits"
            print(
                f"data.repeat=true: the text ends after {packer.rows * cfg.context:,} tokens and is used again; {apart}"
            )


def _say_what_is_left_out(packer: Packer) -> None:
    if packer.left_out:
        print(f"left out: {packer.left_out:,} times a document that came before, where its split had text enough")


def _too_little(cfg: DataConfig, packer: Packer, rows: int, documents: int) -> UserError:
    waiting = ", ".join(f"{tokens:,} of {split}" for split, tokens in packer.waiting.items() if tokens)
    said = (
        f"the data source holds {packer.rows * cfg.context:,} tokens in full rows of {cfg.context}, "
        f"but data.tokens asks for {rows * cfg.context:,}; ask for fewer, add data, or set data.repeat=true"
    )
    if sum(packer.waiting.values()) > cfg.context:
        said += (
            f". The next row is for {packer.next_split}, and no document is in two splits: of its {documents:,} "
            f"documents are left over {waiting} tokens. Smaller documents leave less: for example a chapter each, "
            "or a paragraph"
        )
    return UserError(said)
