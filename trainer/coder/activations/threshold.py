"""One threshold for all latents, found from activations. Legend: N tokens, D input width."""

import torch
from torch import Tensor

from skipcoder.kernels.encode import encode_batchtopk
from skipcoder.trainer.coder.activations.base import Encoder

CALIBRATION_TOKENS = 2**14
"""Training tokens on which a threshold is set once training is over."""


@torch.no_grad()
def set_threshold(coder: Encoder, x_ND: Tensor, k: int) -> None:
    """Set the one threshold for all latents above which exactly k fire per token of `x_ND` (in the coder's scale)."""
    assert coder.threshold is not None
    search = coder.search._replace(mode="float32")
    codes = encode_batchtopk(x_ND.to(coder.W_enc.dtype), coder.W_enc, coder.b_enc, k, coder.b_pre, search)
    least = smallest(codes.values)
    # The comparison is "above": the smallest that should fire must exceed the threshold.
    coder.threshold.fill_(float(torch.nextafter(least, torch.zeros_like(least))))


def smallest(values: Tensor) -> Tensor:
    """Return the smallest positive value; 0 if there is none."""
    least = torch.where(values > 0, values, torch.inf).flatten()
    least = torch.cat([least, least.new_full((1,), torch.inf)]).amin()
    return torch.where(least < torch.inf, least, 0)
