"""How activations become bytes: one small class per codec, chosen by `store.codec`.

Legend: N tokens, D dimensions.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor


class Bf16:
    """bfloat16 bits as uint16. Lossless when the model runs in bfloat16."""

    dtype = "uint16"
    fill_value = 0xFFFF  # a NaN: a hole cannot pass for data

    @staticmethod
    def encode(z_ND: "Tensor") -> np.ndarray:
        """Activations of any float dtype -> uint16 [N, D]."""
        import torch

        return z_ND.to(torch.bfloat16).contiguous().view(torch.uint16).cpu().numpy()

    @staticmethod
    def decode(codes_ND: np.ndarray) -> "Tensor":
        """uint16 [N, D] -> bfloat16 tensor sharing the memory."""
        import torch

        return torch.from_numpy(codes_ND).view(torch.bfloat16)

    @staticmethod
    def to_float32(codes_ND: np.ndarray) -> np.ndarray:
        """uint16 [N, D] -> float32 [N, D], exact, without torch."""
        return (codes_ND.astype(np.uint32) << 16).view(np.float32)


CODECS = {"bf16": Bf16}


def compressors(compression: str) -> list[Any]:
    """Zarr codecs after the array bytes: Blosc, then a CRC32C of each chunk.

    Without the CRC a flipped byte in a chunk comes back silently: zarr's own guards only the shard index.
    """
    from zarr.codecs import BloscCodec, BloscShuffle, Crc32cCodec

    blosc = {
        "zstd": BloscCodec(typesize=2, cname="zstd", clevel=5, shuffle=BloscShuffle.shuffle),
        "lz4": BloscCodec(typesize=2, cname="lz4", clevel=5, shuffle=BloscShuffle.bitshuffle),
    }
    return [blosc[compression], Crc32cCodec()]
