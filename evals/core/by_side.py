"""How much of each latent lies on each side that a coder writes.

A latent's share of a side is that side's part of its decoder norms, each measured in standard deviations of its side
(the root of the total variance of a token), so that a side with large activations has no advantage.

Legend: M latents, S sides.
"""

import torch
from torch import Tensor

from skipcoder.evals.core.results import Result
from skipcoder.trainer.coder.coder import SparseCoder

EXCLUSIVE = 0.9
"""Share from which a latent belongs to one side alone."""


def decoder_norms(coder: SparseCoder) -> Tensor:
    """Length [M, S] of each latent's decoder on each side, in standard deviations of that side."""
    sides = coder.meta["sides"]
    parts = coder.W_dec.detach().split([side["width"] for side in sides], 1)
    return torch.stack([z.norm(dim=1) / side["variance"] ** 0.5 for z, side in zip(parts, sides, strict=True)], 1)


def norm_shares(coder: SparseCoder) -> Tensor:
    """Each latent's shares [M, S], which add up to 1."""
    norms_MS = decoder_norms(coder)
    return norms_MS / norms_MS.sum(1, keepdim=True).clamp_min(1e-30)


def by_side(coder: SparseCoder, fired_M: Tensor, fvus: list[Result]) -> list[Result]:
    """For each side its name and `fvus`, the mean share of the latents that fire, and how many of them are
    `exclusive` to it."""
    shares_MS = norm_shares(coder).to(fired_M.device)[fired_M > 0]
    return [
        {
            "hookpoint": facts["hookpoint"],
            "side": facts["side"],
            **fvu,
            "norm_share": float(shares_M.mean()) if len(shares_M) else None,
            "exclusive": int((shares_M >= EXCLUSIVE).sum()),
        }
        for facts, fvu, shares_M in zip(coder.meta["sides"], fvus, shares_MS.T, strict=True)
    ]
