"""A byte per activation and two scales: int8 and fp8.

The scales, one per token (`_scale`) and one per channel and unit (`_channel_scale`), need no calibration pass:

    z[n, d] = code[n, d] * scale[n] * channel_scale[d]

Massive activations (a few channels of a few tokens, a thousand times the usual size) would leave few codes for the
rest of their token. A channel's scale is therefore the 0.9-quantile of its |z| over a sample of the unit: such tokens
do not move it, and channels that are large everywhere are brought to the size of the others. A token's scale is what
its largest channel then needs. Tokens with a massive activation are still coded coarsely; the trainer leaves them out
by default.

Legend: N tokens, D channels.
"""

from typing import TYPE_CHECKING, ClassVar

from skipcoder.pipeline.store.codecs.base import Coded, Spec

if TYPE_CHECKING:
    from torch import Tensor

SAMPLE, QUANTILE = 1024, 0.9

TINY = 2.0**-126
"""The smallest normal float32."""


class Int8:
    """A byte per activation and two scales; the error is the same for all channels of a token, in units of their
    scales."""

    arrays: ClassVar = {
        "": Spec("int8", -128),
        "_scale": Spec("float32", float("nan"), width=None),
        "_channel_scale": Spec("float32", float("nan"), per_unit=True),
    }
    exact: ClassVar = False
    largest = 100.0
    """Not 127: the codes are compressed to their entropy, so coarser ones take less space: 0.44 of bf16 with 1.4e-4 of
    the variance lost, against 0.46 with 0.9e-4 (benchmarks/storage.py)."""

    @classmethod
    def encode(cls, z_ND: "Tensor") -> Coded:
        """Encode a unit's activations, of any float dtype, in stored order (random, so the head is a fair sample)."""
        z_ND = z_ND.float()
        channel_D = channel_scale(z_ND[:SAMPLE])
        scaled_ND = z_ND / channel_D
        scale_N = (scaled_ND.abs().amax(dim=1) / cls.largest).clamp_min(TINY)
        scaled_ND = (scaled_ND / scale_N[:, None]).clamp_(-cls.largest, cls.largest)
        return {"": cls._round(scaled_ND), "_scale": scale_N, "_channel_scale": channel_D[None]}

    @classmethod
    def decode(cls, coded: Coded, out_ND: "Tensor") -> None:
        """Write bfloat16, whose rounding (1e-6 of the variance) is far below that of the codes."""
        z_ND = cls._values(coded[""])
        for scale in (coded["_scale"][..., None], coded["_channel_scale"]):
            z_ND *= scale
        out_ND.copy_(z_ND)

    @staticmethod
    def _round(scaled_ND: "Tensor") -> "Tensor":
        import torch

        return scaled_ND.round_().to(torch.int8)

    @staticmethod
    def _values(codes_ND: "Tensor") -> "Tensor":
        return codes_ND.float().masked_fill_(codes_ND == -128, float("nan"))


class Fp8(Int8):
    """float8 e4m3: the error is proportional to the value (3 bits after the leading one)."""

    arrays: ClassVar = {**Int8.arrays, "": Spec("uint8", 0x7F)}
    largest = 448.0

    @staticmethod
    def _round(scaled_ND: "Tensor") -> "Tensor":
        import torch

        return scaled_ND.to(torch.float8_e4m3fn).view(torch.uint8)

    @staticmethod
    def _values(codes_ND: "Tensor") -> "Tensor":
        import torch

        return codes_ND.view(torch.float8_e4m3fn).float()


def channel_scale(sample_ND: "Tensor") -> "Tensor":
    """float32 [D] > 0: the 0.9-quantile of each channel's magnitude, or the maximum if nine tenths are zero."""
    import torch

    size_DN = sample_ND.abs().T
    quantile_D = size_DN.kthvalue(max(1, int(QUANTILE * size_DN.shape[1])), dim=1).values
    scale_D = torch.where(quantile_D > 0, quantile_D, size_DN.amax(dim=1))
    return torch.where(scale_D > 0, scale_D, torch.ones_like(scale_D))
