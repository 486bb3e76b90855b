"""Make another store of the same activations, in the newest format and with a compression of choice.

The identity, and with it the order of every token, stays: runs on the old store go on with the new one once it lies at
the old one's path.
"""

from collections.abc import Iterator

from skipcoder.errors import UserError
from skipcoder.pipeline.store import commit, writer
from skipcoder.pipeline.store.attrs import VERSION, Attributes, identity_hash, read_attrs, widths_of
from skipcoder.pipeline.store.codecs import codec_of
from skipcoder.pipeline.store.place import Place
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.writer import CodedUnit


def recode(store: ActivationStore, place: Place, compression: str) -> Iterator[int]:
    """Write every unit of a complete store to `place`, and yield its number; units that are there already are not
    written again. Memory: two units."""
    if not store.is_complete:
        raise UserError(f"{store.place} is unfinished; run pipeline/cache.py on it to its end first")
    if str(place) == str(store.place):
        raise UserError(f"{place} cannot be recoded onto itself; name a new place and move it there afterwards")
    attrs: Attributes = {**store.attrs, "version": VERSION, "compression": compression, "rows": 0}
    found = read_attrs(place)
    if found is None or not found["rows"]:
        writer.create(place, attrs)
        writer.write_tokens(place, attrs, store.rows, store.text(store.rows))
        found = read_attrs(place)
        assert found is not None
    attrs["rows"] = store.rows
    if found != attrs or identity_hash(found["identity"]) != found["identity_hash"]:
        raise UserError(f"{place} is another store, or has another compression; name a new place")
    done = commit.committed_units(place)
    for unit in store.units:
        if unit not in done:
            writer.write_unit(place, attrs, _coded(store, unit, attrs))
        yield unit


def _coded(store: ActivationStore, unit: int, attrs: Attributes) -> CodedUnit:
    identity, (start, stop) = attrs["identity"], store.unit_range(unit)
    codec = codec_of(identity["codec"], attrs["version"])
    arrays = {"index": store.read("index", start, stop)}
    for name in store.hookpoints:
        for side in widths_of(store.hookpoints[name]):
            if codec.exact:
                coded = codec.encode(store.activations(name, side, start, stop))
                arrays |= {f"{name}/{side}{suffix}": rows.numpy() for suffix, rows in coded.items()}
                continue
            for suffix, spec in codec.arrays.items():  # as they are: decoding and encoding would lose more
                rows = (unit, unit + 1) if spec.per_unit else (start, stop)
                arrays[f"{name}/{side}{suffix}"] = store.read(f"{name}/{side}{suffix}", *rows)
    record = store.commits[unit]
    moments = {name: commit.read_statistics(store.place, name, record) for name in store.hookpoints}
    return CodedUnit(unit, store.tokens(unit), arrays, moments)
