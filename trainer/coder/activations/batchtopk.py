"""BatchTopK: in training the whole batch competes for k latents per token; afterwards a threshold decides (Bussmann et
al., arXiv 2412.06410).

The threshold is a moving average of the smallest value that each batch kept; after training it is set anew so that k
latents fire per token. Legend: N tokens, M latents.
"""

import math

import torch
from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.kernels.encode import Codes, encode_above, encode_batchtopk, subset
from skipcoder.trainer.coder.activations.base import Activation, Encoder, Step
from skipcoder.trainer.coder.activations.threshold import CALIBRATION_TOKENS, set_threshold, smallest
from skipcoder.trainer.config import TrainConfig
from skipcoder.trainer.data.ranks import Ranks

HINT = 0.8
"""Fraction of the running threshold at which the search for a batch's largest values begins."""

RATE = 0.01
"""Weight of the latest batch in the running threshold."""


class BatchTopK(Activation):
    """Chooses the largest latents of the batch, k per token; outside training, all above a threshold."""

    name = "batchtopk"
    k_may_vary = True
    shards = True
    is_static = True
    calibration_tokens = CALIBRATION_TOKENS

    def check_training(self, cfg: TrainConfig, ranks: int = 1) -> None:
        """Raise UserError if several processes would not see the whole batch at once."""
        super().check_training(cfg, ranks)
        if ranks > cfg.train.shards and cfg.train.micro_batches > 1:
            raise UserError(
                f"coder.activation=batchtopk looks at the whole batch: with {ranks} processes, "
                f"train.micro_batches={cfg.train.micro_batches} must be 1"
            )

    def attach(self, coder: Encoder) -> None:
        """Add a buffer `threshold` [M], the same for all latents."""
        coder.register_buffer("threshold", torch.zeros(len(coder.latents)))

    def encode(self, coder: Encoder, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return flat codes."""
        x_ND = x_ND.to(coder.W_enc.dtype)
        assert coder.threshold is not None
        if not coder.training:
            return encode_above(x_ND, coder.W_enc, coder.b_enc, coder.threshold, coder.b_pre, coder.search)
        # All entries of the threshold are equal; it is no guide to a k other than the coder's.
        hint = (HINT * coder.threshold).amin() if k in (None, coder.cfg.k) else None
        k = k or coder.cfg.k
        return encode_batchtopk(x_ND, coder.W_enc, coder.b_enc, k, coder.b_pre, coder.search, hint, coder.shard)

    def step(self, coder: Encoder, k: int, ranks: Ranks) -> Step:
        """Return a step that sees the batch of all ranks and moves the threshold."""
        return _Step(self, coder, k, ranks)

    def calibrate(self, coder: Encoder, x_ND: Tensor) -> None:
        """Set the threshold at which k latents fire per token of `x_ND`."""
        set_threshold(coder, x_ND, coder.cfg.k)


class _Step(Step):
    codes: Codes

    def encode(self, x_ND: Tensor) -> Codes:
        """Return the largest latents of the batch of all ranks, k per token."""
        self.codes = self._encode(x_ND)
        return self.codes

    def _encode(self, x_ND: Tensor) -> Codes:
        if self.ranks.data.size == 1:
            return super().encode(x_ND)
        # Tokens are dealt at random, so each rank first offers a quarter more than its share; if a rank had still more
        # to offer, all offer as much as could be needed.
        tokens, latents = self.ranks.data.total(len(x_ND)), self.ranks.latents
        for share in (1.25, tokens / max(len(x_ND), 1)):
            offer = min(math.ceil(share * self.k), self.coder.cfg.width)
            codes = self.activation.encode(self.coder, x_ND, offer)
            values = codes.values.detach()
            everyones = self.ranks.gather(values).sort(descending=True).values
            least = everyones[: tokens * self.k][-1:].sum()  # 0 if none is positive
            all_above = not latents.any(bool((values <= least).any()))
            gave_all = latents.total(len(values)) == offer * len(x_ND) > 0 and all_above
            if not self.ranks.any(gave_all):
                break
        return subset(codes, values >= least)

    @torch.no_grad()
    def finish(self, l0_weight: float, first: bool) -> dict[str, Tensor]:
        """Move the threshold towards the smallest value that was kept; the last micro-batch represents all."""
        assert self.coder.threshold is not None
        kept = smallest(self.codes.values.detach(), self.ranks)
        self.coder.threshold.lerp_(kept, 1.0 if first else RATE)
        return {}
