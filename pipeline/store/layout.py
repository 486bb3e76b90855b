"""Pure functions of a store's layout: units, splits, permutations, arrays and their chunks. No I/O."""

from typing import Any, NamedTuple

import numpy as np

from skipcoder.pipeline.store.attrs import Attributes, compression_of, widths_of
from skipcoder.pipeline.store.codecs import Spec, codec_of
from skipcoder.pipeline.store.codecs.base import Blosc, blosc_of
from skipcoder.pipeline.text.splits import EVERY, SPLITS, split_of

MAX_CHUNK_ROWS = 2048
TOO_FEW = (
    f"units, too few to hold one out for tests ({EVERY} are needed): capture more with a larger data.tokens, or anew "
    "with a smaller store.unit_rows"
)


def auto_unit_rows(rows: int, context: int) -> int:
    """Token rows per unit when the user sets none: about 16,384 tokens, but at least 64 units."""
    return max(1, min(16384 // context, rows // 64))


def num_units(rows: int, unit_rows: int) -> int:
    """Number of units that `rows` token rows make."""
    return -(-rows // unit_rows)


def unit_token_rows(unit: int, rows: int, unit_rows: int) -> range:
    """Token rows of `unit`; the last unit may be short."""
    return range(unit * unit_rows, min((unit + 1) * unit_rows, rows))


def split(units: int, scheme: str | None) -> dict[str, list[int]]:
    """The units of each split. In a store of before `scheme`, validation and test are the same units, and documents
    cross from training to them.

    >>> split(17, "document-1")["validation"], split(17, None)["validation"]
    ([7], [15])
    """
    split_of_unit = [split_of(unit) for unit in range(units)]
    of = {name: [unit for unit in range(units) if split_of_unit[unit] == name] for name in SPLITS}
    if scheme is None:
        of["train"], of["validation"] = sorted(of["train"] + of["validation"]), of["test"]
    return of


def permutation(seed: int, unit: int, size: int) -> np.ndarray:
    """Order in which the `size` tokens of a unit are stored; the same for every hookpoint."""
    return np.random.Generator(np.random.PCG64([seed, unit])).permutation(size)


def chunk_rows(unit_tokens: int) -> int:
    """Rows of one compressed chunk: the largest divisor of `unit_tokens` up to 2048.

    A unit is one shard, so chunks must divide it. Where only tiny divisors exist (a prime context),
    the smallest divisor above the limit is taken: large chunks cost memory, tiny ones cost speed.
    """
    divisors = [d for d in range(1, unit_tokens + 1) if unit_tokens % d == 0]
    small = max(d for d in divisors if d <= MAX_CHUNK_ROWS)
    if small >= min(256, unit_tokens):
        return small
    return min(d for d in divisors if d > MAX_CHUNK_ROWS)


class ArrayLayout(NamedTuple):
    """How one array is cut and stored. Rows run along the first dimension; a shard holds one unit."""

    shard: tuple[int, ...]
    chunk: tuple[int, ...]
    spec: Spec
    blosc: Blosc | None

    @property
    def create(self) -> dict[str, Any]:
        """Arguments of zarr's `create_array`, except the length.

        Holes must be visible: fill values are impossible as data or, all arrays of a side together, decode to NaN, and
        chunks that consist of them are still written.
        Each chunk has a checksum: zarr's own guards only the shard's index, and a flipped byte would go unnoticed.
        """
        from zarr.codecs import BloscCname, BloscCodec, BloscShuffle, Crc32cCodec

        codecs: list[Any] = [Crc32cCodec()]
        if self.blosc is not None:
            name, level, shuffle, block = self.blosc
            size, cname = np.dtype(self.spec.dtype).itemsize, BloscCname(name.decode())
            shuffling = list(BloscShuffle)[shuffle]
            codecs.insert(0, BloscCodec(typesize=size, cname=cname, clevel=level, shuffle=shuffling, blocksize=block))
        return {
            "shards": self.shard,
            "chunks": self.chunk,
            "dtype": self.spec.dtype,
            "fill_value": self.spec.fill_value,
            "compressors": codecs,
            "config": {"write_empty_chunks": True},
        }


def _text(attrs: Attributes) -> dict[str, Spec]:
    found = {"tokens": Spec("int32", -1)}
    if "split_scheme" in attrs["identity"]:
        found |= {"document": Spec("uint64", 2**64 - 1), "document_number": Spec("uint32", 2**32 - 1)}
    if "chat" in attrs["identity"]["data"]:
        found["role"] = Spec("uint8", 255)
    return found


def text_arrays(attrs: Attributes) -> list[str]:
    """The arrays [rows, context] that are written before the model runs: fields of `PIECE` (text/rows.py)."""
    return list(_text(attrs))


def arrays(attrs: Attributes) -> dict[str, ArrayLayout]:
    """The layout of each of a store's arrays."""
    identity, compression = attrs["identity"], compression_of(attrs)
    context, unit_rows = identity["context"], identity["unit_rows"]
    unit_tokens = unit_rows * context
    chunk = chunk_rows(unit_tokens)

    def array(shard: tuple[int, ...], rows: int, spec: Spec, compression: str = "zstd") -> ArrayLayout:
        return ArrayLayout(shard, (rows, *shard[1:]), spec, blosc_of(spec, compression))

    found = {name: array((unit_rows, context), unit_rows, spec) for name, spec in _text(attrs).items()}
    found["index"] = array((unit_tokens,), chunk, Spec("uint64", 2**64 - 1))
    for name, facts in attrs["hookpoints"].items():
        for side, d in widths_of(facts).items():
            for suffix, spec in codec_of(identity["codec"], attrs["version"]).arrays.items():
                shard, rows = (1, 1) if spec.per_unit else (unit_tokens, chunk)
                wide = () if spec.width is None else (spec.width(d),)
                found[f"{name}/{side}{suffix}"] = array((shard, *wide), rows, spec, compression)
    return found
