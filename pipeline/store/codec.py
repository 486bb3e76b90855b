"""How activations become bytes: one small class per codec, chosen by `store.codec`.

A codec turns the activations of one unit into arrays, and a range of their rows back. The codes themselves have no
suffix; int8 and fp8 add a scale per token (`_scale`) and one per channel and unit (`_channel_scale`), so that no pass
for calibration is needed:

    z[n, d] = code[n, d] * scale[n] * channel_scale[d]

Massive activations (a few channels, a few tokens, a thousand times the usual) would leave the rest of their token few
codes. So a channel's scale is its 0.9-quantile of |z| over a sample of the unit, which such tokens do not move, and
channels that are large everywhere are brought to the size of the others; a token's scale is what its largest channel
then needs. A token with a massive activation is itself coarse: the trainer leaves those out by default.

Legend: N tokens, D channels.
"""

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from skipcoder.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

Arrays = dict[str, np.ndarray]
"""By suffix: codes [N, D] under "", `_scale` [N], `_channel_scale` [1, D]."""


class Spec(NamedTuple):
    """How one of a codec's arrays is stored."""

    dtype: str
    fill_value: Any
    """Decodes to NaN: a hole cannot pass for data."""
    per_unit: bool = False
    """One row for each unit, not for each token."""
    wide: bool = True
    """A row has a number for each channel, not just one."""


REVISION = 1
"""Part of a store's identity: to be raised when the same activations would be coded or compressed to other bytes."""

SAMPLE, QUANTILE = 1024, 0.9

LEVELS = {"zstd": 3, "lz4": 5}
BLOCK = 2**19
"""Bytes that Blosc compresses together."""


class Bf16:
    """bfloat16 bits as uint16. Lossless when the model runs in bfloat16."""

    arrays: ClassVar = {"": Spec("uint16", 0xFFFF)}

    @staticmethod
    def encode(z_ND: "Tensor") -> Arrays:
        """A unit's activations, of any float dtype, in stored order."""
        import torch

        return {"": z_ND.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()}

    @staticmethod
    def decode(coded: Arrays) -> "Tensor":
        """bfloat16 [N, D], sharing the memory of the codes."""
        import torch

        return torch.from_numpy(coded[""]).view(torch.bfloat16)

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """Where the codes of bfloat16 values lie in memory: reading them there decodes them."""
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
    """Not 127: the codes are compressed to their entropy, so coarser ones take less. 0.44 of bf16 and 1.4e-4 of the
    variance lost, against 0.46 and 0.9e-4 (benchmarks/storage.py)."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Arrays:
        """A unit's activations, of any float dtype, in stored order (a random one: the head is a fair sample)."""
        z_ND = z_ND.float().cpu()
        channel_D = channel_scale(z_ND[:SAMPLE])
        scaled_ND = z_ND / channel_D
        scale_N = (scaled_ND.abs().amax(dim=1) / cls.largest).clamp_min(float(np.finfo(np.float32).tiny))
        scaled_ND = (scaled_ND / scale_N[:, None]).clamp_(-cls.largest, cls.largest)
        return {"": cls._round(scaled_ND), "_scale": scale_N.numpy(), "_channel_scale": channel_D.numpy()[None]}

    @classmethod
    def decode(cls, coded: Arrays) -> "Tensor":
        """bfloat16 [N, D]: its rounding (1e-6 of the variance) is far below that of the codes."""
        import torch

        z_ND = cls._values(torch.from_numpy(coded[""]))
        for scale in (coded["_scale"][:, None], coded["_channel_scale"]):
            z_ND *= torch.from_numpy(scale)
        return z_ND.to(torch.bfloat16)

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """None: codes are other numbers than the values."""
        return None

    @staticmethod
    def _round(scaled_ND: "Tensor") -> np.ndarray:
        import torch

        return scaled_ND.round_().to(torch.int8).numpy()

    @staticmethod
    def _values(codes_ND: "Tensor") -> "Tensor":
        return codes_ND.float().masked_fill_(codes_ND == -128, float("nan"))


class Fp8(Int8):
    """float8 e4m3: the error is in proportion to the value (3 bits after the leading one)."""

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
    """What a codec must have."""

    arrays: ClassVar[dict[str, Spec]]
    """The arrays by suffix; the codes have none."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Arrays:
        """A unit's activations, of any float dtype, in stored order."""

    @classmethod
    def decode(cls, coded: Arrays) -> "Tensor":
        """bfloat16 [N, D]; NaN where a code is the fill value."""

    @staticmethod
    def codes_of(values_ND: "Tensor") -> np.ndarray | None:
        """Where codes of bfloat16 values lie in memory, if they are the values themselves."""


CODECS: Registry[type[Codec]] = Registry("store.codec", {"bf16": Bf16, "int8": Int8, "fp8": Fp8})


def channel_scale(sample_ND: "Tensor") -> "Tensor":
    """float32 [D] > 0: the 0.9-quantile of each channel's magnitude; its largest where nine tenths are zero."""
    import torch

    size_DN = sample_ND.abs().T
    quantile_D = size_DN.kthvalue(max(1, int(QUANTILE * size_DN.shape[1])), dim=1).values
    scale_D = torch.where(quantile_D > 0, quantile_D, size_DN.amax(dim=1))
    return torch.where(scale_D > 0, scale_D, torch.ones_like(scale_D))


def compressors(compression: str, itemsize: int = 2) -> list[Any]:
    """Zarr codecs after the array bytes: Blosc, then a CRC32C of each chunk.

    Bits are shuffled: with zstd, bf16 takes 0.73 of its size so and encodes four times as fast as with bytes shuffled.
    Larger blocks than Blosc would choose save a hundredth (benchmarks/storage.py). Codes of one byte are best left
    alone. Without the CRC a flipped byte in a chunk comes back silently: zarr's own guards only the shard index.
    """
    from zarr.codecs import BloscCname, BloscCodec, BloscShuffle, Crc32cCodec

    shuffle = BloscShuffle.bitshuffle if itemsize > 1 else BloscShuffle.noshuffle
    name, level = BloscCname(compression), LEVELS[compression]
    return [BloscCodec(typesize=itemsize, cname=name, clevel=level, shuffle=shuffle, blocksize=BLOCK), Crc32cCodec()]


def compress(array: np.ndarray, compression: str) -> bytes:
    """A chunk as `compressors` compress it, without the checksum."""
    from numcodecs import blosc

    shuffle = blosc.BITSHUFFLE if array.itemsize > 1 else blosc.NOSHUFFLE
    result: bytes = blosc.compress(
        np.ascontiguousarray(array), compression.encode(), LEVELS[compression], shuffle, BLOCK
    )
    return result
