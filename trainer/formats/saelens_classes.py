"""Classes for SAELens that hold top-k transcoders. Import this module before `SAE.load_from_disk`:

import skipcoder.trainer.formats.saelens_classes
from sae_lens import SAE
sae = SAE.load_from_disk("exported")
"""

from collections.abc import Callable
from dataclasses import dataclass

from sae_lens import SkipTranscoder, SkipTranscoderConfig, Transcoder, TranscoderConfig, register_sae_class
from sae_lens.saes.topk_sae import TopK
from torch import Tensor


@dataclass
class TopKTranscoderConfig(TranscoderConfig):
    """Configuration of a transcoder whose k largest latents fire."""

    k: int = 32

    @classmethod
    def architecture(cls) -> str:
        """The name in cfg.json."""
        return "topk_transcoder"


@dataclass
class TopKSkipTranscoderConfig(SkipTranscoderConfig):
    """Configuration of a skip transcoder whose k largest latents fire."""

    k: int = 32

    @classmethod
    def architecture(cls) -> str:
        """The name in cfg.json."""
        return "topk_skip_transcoder"


class TopKTranscoder(Transcoder):
    """y_hat = W_dec TopK(W_enc x + b_enc) + b_dec."""

    cfg: TopKTranscoderConfig

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Return TopK: the k largest, at least 0."""
        result: Callable[[Tensor], Tensor] = TopK(self.cfg.k)
        return result


class TopKSkipTranscoder(SkipTranscoder):
    """y_hat as of TopKTranscoder, plus W_skip x."""

    cfg: TopKSkipTranscoderConfig

    def get_activation_fn(self) -> Callable[[Tensor], Tensor]:
        """Return TopK: the k largest, at least 0."""
        result: Callable[[Tensor], Tensor] = TopK(self.cfg.k)
        return result


register_sae_class("topk_transcoder", TopKTranscoder, TopKTranscoderConfig)
register_sae_class("topk_skip_transcoder", TopKSkipTranscoder, TopKSkipTranscoderConfig)
