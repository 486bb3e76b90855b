"""Move the trainer's input and output scales into a coder's weights.

The trainer sees x/s_in and y/s_out. Scales are powers of two, so folding multiplies exactly: the folded coder
takes raw activations, chooses the same latents and gives the same values.
"""

import copy
import math

import torch
from torch import Tensor

from skipcoder.kernels.preactivations import EXACT
from skipcoder.trainer.coder.coder import SparseCoder


def power_of_two_scale(mean_square: float) -> float:
    """Return 2^round(log2 sqrt(mean_square)), the scale that brings activations to about unit size."""
    return 2.0 ** round(math.log2(math.sqrt(mean_square))) if mean_square > 0 else 1.0


@torch.no_grad()
def fold(coder: SparseCoder, s_in: float | Tensor, s_out: float | Tensor) -> SparseCoder:
    """Return a copy of `coder` (trained on x/s_in -> y/s_out) that works on raw activations. Scales of rows of several
    sides are tensors, [D] and [E]."""
    if coder.cfg.reconstructs:
        assert s_in is s_out or torch.equal(*map(torch.as_tensor, (s_in, s_out))), "it reads what it writes"
    folded = copy.deepcopy(coder)
    folded.search = EXACT  # a scout's statistics describe the scaled input
    device = coder.W_enc.device
    folded.rescale(*(s.to(device) if isinstance(s, Tensor) else s for s in (s_in, s_out)))
    return folded
