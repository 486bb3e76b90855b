"""Read one chunk of a local store without zarr-python's machinery.

zarr-python takes a trip through an event loop for each chunk, and a training stream reads nothing but whole chunks:
decoded this way by two threads they come several times as fast (benchmarks/stream.py). What is not a local file, or not
coded as our own stores are, is left to zarr.
"""

import os
import struct
import threading
from pathlib import Path
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numcodecs import blosc

_MISSING = 2**64 - 1
_local = threading.local()


def _buffer(size: int) -> np.ndarray:
    """Scratch memory of this thread, used again: the first touch of fresh memory costs as much as reading."""
    if len(getattr(_local, "memory", ())) < size:
        _local.memory = np.empty(size, np.uint8)
    return _local.memory[:size]


class ShardReader:
    """Chunks of one array of a local Zarr v3 store, rows along the first dimension."""

    def __init__(self, path: Path, shard_rows: int, chunk_shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.path, self.shard_rows, self.chunk_shape, self.dtype = path, shard_rows, chunk_shape, dtype

    @classmethod
    def of(cls, path: Path, array: Any) -> "ShardReader | None":
        """A reader for a zarr array whose files lie at `path`; None if its coding is another than ours."""
        (outer, *rest) = array.metadata.codecs
        inner = [type(codec).__name__ for codec in getattr(outer, "codecs", ())]
        known = inner == ["BytesCodec", "BloscCodec", "Crc32cCodec"] and not rest and array.shards is not None
        little = np.dtype(array.dtype).newbyteorder("<") == array.dtype
        if not known or not little or array.shards[1:] != array.chunks[1:] or array.chunks[1:] != array.shape[1:]:
            return None
        return cls(path, array.shards[0], array.chunks, np.dtype(array.dtype))

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray | None:
        """Rows [start, stop) if they are the beginning of one chunk, else None. ValueError if it is damaged. A whole
        chunk is decoded right into `out`, if given and contiguous, and `out` returned."""
        rows = self.chunk_shape[0]
        if start % rows or not 0 < stop - start <= rows:
            return None
        shard, chunk = start // self.shard_rows, start % self.shard_rows // rows
        file = self.path.joinpath("c", str(shard), *["0"] * (len(self.chunk_shape) - 1))
        entries = self.shard_rows // rows
        with file.open("rb") as f:
            f.seek(-16 * entries - 4, os.SEEK_END)
            index = f.read()
            if crc32c(index[:-4]) != struct.unpack("<I", index[-4:])[0]:
                raise ValueError("the checksum of its shard's index does not match")
            offset, size = struct.unpack_from("<QQ", index, 16 * chunk)
            if offset == _MISSING:
                raise ValueError("the chunk is missing from its shard")
            f.seek(offset)
            coded = _buffer(size)
            read = f.readinto(coded.data)
        coded.flags.writeable = False  # crc32c takes nothing else
        content, checksum = coded[:-4], coded[-4:].tobytes()
        if read < size or crc32c(content) != struct.unpack("<I", checksum)[0]:
            raise ValueError("its checksum does not match")
        if out is None or out.shape != self.chunk_shape or not out.flags.c_contiguous:
            fresh = np.empty(self.chunk_shape, self.dtype)
            blosc.decompress(content, fresh)
            return fresh[: stop - start]
        blosc.decompress(content, out)
        return out
