"""The activation store, for writers: create or extend it, and write one unit.

Legend: N tokens of a unit, D dimensions.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from google_crc32c import value as crc32c
from skipcoder.pipeline import cli, commit, layout
from skipcoder.pipeline.codec import CODECS, Spec, compressors
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.stats import Moments, pack
from skipcoder.pipeline.store import FORMAT, VERSION, read_attrs

# Holes must be visible: every array's fill value is impossible as data, and chunks that happen to equal
# it are written all the same.
_WRITE_EMPTY: Any = {"write_empty_chunks": True}


def identity_hash(identity: dict[str, Any]) -> str:
    """Short hash of everything that decides the store's bytes, except its length."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def refuse_other_identity(path: Path, attrs: dict[str, Any], identity: dict[str, Any]) -> None:
    """UserError naming the keys in which the store at `path` differs from what is asked for."""
    facts = cli.differences(attrs["identity"], identity)
    if facts:
        raise UserError(f"{path} holds another capture ({facts}); choose another store.path, or delete it")


def create(path: Path, attrs: dict[str, Any]) -> None:
    """Lay out an empty store. `attrs` gives identity, hookpoints and provenance; it has 0 rows until
    `write_tokens` has finished, and a store of 0 rows may be laid out anew."""
    identity = attrs["identity"]
    unit_tokens = identity["unit_rows"] * identity["context"]
    chunk = layout.chunk_rows(unit_tokens)
    codec = CODECS[identity["codec"]]
    attrs = {
        "format": FORMAT,
        "version": VERSION,
        "identity_hash": identity_hash(identity),
        **attrs,
        "rows": 0,
    }
    group = zarr.open_group(path, mode="w", attributes=attrs)
    group.create_group("commits")
    group.create_group("statistics")
    context, unit_rows = identity["context"], identity["unit_rows"]
    group.create_array(
        "tokens",
        shape=(0, context),
        shards=(unit_rows, context),
        chunks=(unit_rows, context),
        dtype="int32",
        fill_value=-1,
        compressors=compressors("zstd"),
        config=_WRITE_EMPTY,
    )
    group.create_array(
        "index",
        shape=(0,),
        shards=(unit_tokens,),
        chunks=(chunk,),
        dtype="uint64",
        fill_value=2**64 - 1,
        compressors=compressors("zstd"),
        config=_WRITE_EMPTY,
    )
    for name, facts in attrs["hookpoints"].items():
        for side, d in (("input", facts["d_in"]), ("output", facts["d_out"])):
            for suffix, spec in codec.arrays.items():
                wide = (d,) if spec.wide else ()
                shard, rows = (1, 1) if spec.per_unit else (unit_tokens, chunk)
                group.create_array(
                    f"{name}/{side}{suffix}",
                    shape=(0, *wide),
                    shards=(shard, *wide),
                    chunks=(rows, *wide),
                    dtype=spec.dtype,
                    fill_value=spec.fill_value,
                    compressors=compressors(identity["compression"], np.dtype(spec.dtype).itemsize),
                    config=_WRITE_EMPTY,
                )


def write_tokens(path: Path, rows: int, token_rows: Iterable[np.ndarray]) -> None:
    """Write the token rows of a new or growing store, then admit them (`rows` in the attributes).

    Rows that are there already must come again, unchanged: anything else is another data source. A last unit that was
    short is touched, and loses its record, only when the source has given all that was asked.
    """
    attrs = read_attrs(path)
    assert attrs is not None
    unit_rows, context, old = attrs["identity"]["unit_rows"], attrs["identity"]["context"], attrs["rows"]
    group = zarr.open_group(path, mode="r+")
    _resize(group["tokens"], rows)
    tokens = _writable(group["tokens"])
    source = iter(token_rows)
    grown_unit: tuple[int, np.ndarray] | None = None
    for unit in range(layout.num_units(rows, unit_rows)):
        span = layout.unit_token_rows(unit, rows, unit_rows)
        block = np.stack([next(source) for _ in span])
        known = min(max(old - span.start, 0), len(span))
        if known and not np.array_equal(tokens[span.start : span.start + known], block[:known]):
            raise UserError(
                f"{path}: the data source gives other tokens than it did when rows {span.start}-{span.stop} "
                f"were stored; choose another store.path"
            )
        if 0 < known < len(span):
            grown_unit = (unit, block)
        elif not known:
            _write_tokens_of(path, tokens, unit, span, block)
    next(source, None)  # lets the source finish its own checks
    _resize(group["index"], rows * context)
    for name, spec in _activation_arrays(attrs).items():
        _resize(group[name], layout.num_units(rows, unit_rows) if spec.per_unit else rows * context)
    if grown_unit is not None:
        unit, block = grown_unit
        commit.withdraw(path, unit)
        _write_tokens_of(path, tokens, unit, layout.unit_token_rows(unit, rows, unit_rows), block)
    group.attrs["rows"] = rows


