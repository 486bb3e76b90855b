"""The schedule-free sign step against its definition, and against the library that eai-sparsify trains with."""

import os

import pytest
import torch
from torch import Tensor

from skipcoder.kernels import backend
from skipcoder.kernels import update as module
from skipcoder.kernels.update import sign_step, sign_step_reference

DEVICE = os.environ.get("SKIPCODER_TEST_DEVICE", "cpu")
LR, BETA = 0.01, 0.9


def steps(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Gradients, some of them 0."""
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(count)]
    return [torch.where(grad.abs() < 0.3, 0, grad).to(DEVICE, dtype) for grad in grads]


@pytest.mark.parametrize("step", ["torch", "triton"])
def test_ten_steps_follow_the_definition(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", 7)
    shape, dtype = (5, 9), torch.float64 if step == "torch" else torch.float32
    y = torch.ones(shape, dtype=dtype, device=DEVICE)
    x = z_exact = y_exact = y.double()
    z = y.clone()
    for i, grad in enumerate(steps(10, shape, dtype)):
        c = 1 / (i + 1)
        x, z_exact, y_exact = sign_step_reference(x, z_exact, grad.double(), LR, BETA, c)
        if step == "torch":
            sign_step(y, z, grad, LR, BETA, torch.tensor(i + 1.0))
        else:
            monkeypatch.setattr(backend, "ON_CPU", True)
            sign_step(y, z, grad, torch.tensor(LR, device=DEVICE), BETA, torch.tensor(i + 1.0, device=DEVICE))
    # Ten sums of numbers near 1.
    tolerance = 1e-14 if step == "torch" else 1e-5
    torch.testing.assert_close(y.double(), y_exact, rtol=0, atol=tolerance)
    torch.testing.assert_close(z.double(), z_exact, rtol=0, atol=tolerance)


def test_equals_the_schedulefree_library() -> None:
    schedulefree = pytest.importorskip("schedulefree")

    class Sign(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {"lr": LR})

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad.sign(), alpha=LR)

    theirs = torch.ones(5, 9, dtype=torch.float64, requires_grad=True)
    library = schedulefree.ScheduleFreeWrapper(Sign([theirs]), momentum=BETA)
    library.train()
    y = torch.ones(5, 9, dtype=torch.float64)
    z = y.clone()
    for i, grad in enumerate(steps(10, (5, 9), torch.float64)):
        theirs.grad = grad.cpu()
        library.step()
        sign_step(y, z, grad.cpu(), LR, BETA, torch.tensor(i + 1.0))
        torch.testing.assert_close(y, theirs.detach(), rtol=0, atol=1e-13)
    library.eval()
    torch.testing.assert_close(torch.lerp(y, z, 1 - 1 / BETA), theirs.detach(), rtol=0, atol=1e-13)
