"""What an activation is: everything in which one way of choosing latents differs from another.

An activation is a stateless object in the table `ACTIVATIONS`, shared by all coders that use it; what it learns or
remembers is kept in the coder (`attach`). A module of your own can do whatever a built-in one does (docs/extending.md).

Legend: N tokens, K active latents, M latents, D input width, L entries of flat codes.
"""

from typing import Protocol

import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.kernels.encode import Codes
from skipcoder.kernels.preactivations import Search
from skipcoder.registry import Registry
from skipcoder.trainer.coder.shard import Shard
from skipcoder.trainer.config import CoderConfig, TrainConfig
from skipcoder.trainer.data.ranks import Ranks


class Encoder(Protocol):
    """What an activation sees of a coder (SparseCoder is one)."""

    cfg: CoderConfig
    d_in: int
    search: Search
    threshold: Tensor | None
    training: bool
    latents: range
    """Those that the parameters have rows for."""
    shard: Shard | None
    """Who holds the others, where one process does not hold all."""

    @property
    def W_enc(self) -> Tensor:  # noqa: N802
        """[M, D]."""

    @property
    def b_enc(self) -> Tensor:
        """[M]."""

    @property
    def b_pre(self) -> Tensor | None:
        """[D], what is subtracted from the input, if anything."""

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        """Add something that is learned and saved."""

    def register_buffer(self, name: str, tensor: Tensor | None) -> None:
        """Add something that is saved, but not learned."""


class Step:
    """One optimiser step of one coder, as its activation sees it. Made by `Activation.step`; this class
    suits activations that treat each token by itself."""

    def __init__(self, activation: "Activation", coder: Encoder, k: int, ranks: Ranks) -> None:
        self.activation, self.coder, self.k, self.ranks = activation, coder, k, ranks

    def encode(self, x_ND: Tensor) -> Codes:
        """Return codes of a micro-batch, with gradients. Called once for each micro-batch, before its backward pass;
        not with `loss.multi_topk`, which takes its codes from `Activation.encode`."""
        return self.activation.encode(self.coder, x_ND, self.k)

    def backward(self, batch_tokens: int) -> None:
        """Called before the backward pass of a micro-batch, part of a global batch of `batch_tokens`."""

    def finish(self, l0_weight: float, first: bool) -> dict[str, Tensor]:
        """Called after the last backward pass, before gradients are summed over ranks. Returns more terms of the loss,
        whose gradients it has added itself. `first`: whether this is the first step of the run."""
        return {}


class Activation:
    """One way of choosing the latents that fire. Subclasses override what differs."""

    name = ""
    nested = False
    """Whether a choice of k is the k largest of any larger choice, as Multi-TopK (`loss.multi_topk`) needs; its step
    must do without `Step.encode`."""
    k_may_vary = False
    """Whether k may change during training (`train.k_start`)."""
    shards = False
    """Whether it works on a coder of which each process holds some latents (`train.shards`)."""
    is_static = False
    """Whether a training step's work on a GPU is the same whatever the values, so that it can be a CUDA graph."""
    calibration_tokens = 0
    """Training tokens that `calibrate` needs once training is over; 0: it is not called."""

    def check(self, cfg: CoderConfig) -> None:
        """Raise UserError for a coder that cannot have this activation."""

    def check_training(self, cfg: TrainConfig, ranks: int = 1) -> None:
        """Raise UserError for training options that this activation does not support on `ranks` processes."""
        if cfg.loss.multi_topk and not self.nested:
            raise UserError(f"loss.multi_topk needs coder.activation={_where('nested')}, not {cfg.coder.activation}")
        if cfg.train.k_start is not None and not self.k_may_vary:
            able = _where("k_may_vary")
            raise UserError(f"train.k_start needs coder.activation={able}, not {cfg.coder.activation}")
        if cfg.train.shards > 1 and not self.shards:
            raise UserError(f"train.shards needs coder.activation={_where('shards')}, not {cfg.coder.activation}")

    def attach(self, coder: Encoder) -> None:
        """Give a new coder the parameters and buffers of this activation."""

    def learning_rate_scale(self, name: str, d_in: int) -> float:
        """Return the factor on the learning rate of the coder's parameter `name`."""
        return 1.0

    def encode(self, coder: Encoder, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return the active latents of each token (k of them, or the coder's own k), in training and afterwards
        (`coder.training`)."""
        raise NotImplementedError

    def begin(self, coder: Encoder, x_ND: Tensor, k: int, ranks: Ranks) -> None:
        """Called before the first step with this rank's part of the first batch, in the coder's scale."""

    def step(self, coder: Encoder, k: int, ranks: Ranks) -> Step:
        """Return what this activation does in one optimiser step."""
        return Step(self, coder, k, ranks)

    def calibrate(self, coder: Encoder, x_ND: Tensor) -> None:
        """Called when training is over, on `calibration_tokens` tokens in the coder's scale."""


ACTIVATIONS: Registry[Activation] = Registry("coder.activation", {})
"""Every activation by its name; activations/__init__.py fills in the built-in ones."""


def _where(attribute: str) -> str:
    """Name the activations that have a property, for error messages."""
    return " or ".join(name for name, activation in ACTIVATIONS.items() if getattr(activation, attribute))
