"""Simulation: from an explanation alone the judge guesses how active the latent is on every token.

The judge reads a window one token per line, each line ending in a tab and a hidden activation from 0 to 10. What it
would have written there is in the log-probabilities of its *prompt*, which vLLM gives (`prompt_logprobs`) and most
other servers do not. A guess is the mean over the numbers that the judge weighs; the score is the correlation of
guesses with the true activations over all test windows, with the latent firing and without (Bills et al. 2023, in
delphi's form). Tested with a server that answers as vLLM does, not with vLLM.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

UNKNOWN = "unknown"
ALTERNATIVES = 15

_SIMULATE = (
    "A feature of a language model is described by this explanation:\n{explanation}\n\n"
    "Below is a text, one token a line. After each token, behind a tab, stands how active the feature is on it: a "
    "whole number from 0 (silent) to 10 (as active as it gets). Most tokens have 0.\n\n"
)


def prompt(explanation: str, tokens: Sequence[str]) -> str:
    """What the judge reads; each line ends in a placeholder for the activation."""
    lines = "".join(token.replace("\n", "\\n").replace("\t", " ") + f"\t{UNKNOWN}\n" for token in tokens)
    return _SIMULATE.format(explanation=explanation) + lines


def guesses(prompt_logprobs: Sequence[dict[str, Any] | None], count: int) -> list[float] | None:
    """The mean activation on each of `count` lines, at the token that follows a tab. None where the server's answer has
    another shape."""
    found = []
    after_tab = False
    for position in prompt_logprobs:
        if not position:
            continue
        entries = list(position.values())
        # vLLM lists the prompt's own token first.
        shown = entries[0].get("decoded_token") or ""
        if after_tab:
            mass = {number: 0.0 for number in range(11)}
            for entry in entries:
                text = (entry.get("decoded_token") or "").strip()
                if text.isdigit() and int(text) in mass:
                    mass[int(text)] += math.exp(entry["logprob"])
            total = sum(mass.values())
            found.append(sum(number * p for number, p in mass.items()) / total if total else 0.0)
        after_tab = shown.endswith("\t")
    return found if len(found) == count else None


def correlation(true: Sequence[np.ndarray], guessed: Sequence[Sequence[float]]) -> float | None:
    """Pearson correlation over all tokens of all windows; None where either never varies."""
    if not true:
        return None
    a, b = np.concatenate(true), np.concatenate([np.array(guess) for guess in guessed])
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None
