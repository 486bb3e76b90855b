"""Optimisers of one coder, and the learning-rate schedule.

Skipping rows without a gradient would not be exact: Adam's moments go on decaying and moving them, and the
schedule-free y goes on moving towards z. Thus every step touches every row.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.kernels.unsummed import RowSums
from skipcoder.kernels.update import adam_rows, sign_rows, sign_step
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import OptimConfig, OptimName


def learning_rate(cfg: OptimConfig, width: int) -> float:
    """Return the configured rate, or the usual one: Adam 2e-4 / sqrt(width / 2^14) (the paper's), signum 5e-3 over the
    same root, Muon 2e-3 (both eai-sparsify's)."""
    if cfg.lr is not None:
        return cfg.lr
    if cfg.name is OptimName.muon:
        return 2e-3
    return {OptimName.adam: 2e-4, OptimName.signum: 5e-3}[cfg.name] / math.sqrt(width / 2**14)


def build_optimiser(cfg: OptimConfig, coder: SparseCoder) -> "Optimiser":
    """Build the configured optimiser over the parameters of one coder."""
    lr = learning_rate(cfg, coder.cfg.width)
    on_gpu = coder.W_enc.is_cuda
    groups: list[dict[str, Any]] = [
        {"params": [p], "scale": coder.activation.learning_rate_scale(name, coder.d_in)}
        for name, p in coder.named_parameters()
    ]
    if cfg.name is OptimName.signum:
        return Optimiser(lr, ScheduleFreeSign(groups, lr, cfg.momentum))
    vectors = [g for g in groups if cfg.name is OptimName.adam or g["params"][0].dim() < 2]
    # One fused pass per parameter: on CPU 5 ms where the foreach form takes 27 ms.
    betas = (cfg.beta1, cfg.beta2)
    adam = torch.optim.Adam(vectors, lr=lr, betas=betas, eps=cfg.eps, fused=True, capturable=on_gpu)
    if cfg.name is OptimName.adam:
        return Optimiser(lr, adam)
    matrices = [g for g in groups if g["params"][0].dim() == 2]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=cfg.momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Optimiser(lr, adam, muon)


class Optimiser:
    """One or several torch optimisers that share the schedule and the step.

    On a GPU all that changes from step to step, the rate and the numbers of steps, is held in tensors, so that a step
    can be replayed as a CUDA graph.
    """

    def __init__(self, lr: float, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.base_lr = self.lr = lr
        self.schedule_free = isinstance(parts[0], ScheduleFreeSign)
        self.takes_sums = len(parts) == 1
        """Whether `step` takes gradients of matrices that are left unsummed."""
        self._hold_rates()

    def set_rate(self, factor: float) -> None:
        """Let the next step move at `factor` times the base rate."""
        self.lr = self.base_lr * factor
        for group in self._groups:
            rate = self.lr * group["scale"]
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def step(
        self,
        sums: Mapping[nn.Parameter, RowSums] | None = None,
        unit: nn.Parameter | None = None,
        halves: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        """Move the parameters and drop the gradients. `sums`: gradients of matrices that have no `.grad`; the rows of
        `unit` are brought back to length 1 if it is one of these; `halves`: copies in bfloat16 to keep up to date."""
        sums, halves = sums or {}, halves or {}
        for parameter, one in sums.items():
            ((part, group),) = ((p, g) for p in self.parts for g in p.param_groups if g["params"][0] is parameter)
            move = part.step_rows if isinstance(part, ScheduleFreeSign) else partial(_adam_rows, part)
            move(group, parameter, one, parameter is unit, halves.get(parameter))
        for part in self.parts:
            part.step()
            part.zero_grad(set_to_none=True)
        for parameter in halves.keys() - sums.keys():
            halves[parameter].copy_(parameter.detach())

    def copies(self, parameter: nn.Parameter) -> list[Tensor]:
        """Return the parameter and, if schedule-free, the z kept with it."""
        return [parameter, self.parts[0].state[parameter]["z"]] if self.schedule_free else [parameter]

    def averaged(self, parameter: nn.Parameter) -> Tensor:
        """Return what to save and evaluate in place of the parameter: the parameter itself unless schedule-free."""
        return self.parts[0].averaged(parameter) if isinstance(self.parts[0], ScheduleFreeSign) else parameter

    def state_dict(self) -> list[dict[str, Any]]:
        """Return the state of every part."""
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states: list[dict[str, Any]]) -> None:
        """Continue bit for bit from what `state_dict` gave."""
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)
        self._hold_rates()

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def _hold_rates(self) -> None:
        """Put rates into tensors on a GPU, and nowhere else (a state may come from another device)."""
        for group in self._groups:
            device, rate = group["params"][0].device, float(group["lr"])
            on_gpu = device.type == "cuda"
            group["lr"] = torch.tensor(rate, device=device) if on_gpu else rate
            if "capturable" in group:
                group["capturable"] = on_gpu


def _adam_rows(
    adam: torch.optim.Optimizer, group: dict[str, Any], parameter: nn.Parameter, sums: RowSums, unit: bool,
    half: Tensor | None,
) -> None:  # fmt: skip
    """Make the step of torch's fused Adam, with the state that it keeps, on a gradient that is left unsummed."""
    state = adam.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    adam_rows(
        parameter, state["exp_avg"], state["exp_avg_sq"], sums, state["step"], group["lr"], group["betas"],
        group["eps"], unit, half,
    )  # fmt: skip


class ScheduleFreeSign(torch.optim.Optimizer):
    """Schedule-free sign descent, eai-sparsify's "signum". Parameters hold y, where gradients are taken; the state
    holds z. `averaged` makes x, the average and the weights to use, from both."""

    def __init__(self, params: Iterable[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move z by a step that counts as much in the average as each step before it."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self._next(p)
                    sign_step(p, state["z"], p.grad, group["lr"], group["momentum"], state["step"])

    @torch.no_grad()
    def step_rows(self, group: dict[str, Any], p: nn.Parameter, sums: RowSums, unit: bool, half: Tensor | None) -> None:
        """Make the same step on a gradient that is left unsummed."""
        state = self._next(p)
        sign_rows(p, state["z"], sums, group["lr"], group["momentum"], state["step"], unit, half)

    def _next(self, p: nn.Parameter) -> dict[str, Any]:
        state: dict[str, Any] = self.state[p]
        if not state:  # not earlier: weights may be initialised until now
            state |= {"z": p.detach().clone(), "step": torch.zeros(())}
        state["step"] = state["step"].to(p.device) + 1 if state["step"].device != p.device else state["step"].add_(1)
        return state

    @torch.no_grad()
    def averaged(self, parameter: nn.Parameter) -> Tensor:
        """Return x = y + (1 / beta - 1) (y - z)."""
        if not self.state[parameter]:
            return parameter
        return torch.lerp(parameter, self.state[parameter]["z"], 1 - 1 / self.param_groups[0]["momentum"])


def schedule(cfg: OptimConfig, step: int, steps: int) -> float:
    """Return the factor on the rate at `step` (from 0) of `steps`: linear warm-up over at most 5 % of the run, then
    linear decay to 0; always 1 for signum, which is schedule-free.

    >>> [round(schedule(OptimConfig(), s, 100), 3) for s in (0, 4, 5, 99)]
    [0.2, 1.0, 1.0, 0.011]
    """
    if cfg.name is OptimName.signum:
        return 1.0
    warmup = min(cfg.warmup_steps, math.ceil(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    return (steps - step) / max(steps - warmup, 1)
