"""GroupMax: the largest latent of each of k equal runs of latents."""

from torch import Tensor

from skipcoder.errors import UserError
from skipcoder.kernels.encode import Codes, encode_groupmax
from skipcoder.trainer.coder.activations.base import Activation, Encoder
from skipcoder.trainer.config import CoderConfig, TrainConfig


class GroupMax(Activation):
    """Chooses the largest latent of each of k equal runs."""

    name = "groupmax"
    shards = True
    is_static = True

    def check(self, cfg: CoderConfig) -> None:
        """Raise UserError unless the runs are equal."""
        if cfg.width % cfg.k:
            raise UserError(
                f"coder.activation=groupmax needs coder.width={cfg.width} to be a multiple of coder.k={cfg.k}"
            )

    def check_training(self, cfg: TrainConfig, ranks: int = 1) -> None:
        """Raise UserError if a run would have latents in several processes."""
        super().check_training(cfg, ranks)
        if cfg.coder.k % cfg.train.shards:
            raise UserError(f"groupmax needs coder.k={cfg.coder.k} to be a multiple of train.shards={cfg.train.shards}")

    def encode(self, coder: Encoder, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return codes [N, K], of a shard with the K of its own runs."""
        k = (k or coder.cfg.k) * len(coder.latents) // coder.cfg.width
        return encode_groupmax(x_ND.to(coder.W_enc.dtype), coder.W_enc, coder.b_enc, k, coder.b_pre, coder.search)
