"""Explain the latents of one run and score the explanations, one small record for each latent.

    RUN/interpretation/latents/00000012.json   explanation and scores
    RUN/interpretation/summary.json            means over latents, baselines, calibration, tokens and cost

A record that was made with the same weights, examples, judge and scorers is kept, so an interrupted run goes on.
"""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from skipcoder.evals import calibration, questions, simulation
from skipcoder.evals.config import InterpretConfig, Scorer
from skipcoder.evals.examples import ExampleMaker, Examples, Window
from skipcoder.evals.intervention import Steering
from skipcoder.evals.judge import Judge
from skipcoder.evals.latents import LatentIndex
from skipcoder.evals.scores import Answers, over_latents
from skipcoder.pipeline.errors import UserError
from skipcoder.pipeline.place import write_atomically


class Interpreter:
    """Explains and scores latents of one run."""

    def __init__(
        self,
        index: LatentIndex,
        tokenizer: Any,
        cfg: InterpretConfig,
        judge: Judge,
        model: torch.nn.Module | None = None,
    ) -> None:
        """`model`: the language model, for the scorer `intervention`."""
        self.index, self.tokenizer, self.cfg, self.judge = index, tokenizer, cfg, judge
        self.steering = None if model is None else Steering(model, index.run)
        self._steering_lock = asyncio.Lock()
        self.maker = ExampleMaker(index, cfg.examples)
        self.folder = index.run.path / "interpretation"
        asked = {
            **index.identity(), "content": index.store.content, "examples": asdict(cfg.examples),
            "judge": [cfg.judge.base_url, cfg.judge.model, cfg.judge.embedding_model, cfg.judge.logprobs],
            "scorers": cfg.scorers, "shown": cfg.shown,
        }  # fmt: skip
        self.settings = hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()[:16]

    def chosen(self) -> list[int]:
        """The latents that are looked at."""
        if self.cfg.which is not None:
            wrong = [latent for latent in self.cfg.which if not 0 <= latent < self.index.width]
            if wrong:
                raise UserError(f"which={wrong}: {self.index.run.path} has latents 0 to {self.index.width - 1}")
            return sorted(set(self.cfg.which))
        alive = np.flatnonzero(self.index.counts)
        if self.cfg.latents is None or self.cfg.latents >= len(alive):
            return alive.tolist()
        rng = np.random.default_rng(self.cfg.seed)
        return sorted(rng.choice(alive, self.cfg.latents, replace=False).tolist())

    async def run(self, advance: Callable[..., object]) -> dict[str, Any]:
        """Everything; returns the summary. `advance` is told of latents done."""
        latents = self.chosen()
        before = self._use()
        self.maker.prepare(np.array(latents, dtype=np.int64))
        calibrated = await calibration.calibrate(self)
        slots = asyncio.Semaphore(max(2, self.cfg.judge.concurrency // 4))  # windows are held for these alone

        async def one(latent: int) -> dict[str, Any]:
            async with slots:
                record = self.kept(latent) or await self.interpret(latent)
            advance(1, cost=f"{self.judge.cost:.2f}", failed=self.judge.failures)
            return record

        records = await asyncio.gather(*(one(latent) for latent in latents))
        shuffled = await self._shuffled([record for record in records if record["explanation"]])
        summary = self._summary(records, shuffled, calibrated)
        summary["use"] = {key: value - before[key] for key, value in self._use().items()}
        summary["problems"] = self.judge.problems
        write_atomically(self.folder / "summary.json", json.dumps(summary, indent=2).encode())
        return summary

    def kept(self, latent: int) -> dict[str, Any] | None:
        """The latent's record, if it was made alike and is complete."""
        try:
            record = json.loads(self._file(latent).read_text())
        except (OSError, ValueError):
            return None
        return record if record.get("settings") == self.settings and not record["failed"] else None

    async def interpret(self, latent: int) -> dict[str, Any]:
        """Explain one latent and score the explanation."""
        examples = await asyncio.to_thread(self.maker.of, latent)
        record: dict[str, Any] = {
            "latent": latent, "settings": self.settings, "firing": examples.firing, "largest": examples.largest,
            "explanation": None, "problem": examples.problem, "failed": 0, "scores": {},
        }  # fmt: skip
        if examples.problem is None:
            texts = [self.strings(window) for window in examples.train]
            answer = await self.judge.ask(
                questions.explain(examples, texts), questions.EXPLAIN_TOKENS, questions.read_explanation,
                questions.EXPLAIN_SCHEMA,
            )  # fmt: skip
            record |= {"explanation": answer.value, "problem": answer.problem, "failed": int(answer.value is None)}
            if answer.value is not None:
                for scorer in self.cfg.scorers:
                    if scorer is Scorer.simulation:
                        scores = await self._simulated(answer.value, examples)
                    else:
                        scores = (await self.score(answer.value, examples, scorer)).scores()
                    record["scores"][scorer.value] = scores
                    record["failed"] += scores["failed"]
        self._file(latent).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._file(latent), json.dumps(record, indent=2, ensure_ascii=False).encode())
        return record

    async def score(self, explanation: str, examples: Examples, scorer: Scorer) -> Answers:
        """The judge's answers to all test windows and negatives, shuffled, a few in each question."""
        if scorer is Scorer.embedding:
            return await self._embedded(explanation, examples)
        if scorer is Scorer.intervention:
            return await self._steered(explanation, examples)
        fuzzing = scorer is Scorer.fuzzing
        marks = [questions.marked(window) for window in examples.test] + questions.false_marks(examples)
        windows = examples.test + examples.negative
        texts = [
            questions.with_marks(self.strings(window), marks[i] if fuzzing else np.zeros(len(window.tokens), bool))
            for i, window in enumerate(windows)
        ]
        order = np.random.default_rng(examples.latent).permutation(len(windows))
        parts = [order[i : i + self.cfg.shown] for i in range(0, len(order), self.cfg.shown)]
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
        """How near each window's embedding is to the explanation's, as a probability from 0 to 1."""
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
        """In which of two continuations was the latent strengthened? Half of the time it is the second."""
        assert self.steering is not None
        async with self._steering_lock:  # the model has hooks on while it is steered
            pairs = await asyncio.to_thread(self.steering.pairs, examples)
        second = np.random.default_rng(examples.latent).permutation(np.arange(len(pairs)) % 2).tolist()
        texts = [[self.tokenizer.decode(tokens) for tokens in pair] for pair in pairs]
        shown = [(p, a, b) if last else (p, b, a) for (p, a, b), last in zip(texts, second, strict=True)]
        found = Answers()
        for start in range(0, len(shown), self.cfg.shown):
            part = slice(start, start + self.cfg.shown)
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

    async def _shuffled(self, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Detection with another latent's explanation: what an explanation is worth that explains nothing here."""
        if len(records) < 2:
            return []

        async def one(latent: int, explanation: str) -> dict[str, Any]:
            examples = await asyncio.to_thread(self.maker.of, latent)
            return (await self.score(explanation, examples, Scorer.detection)).scores()

        others = [*records[1:], records[0]]
        some = list(zip(records, others, strict=True))[:50]
        tasks: list[Awaitable] = [one(record["latent"], other["explanation"]) for record, other in some]
        return list(await asyncio.gather(*tasks))

    def _summary(
        self, records: list[dict[str, Any]], shuffled: list[dict[str, Any]], calibrated: dict[str, Any]
    ) -> dict[str, Any]:
        explained = [record for record in records if record["explanation"]]
        unexplained = [record for record in records if not record["explanation"]]
        summary: dict[str, Any] = {
            "settings": self.settings,
            "weights": self.index.run.weights,
            "judge": self.cfg.judge.model,
            "latents": len(records),
            "explained": len(explained),
            "too_few_examples": sum(not record["failed"] for record in unexplained),
            "failed_explanations": sum(bool(record["failed"]) for record in unexplained),
            "calibration": calibrated,
        }
        for scorer in self.cfg.scorers:
            scores = [record["scores"][scorer.value] for record in explained]
            summary[scorer.value] = over_latents(scores)
        summary["shuffled_explanations"] = over_latents(shuffled)
        summary["always_no"] = {"balanced_accuracy": 0.5, "f1": 0.0}
        return summary

    def _use(self) -> dict[str, float]:
        judge = self.judge
        return {
            "requests": judge.requests, "cached": judge.cached, "retries": judge.retries,
            "unreadable": judge.unreadable, "failures": judge.failures, "prompt_tokens": judge.prompt_tokens,
            "completion_tokens": judge.completion_tokens, "cost": judge.cost,
        }  # fmt: skip

    def strings(self, window: Window) -> list[str]:
        """What each token adds to the window's text: nothing, while it ends within a character."""
        parts, before = [], ""
        for end in range(1, len(window.tokens) + 1):
            text = self.tokenizer.decode(window.tokens[:end].tolist(), clean_up_tokenization_spaces=False)
            if text.endswith("\ufffd") and end < len(window.tokens):
                text = before
            parts.append(text[len(before) :])
            before = text
        return parts

    def _file(self, latent: int) -> Any:
        return self.folder / "latents" / f"{latent:08d}.json"
