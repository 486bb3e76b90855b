"""Models in half precision on CPUs that have no instructions for it, as those of most laptops."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def supported(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this type on this CPU by oneDNN, and not by its own plain loops."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class WideLinear(nn.Linear):
    """A linear layer in half precision whose sums are taken in float32 and rounded once.

    On an AVX2 CPU SmolLM2's forward pass takes a quarter of the time so (benchmarks/half_precision.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        """As nn.Linear. Weights are widened for each call, so they take no more memory between calls."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def widen(model: nn.Module) -> None:
    """Make all of the model's nn.Linear WideLinear, in place. GPT-2's own Conv1D stays as it is."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
