"""The thresholds of batchtopk and jumprelu coders: where they start, and how batchtopk's is found.

Legend: N tokens, D input width, M latents, C of them at once.
"""

from dataclasses import replace

import torch
from skipcoder.trainer.coder import SparseCoder, make_coder
from skipcoder.trainer.config import Activation
from torch import Tensor, nn

CHUNK = 2**26
"""Pre-activations sorted at once."""

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
def converted(coder: SparseCoder, x_ND: Tensor) -> SparseCoder:
    """A top-k coder with a threshold for each latent in place of the choice, such that on `x_ND` each fires as often as
    it was chosen. One threshold for all costs far more (benchmarks/thresholds.py). Weights are shared with `coder`."""
    found = make_coder(replace(coder.cfg, activation=Activation.jumprelu), coder.d_in, coder.d_out)
    found.load_state_dict(coder.state_dict() | {"threshold": found.threshold}, assign=True)
    found.meta = dict(coder.meta)
    codes = coder.encode(x_ND)
    chosen_M = torch.bincount(codes.indices[codes.values > 0], minlength=coder.cfg.width)
    x_ND = x_ND.to(coder.W_enc.dtype) - (0 if coder.b_pre is None else coder.b_pre)
    thresholds = []
    for latents in torch.arange(coder.cfg.width, device=x_ND.device).split(max(1, CHUNK // len(x_ND))):
        pre_NC = (x_ND @ coder.W_enc[latents].T + coder.b_enc[latents]).sort(0, descending=True).values
        # Half way between the smallest that shall fire and the largest that shall not: rounding must not decide.
        below_C = pre_NC.gather(0, chosen_M[latents].clamp_max(len(x_ND) - 1)[None])[0].clamp_min(0)
        above_C = pre_NC.gather(0, (chosen_M[latents] - 1).clamp_min(0)[None])[0].clamp_min(0)
        thresholds.append(torch.where(chosen_M[latents] > 0, (below_C + above_C) / 2, 2 * above_C))
    found.threshold = nn.Parameter(torch.cat(thresholds))
    return found.requires_grad_(False).eval()


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
