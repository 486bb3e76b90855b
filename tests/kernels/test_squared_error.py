"""The loss's operation against dense float64 autograd: by torch, in Triton, and with gradients left unsummed."""

import pytest
import torch
from torch import Tensor

from skipcoder.kernels import backend
from skipcoder.kernels.encode import encode_batchtopk, encode_reference, encode_topk
from skipcoder.kernels.squared_error import squared_error, squared_error_reference
from skipcoder.kernels.unsummed import Pending, leaving_unsummed
from tests.kernels.test_encode import DEVICE, gradient

N, D, E, M, K = 20, 24, 28, 40, 6


def problem(dtype: torch.dtype, skip: bool) -> list[Tensor]:
    """x, W_enc, b_enc, W_dec, base and y."""
    g = torch.Generator().manual_seed(0)
    sizes = [(N, D), (M, D), (M,), (M, E), (N, E) if skip else (E,), (N, E)]
    return [torch.randn(size, generator=g, dtype=torch.float64).to(DEVICE, dtype) for size in sizes]


def blocks_of(latents: Tensor, blocks: int) -> Tensor:
    return torch.bucketize(latents, torch.tensor([10, 25][: blocks - 1], device=DEVICE), right=True)


@pytest.mark.parametrize("way", ["torch", "triton", "unsummed"])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("widths", [(), (8, 19, 1)])
@pytest.mark.parametrize(("activation", "skip"), [("topk", False), ("topk", True), ("batchtopk", False)])
def test_squares_and_gradients(
    way: str, blocks: int, widths: tuple[int, ...], activation: str, skip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    *theirs, target = problem(torch.float64, skip)
    *mine, y = problem(torch.float64 if way == "torch" else torch.float32, skip)
    monkeypatch.setattr(backend, "ON_CPU", way != "torch")
    x, W_enc, b_enc, W_dec, base = (p.requires_grad_() for p in mine)
    codes = (encode_topk if activation == "topk" else encode_batchtopk)(x, W_enc, b_enc, K)
    block = None if blocks == 1 else blocks_of(codes.indices, blocks)
    found = squared_error(codes, W_dec, base, y, block, blocks, widths=widths)
    pending = Pending(), Pending()
    importance = torch.outer(torch.tensor([1.0, 0.5, 0.25][:blocks]), torch.tensor([2.0, 0.1, 7][: len(widths) or 1]))
    importance = importance.to(DEVICE)
    left = zip((W_enc, W_dec), pending, strict=True) if way == "unsummed" else ()
    with leaving_unsummed(*left):
        (importance * found.squares_BS).sum().backward()
    if way == "unsummed":
        assert W_enc.grad is None and W_dec.grad is None
        W_enc.grad, W_dec.grad = (one.sums[0].dense() for one in pending)
        for one in pending:
            sums = one.sums[0]
            torch.testing.assert_close(sums.squares_M, sums.dense().square().sum(1), rtol=1e-4, atol=1e-3)

    x64, W_enc64, b_enc64, W_dec64, base64 = (p.requires_grad_() for p in theirs)
    f = encode_reference(x64, W_enc64, b_enc64, K, None, activation)
    dense_block = blocks_of(torch.arange(M, device=DEVICE), blocks).expand(N, M)
    exact = squared_error_reference(f, W_dec64, base64, target, dense_block, widths)
    (importance * exact).sum().backward()
    # Sums of a few hundred products of numbers near 1, squared and added up: float32 keeps five digits.
    rtol, atol = (1e-10, 1e-9) if way == "torch" else (1e-4, 1e-2)
    torch.testing.assert_close(found.squares_BS.double(), exact, rtol=rtol, atol=atol)
    for a, b in zip((x, W_enc, b_enc, W_dec, base), (x64, W_enc64, b_enc64, W_dec64, base64), strict=True):
        torch.testing.assert_close(gradient(a).double(), gradient(b), rtol=rtol, atol=atol)
