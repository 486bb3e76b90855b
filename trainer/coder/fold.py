"""Move the trainer's input and output scales into a coder's weights.

The trainer sees x/s_in and y/s_out. Scales are powers of two, so folding multiplies exactly: the folded coder
takes raw activations, chooses the same latents and gives the same values.
"""

import copy
import math

import torch

from skipcoder.kernels.preactivations import EXACT
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import Kind


def power_of_two_scale(mean_square: float) -> float:
    """Return 2^round(log2 sqrt(mean_square)), the scale that brings activations to about unit size."""
    return 2.0 ** round(math.log2(math.sqrt(mean_square))) if mean_square > 0 else 1.0


@torch.no_grad()
def fold(coder: SparseCoder, s_in: float, s_out: float) -> SparseCoder:
    """Return a copy of `coder` (trained on x/s_in -> y/s_out) that works on raw activations."""
    if coder.cfg.kind == Kind.sae:
        assert s_in == s_out, "an SAE reads and writes one side, so it has one scale"
    folded = copy.deepcopy(coder)
    folded.search = EXACT  # a scout's statistics describe the scaled input
    folded.rescale(s_in, s_out)
    return folded
