"""Score an explanation by asking the judge about the windows of a latent, one method per scorer."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np

from skipcoder.evals.config import Scorer
from skipcoder.evals.explain import questions, simulation
from skipcoder.evals.explain.intervention import Steering
from skipcoder.evals.explain.judge import Judge
from skipcoder.evals.explain.scores import Answers
from skipcoder.evals.latents.examples import Examples, Window


class Scoring:
    """Scores explanations by asking a judge."""

    def __init__(self, judge: Judge, tokenizer: Any, shown: int, steering: Steering | None) -> None:
        """`shown`: windows in one question; `steering`: for the scorer `intervention`."""
        self.judge, self.tokenizer, self.shown, self.steering = judge, tokenizer, shown, steering
        self._steering_lock = asyncio.Lock()

    async def detection(self, explanation: str, examples: Examples) -> Answers:
        """Ask in which windows the latent is active."""
        return await self._classified(explanation, examples, fuzzing=False)

    async def scores(self, explanation: str, examples: Examples, scorer: Scorer) -> dict[str, Any]:
        """The scores that `scorer` gives a latent's explanation."""
        if scorer is Scorer.simulation:
            return await self._simulated(explanation, examples)
        if scorer is Scorer.embedding:
            answers = await self._embedded(explanation, examples)
        elif scorer is Scorer.intervention:
            answers = await self._steered(explanation, examples)
        else:
            answers = await self._classified(explanation, examples, scorer is Scorer.fuzzing)
        return answers.scores()

    async def _classified(self, explanation: str, examples: Examples, fuzzing: bool) -> Answers:
        """The judge's answers to all test windows and negatives, shuffled, a few in each question."""
        marks = [questions.marked(window) for window in examples.test] + questions.false_marks(examples)
        windows = examples.test + examples.negative
        texts = [
            questions.with_marks(self.strings(window), marks[i] if fuzzing else np.zeros(len(window.tokens), bool))
            for i, window in enumerate(windows)
        ]
        order = np.random.default_rng(examples.latent).permutation(len(windows))
        parts = [order[i : i + self.shown] for i in range(0, len(order), self.shown)]
        answers = await asyncio.gather(
            *(self._classify(explanation, [texts[i] for i in part], fuzzing) for part in parts)
        )
        found = Answers()
        for part, (said, probability) in zip(parts, answers, strict=True):
            if said is None:
                found.failed += len(part)
                continue
            found.truth += [int(i < len(examples.test)) for i in part]
            found.said += said
            found.probability += probability or [None] * len(part)
        return found

    async def _embedded(self, explanation: str, examples: Examples) -> Answers:
        """How close each window's embedding is to the explanation's, as a probability from 0 to 1."""
        windows = examples.test + examples.negative
        texts = [explanation, *("".join(self.strings(window)) for window in windows)]
        vectors = await asyncio.gather(*(self.judge.embed(text) for text in texts))
        found = Answers()
        for i, vector in enumerate(vectors[1:]):
            if vector is None or vectors[0] is None:
                found.failed += 1
                continue
            a, b = np.array(vectors[0]), np.array(vector)
            found.truth.append(int(i < len(examples.test)))
            found.probability.append(float((1 + a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12)) / 2))
        return found

    async def _steered(self, explanation: str, examples: Examples) -> Answers:
        """Ask in which of two continuations the latent was strengthened; half of the time it is the second."""
        assert self.steering is not None
        async with self._steering_lock:  # the model has hooks on while it is steered
            pairs = await asyncio.to_thread(self.steering.pairs, examples)
        second = np.random.default_rng(examples.latent).permutation(np.arange(len(pairs)) % 2).tolist()
        texts = [[self.tokenizer.decode(tokens) for tokens in pair] for pair in pairs]
        shown = [(p, a, b) if last else (p, b, a) for (p, a, b), last in zip(texts, second, strict=True)]
        found = Answers()
        for start in range(0, len(shown), self.shown):
            part = slice(start, start + self.shown)
            count = len(shown[part])
            said, probability = await self._answers(questions.choose(explanation, shown[part]), count)
            if said is None:
                found.failed += count
                continue
            found.truth += second[part]
            found.said += said
            found.probability += probability or [None] * count
        return found

    async def _simulated(self, explanation: str, examples: Examples) -> dict[str, Any]:
        """Correlation of the judge's guesses with the activations in test windows and negatives."""
        windows = examples.test + examples.negative

        async def one(window: Window) -> list[float] | None:
            tokens = self.strings(window)
            found = await self.judge.prompt_logprobs(simulation.prompt(explanation, tokens), simulation.ALTERNATIVES)
            return None if found is None else simulation.guesses(found, len(tokens))

        guessed = await asyncio.gather(*(one(window) for window in windows))
        pairs = [(w.activations, g) for w, g in zip(windows, guessed, strict=True) if g is not None]
        found = simulation.correlation(*zip(*pairs, strict=True)) if pairs else None
        return {"n": len(pairs), "failed": len(windows) - len(pairs), "correlation": found}

    async def _classify(
        self, explanation: str, texts: Sequence[str], fuzzing: bool
    ) -> tuple[list[int] | None, list[float] | None]:
        return await self._answers(questions.classify(explanation, texts, fuzzing), len(texts))

    async def _answers(self, messages: list[dict[str, str]], count: int) -> tuple[list[int] | None, list[float] | None]:
        answer = await self.judge.ask(
            messages,
            20 + 6 * count,
            lambda text: questions.read_answers(text, count),
            questions.classify_schema(count),
            logprobs=True,
        )
        return answer.value, questions.read_probabilities(answer.logprobs, count)

    def strings(self, window: Window) -> list[str]:
        """What each token adds to the window's text: nothing while the text ends within a character."""
        parts, before = [], ""
        for end in range(1, len(window.tokens) + 1):
            text = self.tokenizer.decode(window.tokens[:end].tolist(), clean_up_tokenization_spaces=False)
            if text.endswith("\ufffd") and end < len(window.tokens):
                text = before
            parts.append(text[len(before) :])
            before = text
        return parts
