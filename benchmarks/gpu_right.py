"""Is the step right on this device? For gpu_check.py."""

import gpu_contenders as contenders
import torch
from shapes import Shape
from torch import Tensor

from skipcoder.kernels.candidates import candidates, topk_lowest
from skipcoder.kernels.rows import by_latent, gather_dot, gather_sum


def right(shape: Shape, device: str) -> list[str]:
    """Check everything at one shape; return what was found, raise AssertionError if anything is wrong."""
    lines = ["relative errors against float64: " + ", ".join(_operations(shape, device))]
    _selection(shape, device)
    lines.append("selection: exactly the largest, of equals the first")
    if shape.m <= 2**15:  # the tests in tests/ go deeper; this is the shape itself
        lines.append(_bits(shape, device))
    return lines


def _operations(shape: Shape, device: str) -> list[str]:
    n, d, m, k = (min(shape[0], 256), *shape[1:])
    g = torch.Generator().manual_seed(1)
    x, W = torch.randn(n, d, generator=g).to(device), torch.randn(m, d, generator=g).to(device)
    indices = torch.rand(n, m, generator=g).topk(k).indices.to(device)
    weights = torch.randn(n, k, generator=g).to(device)
    x64, w64 = x.double(), weights.double()
    chosen = W.double()[indices]
    rows = torch.zeros(m, d, dtype=torch.float64, device=device)
    rows.index_put_((indices.flatten(),), (w64[:, :, None] * x64[:, None]).flatten(0, 1), accumulate=True)
    latents = by_latent(indices, m)
    pairs: dict[str, tuple[Tensor, Tensor]] = {
        "gather_sum": (gather_sum(indices, weights, W), (w64[:, :, None] * chosen).sum(1)),
        "gather_dot": (gather_dot(x, W, indices), (x64[:, None] * chosen).sum(2)),
        "sum_rows": (latents.sum_rows(weights, x), rows),
    }
    if not torch.equal(latents.sum_rows(weights, x), pairs["sum_rows"][0]):
        raise AssertionError(f"sum_rows is not the same from run to run at {shape}")
    lines = []
    for name, (got, exact) in pairs.items():
        error = float((got.double() - exact).norm() / exact.norm())
        if not error < 1e-5:
            raise AssertionError(f"{name} is wrong at {shape}: relative error {error:.2e}")
        lines.append(f"{name} {error:.1e}")
    return lines


def _selection(shape: Shape, device: str) -> None:
    """Against a stable sort, with and without many duplicates."""
    g = torch.Generator().manual_seed(2)
    for levels in (3, 10**6):
        pre = torch.randint(-levels, levels, (64, shape.m), generator=g).to(device).bfloat16()
        wanted = pre.sort(dim=1, descending=True, stable=True).indices[:, : shape.k]
        if not torch.equal(topk_lowest(pre, shape.k)[1], wanted):
            raise AssertionError(f"the top-k of {shape.m} elements is wrong")
        found = candidates(pre, shape.k)
        if device == "cuda" and not torch.equal(found, wanted.sort(1).values):
            raise AssertionError(f"the candidates among {shape.m} elements are wrong")


def _bits(shape: Shape, device: str) -> str:
    """Two runs of six steps, one of them eager: the same weights; no step waits."""
    pairs = contenders.Pairs(shape, device)
    ends = []
    for graphed in (True, False):
        one = contenders.learner(pairs, steps=6)
        if not graphed:
            one.graphs = None
        for i in range(6):
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("error" if i in (1, 3, 4) else "default")  # not when capturing
            one.step(pairs.x, pairs.y, shape.n)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        ends.append([p.detach().clone() for p in one.coder.parameters()])
    if not all(torch.equal(a, b) for a, b in zip(*ends, strict=True)):
        raise AssertionError(f"replayed and eager steps differ at {shape}")
    return "six replayed and six eager steps give the same bits, and no step waits"
