"""What a judge is asked about a latent, and how its answers are read."""

import json
import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from skipcoder.evals.explain.judge import Message
from skipcoder.evals.latents.examples import Examples, Window

MARKED = 0.3
"""Share of a window's largest activation from which tokens are marked."""
EXPLAIN_TOKENS = 200

_EXPLAIN = (
    "You study one feature of a language model. You are shown excerpts of text in which it is active. Tokens on which "
    "it is strongly active stand between << and >>, and are listed with their strengths from 1 to 10. Say what makes "
    "the feature active: what the marked tokens, or what surrounds them, have in common. Be specific, use one sentence "
    "of at most 25 words, do not mention the marks or the strengths, and do not list the excerpts. Some excerpts may "
    'be uninformative. Answer with JSON: {"explanation": "..."}'
)
_DETECT = (
    "A feature of a language model is described by this explanation:\n{explanation}\n\n"
    "For each numbered excerpt, decide whether the feature is active somewhere in it: 1 if so, 0 if not. "
    'Answer with JSON that holds one number for each excerpt, in their order: {{"answers": [{zeros}]}}'
)
_FUZZ = (
    "A feature of a language model is described by this explanation:\n{explanation}\n\n"
    "In each numbered excerpt some tokens are marked with << and >>. Decide whether the marks are right, that is "
    "whether the feature is active on the marked tokens: 1 if so, 0 if not. "
    'Answer with JSON that holds one number for each excerpt, in their order: {{"answers": [{zeros}]}}'
)


def explain(examples: Examples, texts: Sequence[Sequence[str]]) -> list[Message]:
    """Ask for an explanation; `texts`: the tokens of each training window as strings."""
    parts = []
    for number, (window, tokens) in enumerate(zip(examples.train, texts, strict=True), 1):
        marks = marked(window)
        strengths = np.ceil(10 * window.activations / max(examples.largest, 1e-9)).clip(0, 10).astype(int)
        listed = ", ".join(f"{json.dumps(tokens[i])}: {strengths[i]}" for i in np.flatnonzero(marks)[:10])
        parts.append(f"Excerpt {number}: {with_marks(tokens, marks)}\nStrengths: {listed}")
    return [{"role": "system", "content": _EXPLAIN}, {"role": "user", "content": "\n\n".join(parts)}]


def classify(explanation: str, excerpts: Sequence[str], fuzzing: bool) -> list[Message]:
    """Ask which excerpts (with marks, if fuzzing) fit the explanation."""
    system = (_FUZZ if fuzzing else _DETECT).format(explanation=explanation, zeros=", ".join("0" * len(excerpts)))
    shown = "\n\n".join(f"Excerpt {number}: {text}" for number, text in enumerate(excerpts, 1))
    return [{"role": "system", "content": system}, {"role": "user", "content": shown}]


_CHOOSE = (
    "A feature of a language model is described by this explanation:\n{explanation}\n\n"
    "The model wrote two continuations of each numbered excerpt. For one of them the feature was made stronger. Decide "
    "which: 0 for the first, 1 for the second. "
    'Answer with JSON that holds one number for each excerpt, in their order: {{"answers": [{zeros}]}}'
)


def choose(explanation: str, excerpts: Sequence[tuple[str, str, str]]) -> list[Message]:
    """Ask for which of two continuations (text, first, second) the feature was strengthened."""
    system = _CHOOSE.format(explanation=explanation, zeros=", ".join("0" * len(excerpts)))
    shown = "\n\n".join(
        f"Excerpt {number}: {text}\nFirst: {first}\nSecond: {second}"
        for number, (text, first, second) in enumerate(excerpts, 1)
    )
    return [{"role": "system", "content": system}, {"role": "user", "content": shown}]


EXPLAIN_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}},
    "required": ["explanation"],
    "additionalProperties": False,
}


def classify_schema(count: int) -> dict[str, Any]:
    """Schema of JSON that answers `count` excerpts."""
    numbers = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}, "minItems": count, "maxItems": count}
    return {
        "type": "object",
        "properties": {"answers": numbers},
        "required": ["answers"],
        "additionalProperties": False,
    }


def read_explanation(text: str) -> str | None:
    """The explanation, or None where there is none."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    if found is None:
        return None
    try:
        explanation = json.loads(found[0])["explanation"]
    except (ValueError, KeyError, TypeError):
        return None
    return explanation.strip() or None if isinstance(explanation, str) else None


def read_answers(text: str, count: int) -> list[int] | None:
    """One 0 or 1 for each excerpt, or None: a list of another length says nothing about any of them."""
    lists = re.findall(r"\[([^\[\]]*)\]", text)
    if not lists:
        return None
    words = [word.strip().strip("\"'").lower() for word in lists[-1].split(",")]
    known = {"0": 0, "1": 1, "false": 0, "true": 1}
    return [known[word] for word in words] if len(words) == count and all(word in known for word in words) else None


def read_probabilities(logprobs: Sequence[dict[str, Any]], count: int) -> list[float] | None:
    """P(1) of each answer, from the alternatives that the judge weighed; None where they cannot be read."""
    found = []
    try:
        for token in logprobs:
            if _digit(token) is None:
                continue
            mass = {"0": 0.0, "1": 0.0}
            for other in token.get("top_logprobs") or [token]:
                digit = _digit(other)
                if digit is not None:
                    mass[digit] += math.exp(other["logprob"])
            found.append(mass["1"] / sum(mass.values()) if sum(mass.values()) else 0.5)
    except (KeyError, TypeError, AttributeError, OverflowError):
        return None
    return found if len(found) == count and all(map(math.isfinite, found)) else None


def _digit(token: dict[str, Any]) -> str | None:
    """The answer in one of the judge's tokens, ignoring brackets and space markers."""
    text = token["token"].strip(" []{},\n\u0120\u2581")
    return text if text in ("0", "1") else None


def marked(window: Window) -> np.ndarray:
    """bool [T]: the tokens on which the latent is strongly active."""
    largest = window.activations.max(initial=0)
    result: np.ndarray = (window.activations >= MARKED * largest) & (window.activations > 0)
    return result


def with_marks(tokens: Sequence[str], marks: np.ndarray) -> str:
    """The text with runs of marked tokens between << and >>; the text's own << and >> become other quotes."""
    text = ""
    for mark, run in groupby(zip(marks, tokens, strict=True), key=lambda pair: bool(pair[0])):
        part = "".join(token for _, token in run).replace("<<", "\u2039\u2039").replace(">>", "\u203a\u203a")
        text += f"<<{part}>>" if mark else part
    return text


def false_marks(examples: Examples) -> list[np.ndarray]:
    """Marks for the negatives: each has its marks where a test window has them, so that neither their number nor their
    places distinguish right from wrong."""
    places = [marked(window) for window in examples.test]
    return [places[i % len(places)] for i in range(len(examples.negative))]
