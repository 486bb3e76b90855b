"""Is this judge able to judge? It is given explanations that are known to be right.

A planted latent fires on one frequent word; its explanation says so. A judge that cannot tell windows with the word
from windows without it cannot score anything finer, and what it says of real latents is noise.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
from skipcoder.evals.config import Scorer
from skipcoder.evals.examples import Examples, Window
from skipcoder.evals.scores import over_latents

if TYPE_CHECKING:
    from skipcoder.evals.interpretation import Interpreter

WORDS, WINDOWS = 8, 10
USABLE = 0.8
"""Balanced accuracy on planted latents below which a judge is called unusable."""


async def calibrate(interpreter: "Interpreter") -> dict[str, Any]:
    """Detection scores of planted latents, and whether the judge is usable."""
    scores = []
    for number, (word, examples) in enumerate(planted(interpreter).items()):
        examples.latent = number
        answers = await interpreter.score(f"The word {word.strip()!r}.", examples, Scorer.detection)
        scores.append(answers.scores())
    found = over_latents(scores)
    accuracy = found["balanced_accuracy"]
    return found | {"usable": accuracy is not None and accuracy >= USABLE}


def planted(interpreter: "Interpreter") -> dict[str, Examples]:
    """{word: windows with and without it}, of words that many windows hold and many do not."""
    windows_WT, tokenizer = interpreter.maker.tokens_WT, interpreter.tokenizer
    token, count = np.unique(windows_WT[:: max(1, len(windows_WT) // 5000)], return_counts=True)
    found: dict[str, Examples] = {}
    rng = np.random.default_rng(0)
    for t in token[np.argsort(-count, kind="stable")]:
        word = tokenizer.decode([int(t)], clean_up_tokenization_spaces=False)
        if not (word.strip().isalpha() and len(word.strip()) >= 4):
            continue
        holds = (windows_WT == t).any(1)
        if min(holds.sum(), (~holds).sum()) < WINDOWS:
            continue
        pick = {side: rng.choice(np.flatnonzero(holds == side), WINDOWS, replace=False) for side in (True, False)}
        examples = Examples(0, int(holds.sum()), 1.0)
        examples.test = [
            Window(int(w), windows_WT[w], (windows_WT[w] == t).astype(np.float32), "planted") for w in pick[True]
        ]
        examples.negative = [
            Window(int(w), windows_WT[w], np.zeros(windows_WT.shape[1], np.float32), "random") for w in pick[False]
        ]
        found[word] = examples
        if len(found) == WORDS:
            break
    return found