def _write_tokens_of(path: Path, tokens: Any, unit: int, span: range, block: np.ndarray) -> None:
    (path / _tokens_shard(unit)).unlink(missing_ok=True)
    tokens[span.start : span.stop] = block
    commit.sync(path / _tokens_shard(unit))


def _resize(array: Any, length: int) -> None:
    """Lengthen, never shorten: a growth that failed may have gone further."""
    if array.shape[0] < length:
        array.resize((length, *array.shape[1:]))


def write_unit(
    path: Path, attrs: dict[str, Any], unit: int, pairs: dict[str, tuple[Any, Any]], tokens: np.ndarray
) -> commit.Commit:
    """Permute, encode, write and commit one unit.

    `pairs`: {hookpoint: (input [N, D], output [N, D'])} in token order; `tokens`: the unit's rows.
    """
    identity = attrs["identity"]
    codec = CODECS[identity["codec"]]
    span = layout.unit_token_rows(unit, attrs["rows"], identity["unit_rows"])
    start, stop = span.start * identity["context"], span.stop * identity["context"]
    order = layout.permutation(identity["seed"], unit, stop - start)
    classes = classes_of(attrs, start + order, tokens.ravel()[order])
    shards = _shards(attrs, unit)
    for name in shards:
        (path / name).unlink(missing_ok=True)  # what a killed worker left: zarr would try to read it
    group = zarr.open_group(path, mode="r+")
    _writable(group["index"])[start:stop] = (start + order).astype(np.uint64)
    statistics = {name: commit.statistics_file(name, unit) for name in pairs}
    for name, sides in pairs.items():
        moments: dict[str, Moments] = {}
        for side, z in zip(commit.SIDES, sides, strict=True):
            z = z[torch.from_numpy(order)]
            coded = codec.encode(z)
            for suffix, rows in coded.items():
                place = slice(unit, unit + 1) if codec.arrays[suffix].per_unit else slice(start, stop)
                _writable(group[f"{name}/{side}{suffix}"])[place] = rows
            values = codec.decode(coded).float()
            error_N = (values - z.float()).double().square_().sum(dim=1).numpy()
            for where, chosen in classes.items():
                lost = float(error_N[chosen].sum())
                moments[f"{side}/{where}"] = Moments.of(values.numpy()[chosen], lost)
        commit.write_atomically(path / statistics[name], pack(moments))
    record = commit.Commit(
        identity=attrs["identity_hash"],
        unit=unit,
        rows=(span.start, span.stop),
        tokens_crc32c=crc32c(np.ascontiguousarray(tokens, dtype="<i4").tobytes()),
        shards={
            name: commit.shard_checksum(path / name) for name in [_tokens_shard(unit), *shards, *statistics.values()]
        },
    )
    commit.write(path, record)
    return record


def classes_of(attrs: dict[str, Any], position_N: np.ndarray, token_N: np.ndarray) -> dict[str, np.ndarray]:
    """bool [N] for each class of positions (commit.POSITIONS); flat positions, and the tokens there."""
    is_first = position_N % attrs["identity"]["context"] == 0
    is_special = np.isin(token_N, attrs["special_tokens"]) & ~is_first
    return {"first": is_first, "special": is_special, "other": ~(is_first | is_special)}


def _shards(attrs: dict[str, Any], unit: int) -> list[str]:
    """Files that a unit's worker writes, relative to the store."""
    arrays = _activation_arrays(attrs).items()
    return [f"index/c/{unit}", *(f"{name}/c/{unit}" + ("/0" if spec.wide else "") for name, spec in arrays)]


def _activation_arrays(attrs: dict[str, Any]) -> dict[str, Spec]:
    """All arrays but `tokens` and `index`, by name."""
    specs = CODECS[attrs["identity"]["codec"]].arrays
    return {
        f"{h}/{s}{suffix}": spec for h in attrs["hookpoints"] for s in commit.SIDES for suffix, spec in specs.items()
    }


def _tokens_shard(unit: int) -> str:
    return f"tokens/c/{unit}/0"


def _writable(array: Any) -> Any:
    # The option is not part of the stored metadata: it must be given again at every opening.
    return array.with_config(_WRITE_EMPTY)
