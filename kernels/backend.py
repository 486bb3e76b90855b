"""Which of the two backends computes: Triton (gpu/) on CUDA tensors, torch on all others and in float64."""

import torch
from torch import Tensor

ON_CPU = False
"""Whether Triton computes on CPU tensors, too: for tests in its interpreter."""


def in_triton(tensor: Tensor) -> bool:
    """Return whether Triton computes on this tensor."""
    return (tensor.is_cuda or ON_CPU) and tensor.dtype != torch.float64
