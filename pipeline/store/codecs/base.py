"""What a codec is. Legend: N tokens, D channels."""

from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Coded = dict[str, "Tensor"]
"""The arrays of some tokens by suffix, all on one device: codes [N, D] under "", and what the codec adds."""


class Packing(Enum):
    """How the chunks of an array are compressed, before the checksum."""

    usual = "usual"
    """Bits shuffled, unless a number has one byte. With zstd, bf16 words then take 0.73 of their size."""
    symbols = "symbols"
    """Few different bytes in no order: what is left to gain is their entropy, and zstd's lowest level gains it."""
    none = "none"
    """Nothing to gain."""


class Spec(NamedTuple):
    """How one array is stored."""

    dtype: str
    fill_value: Any
    """A value that cannot be data, or decodes to NaN."""
    per_unit: bool = False
    """Whether the array has one row per unit, not per token."""
    width: Callable[[int], int] | None = lambda d: d
    """Numbers in a row from the number of channels; None: a row is one number."""
    packing: Packing = Packing.usual


class Blosc(NamedTuple):
    """Arguments of numcodecs' `blosc.compress` after the data."""

    name: bytes
    level: int
    shuffle: int
    block: int = 2**19
    """Bytes compressed together. Larger blocks than Blosc would choose save a hundredth (benchmarks/storage.py)."""


LEVELS = {
    (Packing.usual, "zstd"): 3,
    (Packing.symbols, "zstd"): 1,
    (Packing.usual, "lz4"): 5,
    (Packing.symbols, "lz4"): 5,
}


def blosc_of(spec: Spec, compression: str) -> Blosc | None:
    """How chunks of an array are compressed in a store with this `store.compression`; None: not at all."""
    from numcodecs import blosc

    if spec.packing is Packing.none:
        return None
    shuffled = np.dtype(spec.dtype).itemsize > 1 if spec.packing is Packing.usual else compression == "lz4"
    shuffle = blosc.BITSHUFFLE if shuffled else blosc.NOSHUFFLE
    return Blosc(compression.encode(), LEVELS[spec.packing, compression], shuffle)


class Codec(Protocol):
    """The interface of a codec."""

    arrays: ClassVar[dict[str, Spec]]
    """The arrays by suffix ("" for the codes)."""
    exact: ClassVar[bool]
    """Whether bfloat16 activations come back to the bit."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Coded:
        """Encode a unit's activations, of any float dtype, in stored order, on their device."""

    @classmethod
    def decode(cls, coded: Coded, out_ND: "Tensor") -> None:
        """Write the activations of any range of rows into `out_ND`, bfloat16 on the device of the codes. On a GPU there
        may be a dimension more in front, of several such ranges."""
