"""Pack documents into full rows of tokens. All rows of a unit are of documents of the unit's split, so that no document
is trained on in part and held out in part.

Legend: T tokens of a row.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig
from skipcoder.pipeline.text import chat, sources
from skipcoder.pipeline.text.chat import TEMPLATE, TEXT
from skipcoder.pipeline.text.splits import SPLITS, TRAIN, split_of

PIECE = np.dtype([("tokens", "<i4"), ("document", "<u8"), ("document_number", "<u4"), ("role", "u1")])
"""A position of a row: its token, the hash of its document's text, the document's place in the source, who wrote it
(ROLES of chat.py). BOS belongs to the document that it precedes, a separator to the one that it ends."""


class Encoded(NamedTuple):
    """A document in tokens."""

    number: int
    """Its place in the source, or among all that were read of a mixture."""
    document: int
    """The hash of its text."""
    ids: Sequence[int]
    roles: np.ndarray | int
    """uint8, of each token or of all."""
    unplaced: int = 0
    """Messages of a conversation whose words the template changed or left out."""


_DOCUMENTS_AT_ONCE = 64


def bos_of(tokenizer: Any) -> int | None:
    """Token that the tokenizer itself puts before a text, or None if it puts none."""
    ids = tokenizer("a").input_ids
    return ids[0] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else None


def beginning(tokenizer: Any) -> int | None:
    """Token that begins a document which attends only to itself: BOS, whether or not the tokenizer puts it there, or
    the end-of-text token. It takes the place of the first word as the one that all others attend to."""
    found: int | None = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return found


def places(number_RT: np.ndarray) -> np.ndarray:
    """int64 [R, T]: how far each position is from where its document begins in its row.

    >>> places(np.array([[5, 5, 6, 6, 6]])).tolist()
    [[0, 1, 0, 1, 2]]
    """
    at_RT = np.broadcast_to(np.arange(number_RT.shape[1]), number_RT.shape)
    begins_RT = np.ones(number_RT.shape, bool)
    begins_RT[:, 1:] = number_RT[:, 1:] != number_RT[:, :-1]
    found: np.ndarray = at_RT - np.maximum.accumulate(np.where(begins_RT, at_RT, 0), axis=1)
    return found


def hash_of(text: str) -> int:
    """A document's 64 bits: equal for equal texts."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")


def documents_by_ends(tokens_RT: np.ndarray, special: Sequence[int], bos: int | None, unit: int) -> np.ndarray:
    """uint64 [R, T]: a number for the document of each position of a unit, told by the special tokens that end one."""
    ends = np.isin(tokens_RT, special)
    ends[:, 0] &= bos is None
    before = ends.ravel().cumsum().reshape(ends.shape) - ends
    return before.astype(np.uint64) + np.uint64(unit << 32)


class Packer:
    """Makes rows of documents, which are joined by a separator and cut.

    A new document goes to the split of the next row, and one whose text came before to the split where it was first. So
    rows depend only on what came before, and what waits for a row of its split is a unit at most (repeated documents
    are left out then) and a document.
    """

    def __init__(
        self,
        context: int,
        bos: int | None,
        unit_rows: int | None,
        most: int | None = None,
        separate: bool = False,
    ) -> None:
        """`unit_rows`: None takes the documents as they come, whatever the splits. `most`: rows that a document gives
        to validation and test at most; the part is chosen by its hash. `separate`: documents bring their own BOS, and
        a row that goes on with one gets another."""
        self._bos, self._unit_rows, self._separate = bos, unit_rows, separate
        self._body = context if separate or bos is None else context - 1
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

    def add(self, one: Encoded) -> Iterator[np.ndarray]:
        """Add a document, yield the rows [T] of PIECE that it fills."""
        document, split, pieces = one.document, self.next_split, np.empty(len(one.ids), PIECE)
        pieces["tokens"], pieces["role"] = one.ids, one.roles
        pieces["document"], pieces["document_number"] = document, one.number
        if self._unit_rows is not None:
            split = self._first.setdefault(document, split)
            if split != self.next_split and len(self._waiting[split]) >= self._unit_rows * self._body:
                self.left_out += 1
                return
        if self._most and split != TRAIN and len(pieces) > self._most:
            start = document % (len(pieces) - self._most + 1)
            pieces = pieces[start : start + self._most]
            if self._separate and start:  # its BOS is cut off
                pieces = np.concatenate([self._begin(pieces), pieces[:-1]])
        self._waiting[split] = np.concatenate([self._waiting[split], pieces])
        while len(self._waiting[self.next_split]) >= self._body:
            row, self._waiting[self.next_split] = np.split(self._waiting[self.next_split], [self._body])
            if self._separate:
                rest = self._waiting[self.next_split]
                if len(rest) and rest["document_number"][0] == row["document_number"][-1]:
                    self._waiting[self.next_split] = np.concatenate([self._begin(rest), rest])
            elif self._bos is not None:
                row = np.concatenate([self._begin(row), row])
            self.rows += 1
            yield row

    def _begin(self, pieces: np.ndarray) -> np.ndarray:
        """BOS before these."""
        first = pieces[:1].copy()
        first["tokens"], first["role"] = self._bos, TEMPLATE
        return first


