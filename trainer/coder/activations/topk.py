"""TopK: the k largest latents of each token (Gao et al., arXiv 2406.04093)."""

from torch import Tensor

from skipcoder.kernels.encode import Codes, encode_topk
from skipcoder.trainer.coder.activations.base import Activation, Encoder


class TopK(Activation):
    """Chooses the k largest latents of each token."""

    name = "topk"
    nested = True
    k_may_vary = True
    shards = True
    is_static = True

    def encode(self, coder: Encoder, x_ND: Tensor, k: int | None = None) -> Codes:
        """Return codes [N, K], of a shard flat."""
        k, x_ND = k or coder.cfg.k, x_ND.to(coder.W_enc.dtype)
        return encode_topk(x_ND, coder.W_enc, coder.b_enc, k, coder.b_pre, coder.search, coder.shard)
