"""JumpReLU: every latent above its own learned threshold fires (Rajamanoharan et al., arXiv 2407.14435).

A penalty, weight * (latents per token / k - 1)^2, holds the number of latents at k. Legend: N tokens, M latents.
"""

import torch
from torch import Tensor

from skipcoder.kernels.encode import Codes, encode_above
from skipcoder.kernels.jumprelu import fires, jumprelu, per_entry
from skipcoder.trainer.coder.activations.base import Activation, Encoder, Step
from skipcoder.trainer.coder.activations.threshold import set_threshold
from skipcoder.trainer.data.ranks import Ranks

BANDWIDTH = 1e-3
"""Width of the window in which a threshold learns, relative to the length of an input (the paper scales inputs to
length 1; here their elements are about 1)."""


class JumpReLU(Activation):
    """Chooses all latents above learned thresholds."""

    name = "jumprelu"
    shards = True

    def attach(self, coder: Encoder) -> None:
        """Add a parameter `threshold` [M]."""
        coder.register_parameter("threshold", torch.nn.Parameter(torch.zeros(len(coder.latents))))

    def learning_rate_scale(self, name: str, d_in: int) -> float:
        """Return sqrt(d_in) for thresholds, which must keep up with pre-activations: as inputs have elements of about
        1, a change of every weight by the rate moves these by up to about sqrt(d_in) times the rate."""
        return d_in**0.5 if name == "threshold" else 1.0

    def encode(self, coder: Encoder, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return flat codes."""
        return encode_and_count(coder, x_ND)[0]

    def begin(self, coder: Encoder, x_ND: Tensor, k: int, ranks: Ranks) -> None:
        """Start from a threshold at which k latents fire per token."""
        set_threshold(coder, ranks.data.gather(x_ND), k)

    def step(self, coder: Encoder, k: int, ranks: Ranks) -> Step:
        """Return a step with the penalty on the number of latents."""
        return _Step(self, coder, k, ranks)


def encode_and_count(coder: Encoder, x_ND: Tensor) -> tuple[Codes, Tensor]:
    """Return codes, and how many latents fire on all of these tokens, both with gradients to the thresholds."""
    assert coder.threshold is not None
    bandwidth = BANDWIDTH * coder.d_in**0.5
    lowest_M = coder.threshold.detach() - bandwidth / 2  # entries below the threshold but in its window also learn
    x_ND = x_ND.to(coder.W_enc.dtype)
    codes = encode_above(x_ND, coder.W_enc, coder.b_enc, lowest_M, coder.b_pre, coder.search)
    theta_L = per_entry(coder.threshold, codes.indices, codes.by_latent)
    fired = fires(codes.values, theta_L, bandwidth).sum()
    return codes._replace(values=jumprelu(codes.values, theta_L, bandwidth)), fired


class _Step(Step):
    """The penalty is the square of a mean over the whole batch, so it does not add up over micro-batches; the mean and
    its slope do."""

    def __init__(self, activation: Activation, coder: Encoder, k: int, ranks: Ranks) -> None:
        super().__init__(activation, coder, k, ranks)
        self.l0, self.slope_M = torch.zeros((), device=coder.b_enc.device), torch.zeros_like(coder.b_enc)

    def encode(self, x_ND: Tensor) -> Codes:
        """Return codes, and remember how many latents fired."""
        codes, self.fired = encode_and_count(self.coder, x_ND)
        return codes

    def backward(self, batch_tokens: int) -> None:
        """Add this micro-batch's share of latents per token, and its slope in the thresholds."""
        assert self.coder.threshold is not None
        l0 = self.fired / batch_tokens
        self.slope_M += torch.autograd.grad(l0, self.coder.threshold, retain_graph=True)[0]
        self.l0 += l0.detach()

    def finish(self, l0_weight: float, first: bool) -> dict[str, Tensor]:
        """Return the penalty, and add its gradient to that of the thresholds."""
        assert self.coder.threshold is not None and self.coder.threshold.grad is not None
        self.ranks.sum(self.l0)
        excess = self.l0 / self.k - 1
        self.coder.threshold.grad += 2 * l0_weight / self.k * excess * self.slope_M
        return {"l0_penalty": l0_weight * excess.square()}
