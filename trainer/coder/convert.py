"""Thresholds in place of top-k, for tools that have no top-k.

Legend: N tokens, D input width, M latents, C of them at once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from skipcoder.trainer.coder.coder import SparseCoder, make_coder
from skipcoder.trainer.config import ActivationName

CHUNK = 2**26
"""Pre-activations sorted at once."""


@torch.no_grad()
def converted(coder: SparseCoder, x_ND: Tensor) -> SparseCoder:
    """Return a top-k coder with a threshold per latent in place of top-k, such that on `x_ND` each fires as often as
    top-k chose it. One threshold for all costs far more (benchmarks/thresholds.py). Weights are shared with `coder`."""
    found = make_coder(replace(coder.cfg, activation=ActivationName.jumprelu), coder.d_in, coder.d_out)
    found.load_state_dict(coder.state_dict() | {"threshold": found.threshold}, assign=True)
    found.meta = coder.meta.copy()
    codes = coder.encode(x_ND)
    chosen_M = torch.bincount(codes.indices[codes.values > 0], minlength=coder.cfg.width)
    x_ND = x_ND.to(coder.W_enc.dtype) - (0 if coder.b_pre is None else coder.b_pre)
    thresholds = []
    for latents in torch.arange(coder.cfg.width, device=x_ND.device).split(max(1, CHUNK // len(x_ND))):
        pre_NC = (x_ND @ coder.W_enc[latents].T + coder.b_enc[latents]).sort(0, descending=True).values
        # Halfway between the smallest that should fire and the largest that should not: rounding must not decide.
        below_C = pre_NC.gather(0, chosen_M[latents].clamp_max(len(x_ND) - 1)[None])[0].clamp_min(0)
        above_C = pre_NC.gather(0, (chosen_M[latents] - 1).clamp_min(0)[None])[0].clamp_min(0)
        thresholds.append(torch.where(chosen_M[latents] > 0, (below_C + above_C) / 2, 2 * above_C))
    found.threshold = nn.Parameter(torch.cat(thresholds))
    return found.requires_grad_(False).eval()
