"""Reuse the token rows of a store of the same text, so that they need not be made twice."""

from contextlib import suppress
from typing import Any

from skipcoder.errors import UserError
from skipcoder.pipeline.store import layout
from skipcoder.pipeline.store.attrs import Identity, read_attrs
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.splits import EVERY


def neighbour_with(place: Place, identity: Identity, rows: int, unit_rows: int | None) -> ActivationStore | None:
    """A store beside `place` whose first `rows` rows are those that the text would give: with the same text, tokenizer,
    context, splits and `unit_rows` (None: any that gives each split a unit), whatever its hookpoints. None if there is
    none."""

    def source(of: Identity) -> tuple[Any, ...]:
        splits = of.get("split_scheme"), of.get("held_out_rows")
        return of["data"], of["context"], of["repeat"], of["model"]["fingerprint"], splits

    def fits(units_of: int) -> bool:
        return units_of == unit_rows if unit_rows else layout.num_units(rows, units_of) >= EVERY

    neighbours: list[Place] = []
    with suppress(UserError, OSError):  # a folder that we may not list
        neighbours = place.neighbours()
    for neighbour in neighbours:
        with suppress(UserError, OSError):  # not a store that can be read
            attrs = read_attrs(neighbour)
            if attrs is None or attrs["rows"] < rows or source(attrs["identity"]) != source(identity):
                continue
            if fits(attrs["identity"]["unit_rows"]):
                return ActivationStore(neighbour, attrs)
    return None
