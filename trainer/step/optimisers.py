"""Optimisers of one coder, and the learning-rate schedule.

Skipping rows without a gradient would not be exact: Adam's moments go on decaying and moving them, and the
schedule-free y goes on moving towards z. Thus every step touches every row.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from skipcoder.kernels.update import sign_step
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
    groups: list[dict[str, Any]] = [
        {"params": [p], "scale": coder.activation.learning_rate_scale(name, coder.d_in)}
        for name, p in coder.named_parameters()
    ]
    if cfg.name is OptimName.signum:
        return Optimiser(lr, ScheduleFreeSign(groups, lr, cfg.momentum))
    vectors = [g for g in groups if cfg.name is OptimName.adam or g["params"][0].dim() < 2]
    # One fused pass per parameter: on CPU 5 ms where the foreach form takes 27 ms.
    adam = torch.optim.Adam(vectors, lr=lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    if cfg.name is OptimName.adam:
        return Optimiser(lr, adam)
    matrices = [g for g in groups if g["params"][0].dim() == 2]
    muon = torch.optim.Muon(matrices, lr=lr, momentum=cfg.momentum, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return Optimiser(lr, adam, muon)


class Optimiser:
    """One or several torch optimisers that share the schedule and the step."""

    def __init__(self, lr: float, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self.base_lr = self.lr = lr
        self.schedule_free = isinstance(parts[0], ScheduleFreeSign)

    def step(self, factor: float) -> None:
        """Move the parameters at `factor` times the base rate, and drop the gradients."""
        self.lr = self.base_lr * factor
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = self.lr * group["scale"]
            part.step()
            part.zero_grad(set_to_none=True)

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
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:  # not earlier: weights may be initialised until now
                    state |= {"z": p.detach().clone(), "step": torch.zeros(())}
                state["step"] += 1
                sign_step(p, state["z"], p.grad, group["lr"], group["momentum"], 1 / float(state["step"]))

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
