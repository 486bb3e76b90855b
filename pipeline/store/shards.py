"""Make shards of a store's arrays in memory, as whole files, and read them chunk by chunk.

zarr-python makes every byte in memory (`encode`): a shard is thus written in one step wherever the store lies, and an
existing one, perhaps torn, is never read. Reading bypasses zarr-python, which makes two requests and a trip through an
event loop for each chunk: `ShardReader` remembers the shards' indices and decodes straight into place
(benchmarks/storage.py). Arrays that are coded differently are left to zarr.
"""

import struct
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import blosc

from skipcoder.pipeline.store.place import Place

_MISSING = 2**64 - 1


def encode(array: dict[str, Any], rows: np.ndarray) -> bytes:
    """The shard that begins with `rows` (no more than one holds). `array`: arguments of zarr's `create_array`."""
    import zarr
    from zarr.storage import MemoryStore

    files: dict[str, Any] = {}
    scratch = zarr.create_array(MemoryStore(files), **{**array, "shape": rows.shape})
    scratch[:] = rows
    result: bytes = files["/".join(["c", *["0"] * rows.ndim])].to_bytes()
    return result


class ShardReader:
    """Reader of one array's chunks in a Zarr v3 store, rows along the first dimension."""

    def __init__(
        self, place: Place, name: str, shard_rows: int, chunk_shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.place, self.name = place, name
        self.shard_rows, self.chunk_shape, self.dtype = shard_rows, chunk_shape, dtype
        self._index: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, place: Place, name: str, array: Any) -> "ShardReader | None":
        """A reader for a zarr array of a store; None if it is coded differently."""
        (outer, *rest) = array.metadata.codecs
        inner = [type(codec).__name__ for codec in getattr(outer, "codecs", ())]
        known = inner == ["BytesCodec", "BloscCodec", "Crc32cCodec"] and not rest and array.shards is not None
        little = np.dtype(array.dtype).newbyteorder("<") == array.dtype
        if not known or not little or array.shards[1:] != array.chunks[1:] or array.chunks[1:] != array.shape[1:]:
            return None
        return cls(place, name, array.shards[0], array.chunks, np.dtype(array.dtype))

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray | None:
        """Rows [start, stop) if they are the beginning of one chunk, else None. ValueError if the chunk is damaged. If
        `out` is contiguous and of a whole chunk's shape, the chunk is decoded into it and `out` is returned."""
        rows = self.chunk_shape[0]
        if start % rows or not 0 < stop - start <= rows:
            return None
        shard, chunk = start // self.shard_rows, start % self.shard_rows // rows
        file = "/".join([self.name, "c", str(shard), *["0"] * (len(self.chunk_shape) - 1)])
        if shard not in self._index:
            self._index[shard] = self._read_index(file)
        offset, size = self._index[shard][chunk].tolist()
        if offset == _MISSING:
            raise ValueError("the chunk is missing from its shard")
        coded = self.place.read_range(file, offset, size)
        content, checksum = coded[:-4], coded[-4:].tobytes()
        if len(coded) < size or crc32c(content) != struct.unpack("<I", checksum)[0]:
            raise ValueError("its checksum does not match")
        if out is None or out.shape != self.chunk_shape or not out.flags.c_contiguous:
            fresh = np.empty(self.chunk_shape, self.dtype)
            blosc.decompress(content, fresh)
            return fresh[: stop - start]
        blosc.decompress(content, out)
        return out

    def _read_index(self, file: str) -> np.ndarray:
        """uint64 [chunks, 2]: where each chunk of a shard begins, and its size in bytes."""
        size = 16 * (self.shard_rows // self.chunk_shape[0]) + 4
        index = self.place.read_range(file, -size, size)
        if len(index) < size or crc32c(index[:-4]) != struct.unpack("<I", index[-4:].tobytes())[0]:
            raise ValueError("the checksum of its shard's index does not match")
        return index[:-4].copy().view("<u8").reshape(-1, 2)
