"""Models in half precision on CPUs that have no instructions for it, such as most laptops'."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def supported(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this type on this CPU with oneDNN, not with its own plain loops."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


class WideLinear(nn.Linear):
    """A linear layer in half precision that sums in float32 and rounds once.

    On an AVX2 CPU it makes SmolLM2's forward pass take a quarter of the time (benchmarks/half_precision.py).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Do what nn.Linear does. Weights are widened at each call, so they take no more memory between calls."""
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), self.weight.float(), bias).to(x.dtype)


def widen(model: nn.Module) -> None:
    """Turn all of the model's nn.Linear into WideLinear, in place. GPT-2's own Conv1D stays as it is."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WideLinear
