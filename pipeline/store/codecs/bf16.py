"""bfloat16, lossless when the model runs in it, with the exponents apart.

In a bfloat16, sign and mantissa are noise that no compressor shrinks, and all that can be gained is in the exponents,
which straddle two bytes. A channel's exponents lie within a few steps of its largest, so most of what they say fits
into four bits, and compressors of bytes do best on two such halves together: smaller and several times as fast as
compressing the words (benchmarks/README.md).

    byte    = sign << 7 | mantissa
    below   = the channel's largest exponent in the unit - exponent       >= 0, rarely above 15
    nibbles = below of channel i | below of channel i + H << 4            i < H = ceil(D / 2)

A row of nibbles has H bytes with the lower four bits of `below` and then H with the upper four, nearly all of them 0.

Legend: N tokens, D channels, H pairs of channels.
"""

from typing import TYPE_CHECKING, ClassVar

import numpy as np

from skipcoder.pipeline.store.codecs.base import Coded, Packing, Spec

if TYPE_CHECKING:
    from torch import Tensor

NUMBERS_AT_ONCE = 2**18
"""Numbers joined at a time on a CPU: they stay in a core's cache."""

SIGN_AND_MANTISSA = 0x807F


class Bf16:
    """Exponents apart; a hole in all arrays decodes to NaN."""

    arrays: ClassVar = {
        "": Spec("uint8", 0xFF, packing=Packing.none),
        "_exponent": Spec("uint8", 0, width=lambda d: d + d % 2, packing=Packing.symbols),
        "_exponent_top": Spec("uint8", 0xFF, per_unit=True),
    }
    exact: ClassVar = True

    @staticmethod
    def encode(z_ND: "Tensor") -> Coded:
        """Encode a unit's activations, of any float dtype, in stored order, on their device."""
        import torch

        bits_ND = z_ND.to(torch.bfloat16).contiguous().view(torch.int16)
        exponent_ND = (bits_ND >> 7).to(torch.uint8)
        top_1D = exponent_ND.amax(dim=0, keepdim=True)
        below_ND = top_1D - exponent_ND
        if below_ND.shape[1] % 2:
            below_ND = torch.nn.functional.pad(below_ND, (0, 1))
        first_NH, second_NH = below_ND.chunk(2, dim=1)
        return {
            "": (bits_ND >> 8 & 0x80 | bits_ND & 0x7F).to(torch.uint8),
            "_exponent": torch.cat([first_NH & 15 | second_NH << 4, first_NH >> 4 | second_NH & 0xF0], dim=1),
            "_exponent_top": top_1D,
        }

    @staticmethod
    def decode(coded: Coded, out_ND: "Tensor") -> None:
        """Join what belongs together in `out_ND`."""
        import torch

        if out_ND.device.type == "cpu":
            return _decode_on_cpu({suffix: z.numpy() for suffix, z in coded.items()}, out_ND.view(torch.uint16).numpy())
        return decode_on_device(coded, out_ND)


def decode_on_device(coded: Coded, out_ND: "Tensor") -> None:
    """Join by torch alone."""
    import torch

    low_NH, high_NH = coded["_exponent"].chunk(2, dim=-1)
    below_ND = torch.cat([low_NH & 15 | high_NH << 4, low_NH >> 4 | high_NH & 0xF0], dim=-1)[..., : out_ND.shape[-1]]
    bits_ND = out_ND.view(torch.int16).copy_(coded[""].view(torch.int8))  # the sign fills the upper byte
    bits_ND.bitwise_and_(SIGN_AND_MANTISSA - 2**16)
    bits_ND.bitwise_or_((coded["_exponent_top"] - below_ND).to(torch.int16) << 7)


def _decode_on_cpu(coded: dict[str, np.ndarray], bits_ND: np.ndarray) -> None:
    """Join by numpy, which is faster at this than torch and leaves the other cores alone."""
    (n, d), half = bits_ND.shape, coded["_exponent"].shape[1] // 2
    byte_ND, top_D = coded[""].view(np.int8), coded["_exponent_top"][0]
    low_NH, high_NH = coded["_exponent"][:, :half], coded["_exponent"][:, half:]
    most = min(n, max(1, NUMBERS_AT_ONCE // d))
    scratch, wide_scratch = np.empty((most, 2 * half), np.uint8), np.empty((most, d), np.uint16)
    for start in range(0, n, most):
        low, high, bits = (z[start : start + most] for z in (low_NH, high_NH, bits_ND))
        exponent, wide = scratch[: len(bits)], wide_scratch[: len(bits)]
        np.bitwise_and(low, 15, out=exponent[:, :half])
        np.right_shift(low, 4, out=exponent[:, half:])
        row, pair = np.divmod(np.flatnonzero(high != 0), half)  # few
        exponent[row, pair] |= high[row, pair] << 4
        exponent[row, half + pair] |= high[row, pair] & 0xF0
        np.subtract(top_D, exponent[:, :d], out=exponent[:, :d])
        np.copyto(wide, exponent[:, :d])
        np.multiply(wide, 128, out=wide)
        np.copyto(bits.view(np.int16), byte_ND[start : start + most])  # the sign fills the upper byte
        np.bitwise_and(bits, SIGN_AND_MANTISSA, out=bits)
        np.bitwise_or(bits, wide, out=bits)


class Bf16Words:
    """Format 2: the bits as one uint16."""

    arrays: ClassVar = {"": Spec("uint16", 0xFFFF)}
    exact: ClassVar = True

    @staticmethod
    def encode(z_ND: "Tensor") -> Coded:
        """Encode a unit's activations, of any float dtype, in stored order, on their device."""
        import torch

        return {"": z_ND.to(torch.bfloat16).contiguous().view(torch.uint16)}

    @staticmethod
    def decode(coded: Coded, out_ND: "Tensor") -> None:
        """Copy the bits into `out_ND`."""
        import torch

        out_ND.view(torch.uint16).copy_(coded[""])
