"""Make shards of a store's arrays in memory, as whole files, and read them chunk by chunk.

The bytes are those that zarr-python would write, and zarr-python reads them; a test holds the two together. It is not
used for either because it works through an event loop, chunk after chunk (benchmarks/storage.py). A shard is written in
one step wherever the store lies; an existing one, perhaps torn, is never read.
"""

import struct

import numpy as np
from crc32c import crc32c  # unlike google_crc32c it lets other threads run
from numcodecs import blosc

from skipcoder.pipeline.store.layout import ArrayLayout
from skipcoder.pipeline.store.place import Place

_MISSING = 2**64 - 1


def encode(array: ArrayLayout, rows: np.ndarray) -> list[bytes | memoryview]:
    """The shard that begins with `rows` (no more than one holds), in pieces."""
    length, chunks = array.chunk[0], array.shard[0] // array.chunk[0]
    pieces, entries, at = [], [], 0
    for start in range(0, len(rows), length):
        chunk = _chunk(array, rows[start : start + length])
        size = sum(map(len, chunk))
        pieces += chunk
        entries.append((at, size))
        at += size
    entries += [(_MISSING, _MISSING)] * (chunks - len(entries))
    index = np.array(entries, "<u8").tobytes()
    return [*pieces, index, struct.pack("<I", crc32c(index))]


def _chunk(array: ArrayLayout, rows: np.ndarray) -> list[bytes | memoryview]:
    """One chunk's bytes and their checksum; a short one is filled up."""
    if len(rows) < array.chunk[0]:
        filled = np.full(array.chunk, array.spec.fill_value, array.spec.dtype)
        filled[: len(rows)] = rows
        rows = filled
    rows = np.ascontiguousarray(rows)
    coded = rows.data.cast("B") if array.blosc is None else blosc.compress(rows, *array.blosc)
    return [coded, struct.pack("<I", crc32c(coded))]


class ShardReader:
    """Reader of one array's chunks, rows along the first dimension."""

    def __init__(self, place: Place, name: str, array: ArrayLayout) -> None:
        self.place, self.name, self.array = place, name, array
        self._index: dict[int, np.ndarray] = {}

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows [start, stop), in `out` if that is given. ValueError if a chunk is damaged or missing."""
        rows = self.array.chunk[0]
        if out is None:
            out = np.empty((stop - start, *self.array.chunk[1:]), self.array.spec.dtype)
        for begin in range(start - start % rows, stop, rows):
            first, last = max(start, begin), min(stop, begin + rows)
            part = out[first - start : last - start]
            if part.shape == self.array.chunk and part.flags.c_contiguous:
                self._decode(begin, part)
            else:
                whole = np.empty(self.array.chunk, self.array.spec.dtype)
                self._decode(begin, whole)
                part[:] = whole[first - begin : last - begin]
        return out

    def _decode(self, start: int, out: np.ndarray) -> None:
        """Decode the chunk that begins at row `start` into an array of its shape."""
        shard, row = divmod(start, self.array.shard[0])
        file = "/".join([self.name, "c", str(shard), *["0"] * (out.ndim - 1)])
        if shard not in self._index:
            self._index[shard] = self._read_index(file)
        offset, size = self._index[shard][row // self.array.chunk[0]].tolist()
        if offset == _MISSING:
            raise ValueError("the chunk is missing from its shard")
        if self.array.blosc is not None:
            coded = self.place.read_range(file, offset, size)
            if len(coded) < size or not _is_checksum(coded[-4:].tobytes(), coded[:-4].data):
                raise ValueError("its checksum does not match")
            blosc.decompress(coded[:-4], out)
            return
        content, checksum = out.data.cast("B"), memoryview(bytearray(4))  # straight into place
        if size != len(content) + 4:
            raise ValueError("its shard's index does not fit")
        if not self.place.read_into(file, offset, content, checksum) or not _is_checksum(checksum, content):
            raise ValueError("its checksum does not match")

    def _read_index(self, file: str) -> np.ndarray:
        """uint64 [chunks, 2]: where each chunk of a shard begins, and its size in bytes."""
        size = 16 * (self.array.shard[0] // self.array.chunk[0]) + 4
        index = self.place.read_range(file, -size, size)
        if len(index) < size or not _is_checksum(index[-4:].tobytes(), index[:-4].data):
            raise ValueError("the checksum of its shard's index does not match")
        return index[:-4].copy().view("<u8").reshape(-1, 2)


def _is_checksum(checksum: bytes | memoryview, content: memoryview) -> bool:
    return struct.pack("<I", crc32c(content)) == checksum
