"""Run short texts through a language model: what enters and leaves a hookpoint, and what coders make of it.

Each text runs as a row of its own after the token that separated documents in training; that first position and
special tokens are not looked at. Legend: N tokens looked at, D and E widths, T texts, M latents.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor, nn

from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture
from skipcoder.pipeline.store.attrs import HookpointFacts
from skipcoder.pipeline.text.rows import bos_of
from skipcoder.trainer.coder.coder import CoderOutput


class TextBatch(NamedTuple):
    """What passed the hookpoint at the positions looked at."""

    sides: dict[str, Tensor]
    """float32 `input` [N, D] and `output` [N, E]."""
    text_N: Tensor
    """The text that each position belongs to."""


class TextReader:
    """Runs a model over texts, up to the hookpoint."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, facts: HookpointFacts, special: Sequence[int], batch_tokens: int = 4096
    ) -> None:
        """`facts`: the hookpoint as a store describes it; `special`: tokens not looked at."""
        self.trunk = getattr(model, "base_model", model)
        self.hookpoint = Hookpoint("it", facts["read"], facts["write"])
        self.tokenizer, self.special, self.batch_tokens = tokenizer, list(special), batch_tokens
        ends = (bos_of(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id)
        self.first = next((token for token in ends if token is not None), self.special[0] if self.special else 0)

    def tokens(self, texts: Sequence[str], most: int | None = None) -> list[list[int]]:
        """Tokens of each text, the separator first, cut to `most`."""
        encoded = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [[self.first, *ids[:most]] for ids in encoded]

    @torch.no_grad()
    def read(self, rows: Sequence[list[int]], last_only: bool = False) -> Iterator[TextBatch]:
        """Yield batches of texts of similar length. `last_only`: only the last token of each row."""
        device = next(self.trunk.parameters()).device
        special = torch.tensor(self.special, device=device)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(rows[order[stop]]) * (stop + 1 - start) <= self.batch_tokens:
                stop += 1
            some = order[start:stop]
            start = stop
            # Padding comes last, where a causal model's earlier positions do not see it.
            padded = [torch.tensor(rows[i]) for i in some]
            tokens = nn.utils.rnn.pad_sequence(padded, batch_first=True).to(device)
            lengths = torch.tensor([len(rows[i]) for i in some], device=device)
            position = torch.arange(tokens.shape[1], device=device)
            if last_only:
                keep = position == lengths[:, None] - 1
            else:
                keep = (position > 0) & (position < lengths[:, None]) & ~torch.isin(tokens, special)
            ((x, y),) = capture(self.trunk, [self.hookpoint], tokens).values()
            text = torch.tensor(some, device=device)[:, None].expand(tokens.shape)[keep]
            yield TextBatch({"input": x[keep.flatten()].float(), "output": y[keep.flatten()].float()}, text)


class Pooled:
    """Mean codes over the tokens of each text."""

    def __init__(self, texts: int, width: int) -> None:
        self.count_T = np.zeros(texts)
        self.width = width
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, out: CoderOutput, text_N: Tensor) -> None:
        """Add the codes of tokens of these texts."""
        text = text_N.cpu().numpy()
        self.count_T += np.bincount(text, minlength=len(self.count_T))
        active = (out.values != 0).cpu().numpy()
        values, indices = out.values.float().cpu().numpy()[active], out.indices.cpu().numpy()[active]
        self._parts.append((values, np.repeat(text, active.sum(1)), indices))

    def result(self) -> scipy.sparse.csr_array:
        """float64 [T, M]: the means."""
        values, text, latent = (np.concatenate(column) for column in zip(*self._parts, strict=True))
        share = values / np.maximum(self.count_T, 1)[text]
        return scipy.sparse.coo_array((share, (text, latent)), shape=(len(self.count_T), self.width)).tocsr()


def pool_dense(batches: Sequence[TextBatch], side: str, texts: int) -> np.ndarray:
    """float64 [T, D]: means over the tokens of each text."""
    total, count = None, torch.zeros(texts, dtype=torch.float64)
    for batch in batches:
        values, text = batch.sides[side].double().cpu(), batch.text_N.cpu()
        total = torch.zeros(texts, values.shape[1], dtype=torch.float64) if total is None else total
        total.index_add_(0, text, values)
        count += torch.bincount(text, minlength=texts)
    assert total is not None
    return (total / count.clamp_min(1)[:, None]).numpy()


@torch.no_grad()
def pooled(coder: Any, batches: Sequence[Any], side: str, texts: int) -> scipy.sparse.csr_array:
    """Mean codes of each text."""
    means = Pooled(texts, coder.cfg.width)
    for batch in batches:
        means.add(coder(batch.sides[side]), batch.text_N)
    return means.result()
