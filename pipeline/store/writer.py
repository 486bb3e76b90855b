"""The activation store, for writers: create or extend it, and write one unit.

Every file is made in memory and written in one step (`place.py`), its bytes a function of the store's identity and
length alone: writing it twice, by a retry or by two captures, changes nothing.

Legend: N tokens of a unit, D dimensions.
"""

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import zarr
from google_crc32c import value as crc32c
from zarr.storage import MemoryStore

from skipcoder.errors import UserError
from skipcoder.pipeline.store import commit, layout, shards
from skipcoder.pipeline.store.attrs import (
    FILE,
    Attributes,
    Described,
    new_attrs,
    read_attrs,
    refuse_other_identity,
    write_rows,
)
from skipcoder.pipeline.store.codec import CODECS
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.stats import Moments, pack

if TYPE_CHECKING:
    from torch import Tensor


def create(place: Place, described: Described) -> Attributes:
    """Lay out an empty store and return its attributes; it has 0 rows until `write_tokens` has finished.

    Metadata already present, from a capture that was killed or runs beside this one, is kept: the same identity gives
    the same metadata.
    """
    files: dict[str, Any] = {}
    attrs = new_attrs(described)
    group = zarr.create_group(MemoryStore(files), attributes=dict(attrs))
    group.create_group("commits")
    group.create_group("statistics")
    for name, array in layout.arrays(attrs).items():
        group.create_array(name, shape=(0, *array["chunks"][1:]), **array)
    for name in sorted(files, key=lambda name: (name != FILE, name)):  # the store's own first: it claims the place
        place.create(name, files[name].to_bytes())
    laid_out = read_attrs(place)
    assert laid_out is not None
    refuse_other_identity(place, laid_out, attrs["identity"])
    return laid_out


def write_tokens(place: Place, attrs: Attributes, rows: int, token_rows: Iterable[np.ndarray]) -> None:
    """Write the token rows of a new or growing store, then record their number (`rows` in the attributes).

    The source must give the rows already stored again, unchanged; otherwise it is a different source. A last unit that
    was short is rewritten, and loses its record, only when the source has given all rows that were requested.
    """
    unit_rows, context, old = attrs["identity"]["unit_rows"], attrs["identity"]["context"], attrs["rows"]
    arrays = layout.arrays(attrs)
    stored: Any = zarr.open_group(place.zarr(), mode="r")["tokens"]
    source = iter(token_rows)
    grown_unit: tuple[int, np.ndarray] | None = None

    def write(unit: int, block: np.ndarray) -> None:
        place.write(f"tokens/c/{unit}/0", shards.encode(arrays["tokens"], block))

    for unit in range(layout.num_units(rows, unit_rows)):
        span = layout.unit_token_rows(unit, rows, unit_rows)
        block = np.stack([next(source) for _ in span])
        known = min(max(old - span.start, 0), len(span))
        if known and not np.array_equal(stored[span.start : span.start + known], block[:known]):
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
        per_unit = array["shards"][0] == 1
        length = layout.num_units(rows, unit_rows) if per_unit else rows * (1 if name == "tokens" else context)
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


def write_unit(
    place: Place, attrs: Attributes, unit: int, pairs: dict[str, tuple[Any, Any]], tokens: np.ndarray
) -> commit.Commit:
    """Permute, encode, write and commit one unit.

    `pairs`: {hookpoint: (input [N, D], output [N, D'])} in token order; `tokens`: the unit's rows.
    """
    import torch

    identity = attrs["identity"]
    codec = CODECS[identity["codec"]]
    arrays = layout.arrays(attrs)
    span = layout.unit_token_rows(unit, attrs["rows"], identity["unit_rows"])
    start = span.start * identity["context"]
    order = layout.permutation(identity["seed"], unit, len(span) * identity["context"])
    classes = classes_of(attrs, start + order, tokens.ravel()[order])
    written = {f"tokens/c/{unit}/0": commit.checksum(place.read(f"tokens/c/{unit}/0"))}

    def write(name: str, content: bytes) -> None:
        place.write(name, content)
        written[name] = commit.checksum(content)

    write(f"index/c/{unit}", shards.encode(arrays["index"], (start + order).astype(np.uint64)))
    for name, sides in pairs.items():
        moments: dict[str, Moments] = {}
        for side, z in zip(commit.SIDES, sides, strict=True):
            z = z[torch.from_numpy(order)]
            coded = codec.encode(z)
            for suffix, rows in coded.items():
                array = f"{name}/{side}{suffix}"
                file = "/".join([array, "c", str(unit), *["0"] * (rows.ndim - 1)])
                write(file, shards.encode(arrays[array], rows))
            values = codec.decode(coded)
            error_N = _squared_error(values, z)
            for where, chosen in classes.items():
                rows_of_class = values[torch.from_numpy(chosen)].float().numpy()
                moments[f"{side}/{where}"] = Moments.of(rows_of_class, float(error_N[chosen].sum()))
        write(commit.statistics_file(name, unit), pack(moments))
    if len(span) < identity["unit_rows"]:  # the last unit, unless another capture has made the store grow
        now = read_attrs(place)
        if now is None or now["rows"] != attrs["rows"]:
            raise UserError(f"{place} has grown while it was captured; run the longer capture again")
    record = commit.Commit(
        identity=attrs["identity_hash"],
        unit=unit,
        rows=(span.start, span.stop),
        tokens_crc32c=crc32c(np.ascontiguousarray(tokens, dtype="<i4").tobytes()),
        shards=written,
    )
    commit.write(place, record)
    return record


def _squared_error(values_ND: "Tensor", z_ND: "Tensor") -> np.ndarray:
    """float64 [N]: squared distance between what will be read and what the model gave."""
    import torch

    if values_ND.dtype == z_ND.dtype and torch.equal(values_ND, z_ND):
        return np.zeros(len(z_ND))
    parts = zip(values_ND.split(1024), z_ND.split(1024), strict=True)  # the float64 copy stays small
    return np.concatenate([(a.double() - b.double()).square_().sum(dim=1).numpy() for a, b in parts])


def classes_of(attrs: Attributes, position_N: np.ndarray, token_N: np.ndarray) -> dict[str, np.ndarray]:
    """bool [N] for each class of positions (commit.POSITIONS), from flat positions and their tokens."""
    is_first = position_N % attrs["identity"]["context"] == 0
    is_special = np.isin(token_N, attrs["special_tokens"]) & ~is_first
    return {"first": is_first, "special": is_special, "other": ~(is_first | is_special)}
