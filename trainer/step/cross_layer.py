"""A cross-layer transcoder in training: a learner for each layer, which meet in the loss.

The loss is the sum of the layers' FVUs. To each layer, what the others write is part of what it finds: it has the
error that all of them leave in the outputs within its window, and its gradient, its clipping and its optimiser are its
own. With a window of 0 there are no others, and each layer learns to the bit what a transcoder of it learns alone.

A step of each layer runs in a thread of its own, one at a time and in the same order always, and gives way where it
waits for the others. Legend: N tokens, L layers, E output widths.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from skipcoder.kernels.preactivations import MODES
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.coder.cross_layer import CrossLayerTranscoder, LayerCoder, targets
from skipcoder.trainer.config import TrainConfig
from skipcoder.trainer.data.turns import give_way, in_turns
from skipcoder.trainer.step.clock import Clock
from skipcoder.trainer.step.learner import Learner
from skipcoder.trainer.step.sides import Parts, sides
from skipcoder.trainer.step.state import LearnerState


class CrossLayerLearner:
    """Trains the coders of all layers on batches of raw activations; otherwise as Learner."""

    def __init__(self, cfg: TrainConfig, x: Sequence[Moments], y: Sequence[Moments], steps: int, device: str) -> None:
        """`x` and `y`: moments of what enters and leaves each layer's MLP, over the training units."""
        self.cfg, self.steps, self.sides = cfg, steps, sides(cfg.coder)
        window = cfg.coder.window
        self.targets = [targets(layer, len(y), window) for layer in range(len(y))]
        eager = replace(cfg, train=replace(cfg.train, graph=False))  # a step waits for others
        self.learners = [
            Learner(eager, one, [y[t] for t in to], steps, device, in_bfloat16=True)
            for one, to in zip(x, self.targets, strict=True)
        ]
        self.first = self.learners[0]
        self.activation, self.optimiser = self.first.activation, self.first.optimiser
        self.clock = LayersClock(device, len(self.learners))
        for learner in self.learners:  # one after another they mark the ends of their phases
            learner.clock = self.clock
        if any(len(to) > 1 for to in self.targets):
            meeting = Meeting([learner.writes.widths for learner in self.learners], self.targets)
            for layer, learner in enumerate(self.learners):
                learner.meet = partial(meeting.total, layer)

    def step(self, x: Parts, y: Parts, batch_tokens: int) -> dict[str, Tensor]:
        """Make one optimiser step; `fvu` is the mean over the layers, and so are the other terms."""
        works = [
            partial(learner.step, [x[layer]], [y[t] for t in self.targets[layer]], batch_tokens)
            for layer, learner in enumerate(self.learners)
        ]
        found = in_turns(works, at_once=len(works)) if self.first.meet else [work() for work in works]
        own = [one.get("fvu_side_0", one["fvu"]) for one in found]
        mean = {key: torch.stack([one[key] for one in found]).mean() for key in found[0] if "_side_" not in key}
        return mean | {"fvu": torch.stack(own).mean()} | {f"fvu_side_{t}": fvu for t, fvu in enumerate(own)}

    @torch.no_grad()
    def fvus(self, x: Parts, y: Parts) -> list[float]:
        """Return each layer's FVU of raw tokens with the weights that would be saved now."""
        with self._as_saved() as coder:
            row_x, row_y = (
                torch.cat([row.made("", [z], None) for row, z in zip(rows, parts, strict=True)], 1)
                for rows, parts in (
                    ([learner.reads for learner in self.learners], x),
                    ([self._own(learner) for learner in self.learners], y),
                )
            )
            error = row_y.double() - coder(row_x).y_hat.double()
        spread = row_y.double() - row_y.double().mean(0)
        squares = zip(*(z.square().split(coder.d_outs, 1) for z in (error, spread)), strict=True)
        return [float(missed.sum() / of.sum()) for missed, of in squares]

    def calibrate(self, x: Parts, y: Parts) -> None:
        """Let each layer's activation calibrate itself on some raw tokens after training."""
        for layer, learner in enumerate(self.learners):
            learner.calibrate([x[layer]], [y[t] for t in self.targets[layer]])

    def folded(self) -> CrossLayerTranscoder:
        """Return the coder to save, for raw activations, on the CPU."""
        return CrossLayerTranscoder(self.cfg.coder, [_layer(learner.folded()) for learner in self.learners])

    @contextmanager
    def _as_saved(self) -> Iterator[CrossLayerTranscoder]:
        with ExitStack() as stack:
            coders = [_layer(stack.enter_context(learner.as_saved())) for learner in self.learners]
            yield CrossLayerTranscoder(self.cfg.coder, coders)

    @staticmethod
    def _own(learner: Learner) -> Any:
        row = learner.writes
        return replace(row, widths=row.widths[:1], scales=row.scales[:1], variances=row.variances[:1])

    # ---- what a member asks of a learner -----------------------------------------------------------

    @property
    def coder(self) -> Any:
        """The coder of the layer whose search is the most exact, which stands for all in what they have in common."""
        return min((learner.coder for learner in self.learners), key=lambda coder: MODES.index(coder.search.mode))

    @property
    def step_number(self) -> int:
        """Steps made."""
        return self.first.step_number

    @property
    def tokens(self) -> int:
        """Tokens seen."""
        return self.first.tokens

    @property
    def recall(self) -> float:
        """The least of the layers' recalls."""
        return min(learner.recall for learner in self.learners)

    @property
    def dead(self) -> int:
        """Latents of all layers that have not fired for `dead_tokens` tokens."""
        return sum(learner.dead for learner in self.learners)

    @property
    def density(self) -> dict[str, float]:
        """As Learner's, the mean over the layers."""
        each = [learner.density for learner in self.learners]
        return {key: sum(one[key] for one in each) / len(each) for key in each[0]}

    def state_dict(self) -> LearnerState:
        """Return all that `step` depends on: the first layer's state, and those of the others."""
        first, *others = (learner.state_dict() for learner in self.learners)
        return {**first, "layers": others}

    def load_state_dict(self, state: LearnerState) -> None:
        """Continue bit for bit from a state of the same configuration."""
        for learner, one in zip(self.learners, [state, *state["layers"]], strict=True):
            learner.load_state_dict(one)


