"""The thresholds of batchtopk and jumprelu coders: where they start, and how batchtopk's is found.

Legend: N tokens, D input width.
"""

from dataclasses import replace

import torch
from skipcoder.trainer.coder import SparseCoder
from torch import Tensor

RATE = 0.01
"""Of the moving average that follows batchtopk's smallest kept values."""


@torch.no_grad()
def set_threshold(coder: SparseCoder, x_ND: Tensor, k: int) -> None:
    """The one threshold for all latents above which k fire per token of `x_ND` (in the coder's scale), exactly."""
    assert coder.threshold is not None
    encoding, coder.encoding = coder.encoding, replace(coder.encoding, mode="float32")
    least = smallest(coder._encode(x_ND, "batchtopk", k).values)
    coder.encoding = encoding
    # The comparison is "above": the smallest that shall fire must exceed it.
    coder.threshold.fill_(float(torch.nextafter(least, torch.zeros_like(least))))


@torch.no_grad()
def follow_threshold(coder: SparseCoder, kept: Tensor, is_first: bool) -> None:
    """batchtopk in training: the moving average of the smallest value kept."""
    assert coder.threshold is not None
    coder.threshold.lerp_(smallest(kept), 1.0 if is_first else RATE)


def smallest(values: Tensor) -> Tensor:
    """The smallest positive value; 0 if there is none."""
    least = torch.where(values > 0, values, torch.inf).flatten()
    least = torch.cat([least, least.new_full((1,), torch.inf)]).amin()
    return torch.where(least < torch.inf, least, 0)
