"""Two stores of the same tokens as one, for coders between two models."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.store.attrs import read_attrs
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments

OTHER = "other:"
"""Begins the names of the second store's hookpoints."""

_ALIKE = ("context", "unit_rows", "seed", "split_scheme", "codec")
"""Parts of both identities that must agree: where tokens lie, in which order, and how activations are coded."""


class JoinedStore(ActivationStore):
    """A store with the hookpoints of another one beside its own. Everything else is the first one's."""

    def __init__(self, first: ActivationStore, other: ActivationStore) -> None:
        """Both hold the same tokens in the same order, which `open_stores` has made sure of."""
        theirs = {OTHER + name: facts for name, facts in other.hookpoints.items()}
        both = first.attrs["identity_hash"] + other.attrs["identity_hash"]
        attrs = {**first.attrs, "hookpoints": first.hookpoints | theirs}
        attrs["identity_hash"] = hashlib.sha256(both.encode()).hexdigest()[:32]
        super().__init__(first.place, attrs)  # type: ignore[arg-type]
        self.first, self.other = first, other
        self.commits = first.commits  # under its own identity

    @property
    def content(self) -> str:
        """Hash of both contents."""
        return hashlib.sha256((self.first.content + self.other.content).encode()).hexdigest()[:32]

    def moments(
        self, hookpoint: str, side: str, split: str | None = "train", positions: tuple[str, ...] = ("other",)
    ) -> Moments:
        """Merged statistics of one side, from the store that has it."""
        store, name = self._owner(hookpoint)
        return store.moments(name, side, split, positions)

    def read(self, name: str, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop) of an array of either store."""
        store, own = self._owner(name)
        return store.read(own, start, stop, out)

    def _owner(self, name: str) -> tuple[ActivationStore, str]:
        return (self.other, name.removeprefix(OTHER)) if name.startswith(OTHER) else (self.first, name)


def _refuse_unlike(first: ActivationStore, other: ActivationStore) -> None:
    def facts(store: ActivationStore) -> dict[str, object]:
        found = {key: store.attrs["identity"].get(key) for key in _ALIKE}
        separate = bool(store.attrs["identity"]["data"].get("separate"))
        return found | {"data.separate": separate, "format": store.attrs["version"], "rows": store.rows}

    here, there = facts(first), facts(other)
    differ = [f"{key} {here[key]} and {there[key]}" for key in here if here[key] != there[key]]
    if differ:
        raise UserError(
            f"{first.place} and {other.place} do not align: {'; '.join(differ)}; capture the second with the first "
            "one's data, store.unit_rows, store.codec and seed"
        )
    for unit, record in first.commits.items():
        if unit in other.commits and record.tokens_crc32c != other.commits[unit].tokens_crc32c:
            raise UserError(
                f"{first.place} and {other.place} hold different tokens (from row {record.rows[0]:,} on); capture both "
                "from the same text, with models that share a tokenizer"
            )


def open_stores(path: str | Path | Place, other: str | Path | Place | None = None) -> ActivationStore:
    """Open a store, or two as one. UserError unless both hold the same tokens in the same order."""
    first = ActivationStore.open(path)
    if other is None:
        return first
    second = ActivationStore.open(other)
    _refuse_unlike(first, second)
    return JoinedStore(first, second)


def addresses(store: ActivationStore) -> list[str]:
    """Return what `opened_again` takes."""
    stores = [store.first, store.other] if isinstance(store, JoinedStore) else [store]
    return [one.place.address for one in stores]


def opened_again(places: Sequence[str]) -> ActivationStore:
    """Open, without looking at its files again, what another process has opened."""
    stores = []
    for place in map(place_at, places):
        attrs = read_attrs(place)
        assert attrs is not None
        stores.append(ActivationStore(place, attrs))
    return stores[0] if len(stores) == 1 else JoinedStore(*stores)