def _layer(coder: Any) -> LayerCoder:
    assert isinstance(coder, LayerCoder)
    return coder


class LayersClock(Clock):
    """The clock of several learners, whose steps together are one."""

    def __init__(self, device: str, layers: int) -> None:
        super().__init__(device)
        self.layers = layers

    def read(self) -> dict[str, float]:
        """Return {phase: mean ms per step of all layers}."""
        return {phase: round(self.layers * ms, 3) for phase, ms in super().read().items()}


class Meeting:
    """Where layers leave what they write to a micro-batch, and find what all of them wrote. They come in order."""

    def __init__(self, widths: Sequence[Sequence[int]], targets: Sequence[range]) -> None:
        """Of each layer the widths of what it writes, and to which layers."""
        self.widths, self.targets = widths, targets
        self._been = [0] * len(targets)
        """How often each layer has come."""
        self._written: dict[int, list[Tensor | None]] = {}
        """Of each micro-batch under way what is written to each layer so far."""

    def total(self, layer: int, own_NE: Tensor) -> Tensor:
        """Leave what a layer writes; wait; return what all write to the same sides."""
        written = self._written.setdefault(self._been[layer], [None] * len(self.targets))
        for target, part in zip(self.targets[layer], own_NE.split(list(self.widths[layer]), 1), strict=True):
            before = written[target]
            written[target] = part if before is None else before + part
        give_way()
        if layer == len(self.targets) - 1:
            del self._written[self._been[layer]]
        self._been[layer] += 1
        return torch.cat([z for t in self.targets[layer] if (z := written[t]) is not None], 1)


AnyLearner = Learner | CrossLayerLearner
