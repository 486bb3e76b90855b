"""How well a coder fits a store: its FVU and L0 on a sample of activations. Legend: N tokens, E output width."""

from typing import NamedTuple

import torch
from torch import Tensor

from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.data.filter import TokenFilter
from skipcoder.trainer.data.stream import ActivationStream

TOKENS = 2**15
ROWS = 4096


class Sample(NamedTuple):
    """Activation pairs of some tokens of one hookpoint, in a random order."""

    x_ND: Tensor
    y_NE: Tensor

    @staticmethod
    def of(
        store: ActivationStore, hookpoint: str, kept: TokenFilter, split: str = "validation", tokens: int = TOKENS
    ) -> "Sample":
        """Draw at most `tokens` tokens of a split."""
        stream = ActivationStream(store, hookpoint, tokens, split=split, filter=kept, epochs=1)
        batch = next(iter(stream))
        return Sample(batch.x, batch.y)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.x_ND)

    def side(self, name: str) -> Tensor:
        """Activations of one side of the MLP, `input` or `output`."""
        return self.x_ND if name == "input" else self.y_NE


@torch.no_grad()
def fit(coder: SparseCoder, sample: Sample, read: str, write: str) -> dict[str, float]:
    """Return `fvu` (in float64) and `l0` of a coder that reads and writes these sides."""
    y_NE = sample.side(write).double()
    error, fired = 0.0, 0
    for x, y in zip(sample.side(read).split(ROWS), y_NE.split(ROWS), strict=True):
        out = coder(x)
        error += float((y - out.y_hat).square().sum())
        fired += int((out.values > 0).sum())
    return {"fvu": error / float((y_NE - y_NE.mean(0)).square().sum()), "l0": fired / sample.tokens}
