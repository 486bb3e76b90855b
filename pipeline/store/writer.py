"""The activation store, for writers: create or extend it, and write one unit.

Every file is made in memory and written in one step (`place.py`), its bytes a function of the store's identity and
length alone: writing it twice, by a retry or by two captures, changes nothing.

Legend: N tokens of a unit, D dimensions.
"""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import zarr
from crc32c import crc32c
from zarr.storage import MemoryStore

from skipcoder.errors import UserError
from skipcoder.pipeline.store import commit, layout, shards
from skipcoder.pipeline.store.attrs import (
    FILE,
    Attributes,
    read_attrs,
    refuse_other_identity,
    write_rows,
)
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.stats import Moments, pack


def create(place: Place, attrs: Attributes) -> Attributes:
    """Lay out an empty store and return its attributes; it has 0 rows until `write_tokens` has finished.

    Metadata already present, from a capture that was killed or runs beside this one, is kept: the same identity gives
    the same metadata.
    """
    files: dict[str, Any] = {}
    group = zarr.create_group(MemoryStore(files), attributes=dict(attrs))
    group.create_group("commits")
    group.create_group("statistics")
    for name, array in layout.arrays(attrs).items():
        group.create_array(name, shape=(0, *array.chunk[1:]), **array.create)
    for name in sorted(files, key=lambda name: (name != FILE, name)):  # the store's own first: it claims the place
        place.create(name, files[name].to_bytes())
    laid_out = read_attrs(place)
    assert laid_out is not None
    refuse_other_identity(place, laid_out, attrs["identity"])
    return laid_out


def write_tokens(place: Place, attrs: Attributes, rows: int, token_rows: Iterable[np.ndarray]) -> None:
    """Write the token rows (of PIECE, text/rows.py) of a new or growing store, then record their number (`rows` in the
    attributes).

    The source must give the rows already stored again, unchanged; otherwise it is a different source. A last unit that
    was short is rewritten, and loses its record, only when the source has given all rows that were requested.
    """
    unit_rows, context, old = attrs["identity"]["unit_rows"], attrs["identity"]["context"], attrs["rows"]
    arrays, of_text = layout.arrays(attrs), layout.text_arrays(attrs)
    stored: Any = zarr.open_group(place.zarr(), mode="r")["tokens"]
    source = iter(token_rows)
    grown_unit: tuple[int, np.ndarray] | None = None

    def write(unit: int, block: np.ndarray) -> None:
        for name in of_text:
            place.write(f"{name}/c/{unit}/0", *shards.encode(arrays[name], block[name]))

    for unit in range(layout.num_units(rows, unit_rows)):
        span = layout.unit_token_rows(unit, rows, unit_rows)
        block = np.stack([next(source) for _ in span])
        known = min(max(old - span.start, 0), len(span))
        if known and not np.array_equal(stored[span.start : span.start + known], block["tokens"][:known]):
            raise UserError(
                f"{place}: the data source gives other tokens than it did when rows {span.start}-{span.stop} "
                f"were stored; choose another store.path"
            )
        if 0 < known < len(span):
            grown_unit = (unit, block)
        elif not known:
            write(unit, block)
    next(source, None)  # lets the source finish its own checks
    for name, array in arrays.items():
        length = layout.num_units(rows, unit_rows) if array.spec.per_unit else rows
        length *= 1 if array.spec.per_unit or name in of_text else context
        metadata = json.loads(place.read(f"{name}/zarr.json"))
        if metadata["shape"][0] < length:  # lengthen, never shorten: a growth that failed may have gone further
            metadata["shape"][0] = length
            place.write(f"{name}/zarr.json", json.dumps(metadata, indent=2).encode())
    if grown_unit is not None:
        commit.withdraw(place, grown_unit[0])
        write(*grown_unit)
    write_rows(place, rows)
    if grown_unit is not None:  # again: a worker of the shorter capture may have been alive until now
        commit.withdraw(place, grown_unit[0])


FILES_AT_ONCE = 4
"""Files of a unit that are compressed and written at the same time."""


class CodedUnit(NamedTuple):
    """A unit as it will be stored, in memory."""

    unit: int
    tokens: np.ndarray
    """The unit's token rows."""
    arrays: dict[str, np.ndarray]
    """Rows of each array, permuted by `layout.permutation`."""
    moments: dict[str, dict[str, Moments]]
    """Hookpoint -> `<side>/<class of positions>` -> moments."""


def write_unit(place: Place, attrs: Attributes, coded: CodedUnit) -> commit.Commit:
    """Compress, write and commit a unit."""
    unit, layouts = coded.unit, layout.arrays(attrs)
    unit_rows = attrs["identity"]["unit_rows"]
    span = layout.unit_token_rows(unit, attrs["rows"], unit_rows)
    of_text = (f"{name}/c/{unit}/0" for name in layout.text_arrays(attrs))
    written = {name: commit.checksum(place.read(name)) for name in of_text}

    def write(name: str, *pieces: bytes | memoryview) -> None:
        place.write(name, *pieces)
        written[name] = commit.checksum(*pieces)

    def write_shard(name: str, rows: np.ndarray) -> None:
        file = "/".join([name, "c", str(unit), *["0"] * (rows.ndim - 1)])
        write(file, *shards.encode(layouts[name], rows))

    with ThreadPoolExecutor(FILES_AT_ONCE) as threads:
        list(threads.map(write_shard, coded.arrays.keys(), coded.arrays.values()))
        names = (commit.statistics_file(hookpoint, unit) for hookpoint in coded.moments)
        list(threads.map(write, names, map(pack, coded.moments.values())))
    if len(span) < unit_rows:  # the last unit, unless another capture has made the store grow
        now = read_attrs(place)
        if now is None or now["rows"] != attrs["rows"]:
            raise UserError(f"{place} has grown while it was captured; run the longer capture again")
    record = commit.Commit(
        identity=attrs["identity_hash"],
        unit=unit,
        rows=(span.start, span.stop),
        tokens_crc32c=crc32c(np.ascontiguousarray(coded.tokens, dtype="<i4").tobytes()),
        shards=written,
    )
    commit.write(place, record)
    return record


def classes_of(attrs: Attributes, position_N: np.ndarray, token_N: np.ndarray) -> dict[str, np.ndarray]:
    """bool [N] for each class of positions (commit.POSITIONS), from flat positions and their tokens."""
    is_first = position_N % attrs["identity"]["context"] == 0
    is_special = np.isin(token_N, attrs["special_tokens"]) & ~is_first
    return {"first": is_first, "special": is_special, "other": ~(is_first | is_special)}
