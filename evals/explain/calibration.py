"""Is this judge able to judge? It is given explanations that are known to be right.

A planted latent fires on one frequent word; its explanation says so. A judge that cannot tell windows with the word
from windows without it cannot score anything finer, and what it says of real latents is noise.
"""

import re
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np

from skipcoder.evals.explain.scores import Answers, over_latents
from skipcoder.evals.latents.examples import Examples, Window

WORDS, WINDOWS, MOST = 8, 10, 5000
Detect = Callable[[str, Examples], Awaitable[Answers]]
"""Maps an explanation and the examples of a latent to the judge's answers."""
USABLE = 0.8
"""Balanced accuracy on planted latents below which a judge is called unusable."""


async def calibrate(detect: Detect, windows_WT: np.ndarray, tokenizer: Any) -> dict[str, Any]:
    """Detection scores of latents planted in some windows of text, and whether the judge is usable (null: no latents
    could be planted). `detect` asks the judge."""
    scores = []
    for number, (word, examples) in enumerate(planted(windows_WT, tokenizer).items()):
        examples.latent = number
        answers = await detect(f"The word {word.strip()!r}.", examples)
        scores.append(answers.scores())
    found = over_latents(scores)
    accuracy = found["balanced_accuracy"]
    usable = None if not scores else accuracy is not None and accuracy >= USABLE
    return found | {"usable": usable}


def planted(windows_WT: np.ndarray, tokenizer: Any) -> dict[str, Examples]:
    """{word: windows with and without it}, for frequent words. The text is searched: windows with it hold the whole
    word, those without it do not hold it in any letter case."""
    rng = np.random.default_rng(0)
    sample_WT = windows_WT[np.sort(rng.permutation(len(windows_WT))[:MOST])]
    texts = tokenizer.batch_decode(sample_WT.tolist(), clean_up_tokenization_spaces=False)
    lower = [text.lower() for text in texts]
    token, count = np.unique(sample_WT, return_counts=True)
    words = (tokenizer.decode([int(t)]).strip() for t in token[np.argsort(-count, kind="stable")])
    found: dict[str, Examples] = {}
    for word in words:
        if not (word.isalpha() and len(word) >= 4) or word.lower() in {w.lower() for w in found}:
            continue
        whole = re.compile(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])")
        inside = np.array([whole.search(text) is not None for text in texts])
        nowhere = np.array([word.lower() not in text for text in lower])
        if min(inside.sum(), nowhere.sum()) < WINDOWS:
            continue
        examples = Examples(0, int(inside.sum()), 1.0)
        for which, kind in ((inside, "planted"), (nowhere, "random")):
            chosen = rng.choice(np.flatnonzero(which), WINDOWS, replace=False)
            silence = np.zeros(windows_WT.shape[1], np.float32)
            made = [Window(int(w), sample_WT[w], silence, kind) for w in chosen]
            if kind == "planted":
                examples.test = made
            else:
                examples.negative = made
        found[word] = examples
        if len(found) == WORDS:
            break
    return found
