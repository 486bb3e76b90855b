"""Reuse the token rows of a store of the same text, so that they need not be made twice."""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import numpy as np

from skipcoder.errors import UserError
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.attrs import Identity, read_attrs
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.reader import ActivationStore


def neighbour_with(place: Place, identity: Identity, rows: int) -> ActivationStore | None:
    """A store beside `place` with the same text, tokenizer and context and at least `rows` rows, whatever its
    hookpoints; None if there is none. Its rows are those that the text would give."""

    def source(of: Identity) -> tuple[Any, ...]:
        return of["data"], of["context"], of["repeat"], of["model"]["fingerprint"]

    neighbours: list[Place] = []
    with suppress(UserError, OSError):  # a folder that we may not list
        neighbours = place.neighbours()
    for neighbour in neighbours:
        with suppress(UserError, OSError):  # not a store that can be read
            attrs = read_attrs(neighbour)
            if attrs is not None and attrs["rows"] >= rows and source(attrs["identity"]) == source(identity):
                return ActivationStore(neighbour, attrs)
    return None


def stored_rows(store: ActivationStore, rows: int) -> Iterator[np.ndarray]:
    """The first `rows` token rows of a store."""
    units = range(layout.num_units(rows, store.unit_rows))
    return islice((row for unit in units for row in store.tokens(unit)), rows)
