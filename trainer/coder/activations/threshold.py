"""One threshold for all latents, found from activations. Legend: N tokens, D input width."""

import torch
from torch import Tensor

from skipcoder.kernels.encode import encode_batchtopk
from skipcoder.trainer.coder.activations.base import Encoder
from skipcoder.trainer.data.ranks import Group

CALIBRATION_TOKENS = 2**14
"""Training tokens on which a threshold is set once training is over."""


@torch.no_grad()
def set_threshold(coder: Encoder, x_ND: Tensor, k: int) -> None:
    """Set the one threshold for all latents above which exactly k fire per token of `x_ND` (in the coder's scale)."""
    assert coder.threshold is not None
    search = coder.search._replace(mode="float32")
    x_ND, shard = x_ND.to(coder.W_enc.dtype), coder.shard
    codes = encode_batchtopk(x_ND, coder.W_enc, coder.b_enc, k, coder.b_pre, search, peers=shard)
    least = smallest(codes.values, Group() if shard is None else shard.group)
    # The comparison is "above": the smallest that should fire must exceed the threshold.
    coder.threshold.fill_(float(torch.nextafter(least, torch.zeros_like(least))))


def smallest(values: Tensor, of: Group) -> Tensor:
    """Return the smallest positive value of some processes; 0 if there is none."""
    least = torch.where(values > 0, values, torch.inf).flatten()
    least = of.least(torch.cat([least, least.new_full((1,), torch.inf)]).amin())
    return torch.where(least < torch.inf, least, 0)
