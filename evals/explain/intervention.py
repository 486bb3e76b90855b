"""Intervention: strengthen a latent while the model writes, and ask the judge in which of two continuations it was.

At the last token of a prompt and everywhere after it, s W_dec_i is added to what the MLP writes. s is chosen so that
the next-token distribution moves by KL_NATS on average, the same for every latent and coder: a coder with longer
decoder rows gains nothing. The prompts are test windows up to the first token on which the latent fires. (After Paulo
et al., arXiv 2410.13928, who ask another model for the likelihood of the explanation; here the judge chooses.)

Legend: B prompts, E width of y, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from skipcoder.evals.latents.examples import Examples
from skipcoder.pipeline.model.sites import replacing
from skipcoder.trainer.run.run import Run

KL_NATS, TOLERANCE, STEPS = 0.5, 0.1, 12
NEW_TOKENS, LEAST_PROMPT = 12, 4


class Steering:
    """Continuations of prompts by one model, unchanged and with a latent of one coder strengthened."""

    def __init__(self, model: nn.Module, run: Run) -> None:
        self.model, self.run = model, run
        self.device = next(model.parameters()).device

    def pairs(self, examples: Examples) -> list[tuple[list[int], list[int], list[int]]]:
        """(prompt, plain continuation, steered continuation) of the test windows where the two differ."""
        prompts = []
        for window in examples.test:
            end = max(int(np.flatnonzero(window.activations)[0]) + 1, LEAST_PROMPT)
            prompts.append(window.tokens[:end].tolist())
        direction_E = self.run.coder.W_dec[examples.latent].detach().to(self.device)
        vector_E = self.strength(prompts, direction_E) * direction_E
        plain, steered = self.continued(prompts, None), self.continued(prompts, vector_E)
        return [(p, a, b) for p, a, b in zip(prompts, plain, steered, strict=True) if a != b]

    def strength(self, prompts: Sequence[list[int]], direction_E: Tensor) -> float:
        """s such that the mean KL(plain || steered) of the next token is KL_NATS, or as near as bisection comes."""
        plain_BV = self._next(prompts, None).log_softmax(-1)
        low, high, s = 0.0, None, 1.0
        for _ in range(STEPS):
            steered_BV = self._next(prompts, s * direction_E).log_softmax(-1)
            kl = float((plain_BV.exp() * (plain_BV - steered_BV)).sum(-1).mean())
            if abs(kl - KL_NATS) <= TOLERANCE * KL_NATS:
                break
            if kl < KL_NATS:
                low = s
            else:
                high = s
            s = 4 * s if high is None else (low + high) / 2
        return s

    def continued(self, prompts: Sequence[list[int]], vector_E: Tensor | None) -> list[list[int]]:
        """The likeliest NEW_TOKENS tokens after each prompt."""
        rows = [list(prompt) for prompt in prompts]
        starts = [len(prompt) for prompt in prompts]
        for _ in range(NEW_TOKENS):
            for row, token in zip(rows, self._next(rows, vector_E, starts).argmax(-1).tolist(), strict=True):
                row.append(token)
        return [row[start:] for row, start in zip(rows, starts, strict=True)]

    @torch.no_grad()
    def _next(self, rows: Sequence[list[int]], vector_E: Tensor | None, starts: Sequence[int] | None = None) -> Tensor:
        """float32 [B, V]: logits after each row; the vector is added from the prompts' last tokens on."""
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(self.device)
        last = torch.tensor([len(row) - 1 for row in rows], device=self.device)
        batch = torch.arange(len(rows), device=self.device)
        if vector_E is None:
            return self._logits(tokens)[batch, last].float()
        first = last if starts is None else torch.tensor(starts, device=self.device) - 1
        before_BT = torch.arange(tokens.shape[1], device=self.device) < first[:, None]
        write = self.run.write_site
        with replacing(self.model, write, write, lambda y: y.float() + vector_E.to(y.device), before_BT):
            return self._logits(tokens)[batch, last].float()

    def _logits(self, tokens_BT: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens_BT, use_cache=False).logits
        return logits