def encoded(documents: Iterable[sources.Document], tokenizer: Any, before: Sequence[int] = ()) -> Iterator[Encoded]:
    """The documents that are not empty, with `before` in front. Texts have the end-of-text token behind them;
    conversations end as their template has it."""
    separator = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    behind = [] if separator is None else [separator]
    source = ((number, document) for number, document in enumerate(documents) if document)
    for some in iter(lambda: list(islice(source, _DOCUMENTS_AT_ONCE)), []):
        texts = [document for _, document in some if isinstance(document, str)]
        tokens = iter(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids if texts else [])
        for number, document in some:
            if isinstance(document, str):
                yield Encoded(number, hash_of(document), [*before, *next(tokens), *behind], TEXT)
            else:
                text, ids, roles, unplaced = chat.encode(tokenizer, document)
                again = len(before) if ids[: len(before)] == list(before) else 0  # the template may put BOS itself
                lead = before[again:]
                roles = np.concatenate([np.full(len(lead), TEMPLATE, np.uint8), roles])
                yield Encoded(number, hash_of(text), [*lead, *ids], roles, unplaced)


class Mixture:
    """The documents of a mixture: each time the next of the source that is furthest behind its share of the tokens. So
    shares hold within a document at every point."""

    def __init__(self, cfg: DataConfig, tokenizer: Any, before: Sequence[int] = ()) -> None:
        self._cfg, self._tokenizer, self._before = cfg, tokenizer, before
        self.rounds = [0] * len(cfg.sources)
        """How often each source has begun again."""

    def __iter__(self) -> Iterator[Encoded]:
        """UserError where a source ends, unless it may be repeated."""
        ones = [sources.of_mix(self._cfg, one) for one in self._cfg.sources]
        streams = [encoded(sources.documents(one), self._tokenizer, self._before) for one in ones]
        given, weights = [0] * len(ones), [one.weight for one in self._cfg.sources]
        for number in count():
            i = min(range(len(ones)), key=lambda i: given[i] / weights[i])
            one = next(streams[i], None)
            if one is None:
                if not self._cfg.repeat or not given[i]:
                    raise UserError(
                        f"data.sources: {ones[i].path or ones[i].kind} ends after {given[i]:,} tokens, its share of "
                        f"{sum(given):,}; give it less weight, ask for fewer data.tokens, or set data.repeat=true"
                    )
                if not any(self.rounds):
                    print(f"data.repeat=true: {ones[i].path or ones[i].kind} ends and is used again")
                self.rounds[i] += 1
                streams[i] = encoded(sources.documents(ones[i]), self._tokenizer, self._before)
                one = next(streams[i])
            given[i] += len(one.ids)
            yield one._replace(number=number)


def rows_of(cfg: DataConfig, tokenizer: Any, rows: int, unit_rows: int | None) -> Iterator[np.ndarray]:
    """Yield exactly `rows` rows [T] of PIECE, or raise UserError stating how many there are. Says so where the text is
    used again. `unit_rows`: rows of a unit, None if documents may cross splits."""
    first = beginning(tokenizer) if cfg.separate else bos_of(tokenizer)
    if cfg.separate and first is None:
        raise UserError("data.separate=true needs a BOS or an end-of-text token, and this tokenizer has neither")
    packer = Packer(cfg.context, first, unit_rows, cfg.held_out_rows, cfg.separate)
    lead = [first] if cfg.separate and first is not None else []
    mixture = Mixture(cfg, tokenizer, lead) if cfg.sources else None
    found, unplaced, last, again, rounds = 0, 0, -1, 0, 0
    while True:
        before = packer.rows, packer.waiting[packer.next_split]
        for one in mixture or encoded(sources.documents(cfg), tokenizer, lead):
            found, unplaced, done = found + (not again), unplaced + one.unplaced, packer.rows
            last = max(last, one.number)
            if again and cfg.separate:  # the same document behind itself is another
                one = one._replace(number=one.number + again)
            for row in packer.add(one):
                yield row
                if packer.rows == rows:
                    return _say_what_is_left_out(packer, unplaced)
            if mixture is not None and packer.rows > done:
                rounds = min(mixture.rounds)
            elif mixture is not None and min(mixture.rounds) > rounds + 1:  # all were used again, and gave no row
                raise _too_little(cfg, packer, rows, found)
        if not cfg.repeat or before == (packer.rows, packer.waiting[packer.next_split]):
            raise _too_little(cfg, packer, rows, found)
        if not again:
            apart = "held-out text is trained on, too" if unit_rows is None else "documents stay in their splits"
            print(
                f"data.repeat=true: the text ends after {packer.rows * cfg.context:,} tokens and is used again; {apart}"
            )
        again += last + 1


def _say_what_is_left_out(packer: Packer, unplaced: int) -> None:
    if unplaced:
        print(
            f"the chat template changed or left out the words of {unplaced:,} messages: they have no role but its own"
        )
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
