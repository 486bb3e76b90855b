"""Re-read a store and compare everything with its commit records."""

import json
from collections.abc import Iterator

import numpy as np
from crc32c import crc32c

from skipcoder.errors import UserError
from skipcoder.pipeline.store import commit, layout
from skipcoder.pipeline.store.attrs import identity_hash, read_attrs, widths_of
from skipcoder.pipeline.store.commit import FileFacts
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.pipeline.store.writer import classes_of
from skipcoder.pipeline.text.splits import split_of

# Another version of numpy may sum in a different order.
_RTOL = 1e-9


def problems(place: Place) -> Iterator[str]:
    """Yield each problem of the store at `place` as a line; UserError if there is no store. Memory: one unit, and
    eight bytes or so for each document."""
    attrs = read_attrs(place)
    if attrs is None:
        raise UserError(f"no activation store at {place}")
    if identity_hash(attrs["identity"]) != attrs["identity_hash"]:
        yield f"{place}/zarr.json: the identity does not match its hash; the attributes were edited"
    if not attrs["rows"]:
        yield "its tokens were not written to the end; run the same capture command again"
        return
    store = ActivationStore(place, attrs)
    units = layout.num_units(store.rows, store.unit_rows)
    records = sorted(commit.committed_units(place))
    missing = sorted(set(range(units)) - set(records))
    if missing:
        yield f"{len(missing)} of {units} units are not captured ({_some(missing)}); run the same capture command again"
    splits: dict[int, str] = {}
    for unit in records:
        for fault in _of_unit(store, unit, splits) if unit < units else ["beyond the end of the store"]:
            yield f"unit {unit}: {fault}"


def _of_unit(store: ActivationStore, unit: int, splits: dict[int, str]) -> Iterator[str]:
    try:
        record = commit.read(store.place, unit)
    except UserError as error:
        yield str(error)
        return
    again = f"delete {commit.record_file(unit)} and re-run the capture"
    rows = layout.unit_token_rows(unit, store.rows, store.unit_rows)
    if record.identity != store.attrs["identity_hash"]:
        yield f"its record belongs to another store (identity {record.identity}); {again}"
    if record.rows != (rows.start, rows.stop):
        yield f"its record is of rows {record.rows}, not {(rows.start, rows.stop)}; {again}"
        return
    for name, facts in record.shards.items():
        try:
            found = commit.checksum(store.place.read(name))
        except FileNotFoundError:
            found = None
        if found != facts:
            yield f"{name}: expected {_plain(facts)}, found {_plain(found) if found else 'no such file'}"
    try:
        yield from _content(store, unit, record, splits)
    except UserError as error:
        yield str(error)


def _documents(store: ActivationStore, unit: int, splits: dict[int, str]) -> Iterator[str]:
    """Note the split of each document of a unit; yield those that are of another split, too."""
    mine = split_of(unit)
    for document in map(int, np.unique(store.documents(unit))):
        if splits.setdefault(document, mine) != mine:
            yield f"document: {document:016x} is in the {mine} split and in the {splits[document]} split"


def _content(store: ActivationStore, unit: int, record: commit.Commit, splits: dict[int, str]) -> Iterator[str]:
    """Check values against checksums and statistics; yield every chunk that cannot be decoded."""
    import torch

    tokens = store.tokens(unit)
    if store.split_scheme is not None:
        store.read("document_number", *store.rows_of(unit))
        yield from _documents(store, unit, splits)
    if crc32c(np.ascontiguousarray(tokens, dtype="<i4").tobytes()) != record.tokens_crc32c:
        yield "tokens: other ids than those that were captured"
    start, stop = store.unit_range(unit)
    chunks = [(a, min(a + store.chunk_rows, stop)) for a in range(start, stop, store.chunk_rows)]
    bad, of_text = set(), layout.text_arrays(store.attrs)
    for name, array in layout.arrays(store.attrs).items():
        for a, b in [(unit, unit + 1)] if array.spec.per_unit else chunks if name not in of_text else []:
            try:
                store.read(name, a, b)
            except UserError as error:
                bad.add(name)
                yield str(error)
    if "index" in bad:
        return
    index = store.read("index", start, stop).astype(np.int64)
    if not np.array_equal(np.sort(index), np.arange(start, stop)):
        yield "index: not a permutation of the unit's positions"
        return
    for hookpoint in store.hookpoints:
        recorded = commit.read_statistics(store.place, hookpoint, record)
        for side in widths_of(store.hookpoints[hookpoint]):
            if any(name.startswith(f"{hookpoint}/{side}") for name in bad):
                continue
            values = store.activations(hookpoint, side, start, stop)
            if not values.isfinite().all():
                yield f"{hookpoint}/{side}: NaN or infinity"
            chosen = classes_of(store.attrs, index, tokens.ravel()[index - start])
            for where in commit.POSITIONS:
                if not _equal(Moments.of(values[torch.from_numpy(chosen[where])]), recorded[f"{side}/{where}"]):
                    yield f"{hookpoint}/{side}: statistics of `{where}` positions differ from the record"


def _equal(found: Moments, recorded: Moments) -> bool:
    pairs = ((getattr(found, name), getattr(recorded, name)) for name in ("mean", "m2", "absmax", "norms"))
    return found.count == recorded.count and all(np.allclose(a, b, rtol=_RTOL, atol=1e-30) for a, b in pairs)


def _some(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _plain(facts: FileFacts) -> str:
    return json.dumps(facts).strip("{}").replace('"', "")
