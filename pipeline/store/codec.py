"""How activations become bytes: one small class per codec, chosen by `store.codec`.

A codec turns the activations of one unit into arrays, and any range of their rows back into activations. The codes
themselves have no suffix; int8 and fp8 add a scale per token (`_scale`) and one per channel and unit
(`_channel_scale`), so that no calibration pass is needed:

    z[n, d] = code[n, d] * scale[n] * channel_scale[d]

Massive activations (a few channels of a few tokens, a thousand times the usual size) would leave few codes for the
rest of their token. A channel's scale is therefore the 0.9-quantile of its |z| over a sample of the unit: such tokens
do not move it, and channels that are large everywhere are brought to the size of the others. A token's scale is what
its largest channel then needs. Tokens with a massive activation are still coded coarsely; the trainer leaves them out
by default.

Legend: N tokens, D channels.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from skipcoder.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, np.ndarray]
"""Arrays by suffix: codes [N, D] under "", `_scale` [N], `_channel_scale` [1, D]."""


class Spec(NamedTuple):
    """How one of a codec's arrays is stored."""

    dtype: str
    fill_value: Any
    """A value that decodes to NaN, so that a hole cannot pass for data."""
    per_unit: bool = False
    """Whether the array has one row per unit, not per token."""
    wide: bool = True
    """Whether a row has a number for each channel, not just one."""


REVISION = 1
"""Part of a store's identity: raise it when the same activations would be coded or compressed to different bytes."""

SAMPLE, QUANTILE = 1024, 0.9

LEVELS = {"zstd": 3, "lz4": 5}
BLOCK = 2**19
"""Bytes that Blosc compresses together."""


class Bf16:
    """bfloat16 bits as uint16. Lossless when the model runs in bfloat16."""

    arrays: ClassVar = {"": Spec("uint16", 0xFFFF)}

    @staticmethod
    def encode(z_ND: "Tensor") -> Arrays:
        """Encode a unit's activations, of any float dtype, in stored order."""
        import torch

        return {"": z_ND.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()}

    @staticmethod
    def decode(coded: Arrays) -> "Tensor":
        """Decode to bfloat16 [N, D] that shares the memory of the codes."""
        import torch

        return torch.from_numpy(coded[""]).view(torch.bfloat16)

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """A view of bfloat16 values as their codes: reading codes into it decodes them."""
        import torch

        return values_ND.view(torch.uint16).numpy()


class Int8:
    """A byte per activation and two scales; the error is the same for all channels of a token, in units of their
    scales."""

    arrays: ClassVar = {
        "": Spec("int8", -128),
        "_scale": Spec("float32", float("nan"), wide=False),
        "_channel_scale": Spec("float32", float("nan"), per_unit=True),
    }
    largest = 100.0
    """Not 127: the codes are compressed to their entropy, so coarser ones take less space: 0.44 of bf16 with 1.4e-4 of
    the variance lost, against 0.46 with 0.9e-4 (benchmarks/storage.py)."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Arrays:
        """Encode a unit's activations, of any float dtype, in stored order (random, so the head is a fair sample)."""
        z_ND = z_ND.float().cpu()
        channel_D = channel_scale(z_ND[:SAMPLE])
        scaled_ND = z_ND / channel_D
        scale_N = (scaled_ND.abs().amax(dim=1) / cls.largest).clamp_min(float(np.finfo(np.float32).tiny))
        scaled_ND = (scaled_ND / scale_N[:, None]).clamp_(-cls.largest, cls.largest)
        return {"": cls._round(scaled_ND), "_scale": scale_N.numpy(), "_channel_scale": channel_D.numpy()[None]}

    @classmethod
    def decode(cls, coded: Arrays) -> "Tensor":
        """Decode to bfloat16 [N, D], whose rounding (1e-6 of the variance) is far below that of the codes."""
        import torch

        z_ND = cls._values(torch.from_numpy(coded[""]))
        for scale in (coded["_scale"][:, None], coded["_channel_scale"]):
            z_ND *= torch.from_numpy(scale)
        return z_ND.to(torch.bfloat16)

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """None: the codes differ from the values."""
        return None

    @staticmethod
    def _round(scaled_ND: "Tensor") -> np.ndarray:
        import torch

        return scaled_ND.round_().to(torch.int8).numpy()

    @staticmethod
    def _values(codes_ND: "Tensor") -> "Tensor":
        return codes_ND.float().masked_fill_(codes_ND == -128, float("nan"))


class Fp8(Int8):
    """float8 e4m3: the error is proportional to the value (3 bits after the leading one)."""

    arrays: ClassVar = {**Int8.arrays, "": Spec("uint8", 0x7F)}
    largest = 448.0

    @staticmethod
    def _round(scaled_ND: "Tensor") -> np.ndarray:
        import torch

        return scaled_ND.to(torch.float8_e4m3fn).view(torch.uint8).numpy()

    @staticmethod
    def _values(codes_ND: "Tensor") -> "Tensor":
        import torch

        return codes_ND.view(torch.float8_e4m3fn).float()


class Codec(Protocol):
    """The interface of a codec."""

    arrays: ClassVar[dict[str, Spec]]
    """The arrays by suffix ("" for the codes)."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Arrays:
        """Encode a unit's activations, of any float dtype, in stored order."""

    @classmethod
    def decode(cls, coded: Arrays) -> "Tensor":
        """Decode to bfloat16 [N, D]; NaN where a code is the fill value."""

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """A view of bfloat16 values as their codes if these are the values' own bits; else None."""


CODECS: Registry[type[Codec]] = Registry("store.codec", {"bf16": Bf16, "int8": Int8, "fp8": Fp8})


def channel_scale(sample_ND: "Tensor") -> "Tensor":
    """float32 [D] > 0: the 0.9-quantile of each channel's magnitude, or the maximum if nine tenths are zero."""
    import torch

    size_DN = sample_ND.abs().T
    quantile_D = size_DN.kthvalue(max(1, int(QUANTILE * size_DN.shape[1])), dim=1).values
    scale_D = torch.where(quantile_D > 0, quantile_D, size_DN.amax(dim=1))
    return torch.where(scale_D > 0, scale_D, torch.ones_like(scale_D))


def compressors(compression: str, itemsize: int = 2) -> list[Any]:
    """Zarr codecs applied to the array bytes: Blosc, then a CRC32C of each chunk.

    Bits are shuffled: with zstd, bf16 then takes 0.73 of its size and encodes four times as fast as with shuffled
    bytes. Larger blocks than Blosc would choose save a hundredth (benchmarks/storage.py). Codes of one byte are best
    not shuffled. Without the CRC a flipped byte in a chunk goes unnoticed: zarr's own guards only the shard index.
    """
    from zarr.codecs import BloscCname, BloscCodec, BloscShuffle, Crc32cCodec

    shuffle = BloscShuffle.bitshuffle if itemsize > 1 else BloscShuffle.noshuffle
    name, level = BloscCname(compression), LEVELS[compression]
    return [BloscCodec(typesize=itemsize, cname=name, clevel=level, shuffle=shuffle, blocksize=BLOCK), Crc32cCodec()]


def compress(array: np.ndarray, compression: str) -> bytes:
    """Compress a chunk as `compressors` do, without the checksum."""
    from numcodecs import blosc

    shuffle = blosc.BITSHUFFLE if array.itemsize > 1 else blosc.NOSHUFFLE
    result: bytes = blosc.compress(
        np.ascontiguousarray(array), compression.encode(), LEVELS[compression], shuffle, BLOCK
    )
    return result
