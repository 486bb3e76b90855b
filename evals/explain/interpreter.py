"""Explain the latents of one run and score the explanations, one small record for each latent (records.py).

A record that was made with the same weights, examples, judge and scorers is kept, so an interrupted run can go on.
"""

import asyncio
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from skipcoder.errors import UserError
from skipcoder.evals.config import Draw, InterpretConfig
from skipcoder.evals.explain import calibration, questions
from skipcoder.evals.explain.intervention import Steering
from skipcoder.evals.explain.judge import Judge
from skipcoder.evals.explain.records import (
    InterpretationSummary,
    LatentRecord,
    read_latent,
    write_latent,
    write_summary,
)
from skipcoder.evals.explain.scores import over_latents
from skipcoder.evals.explain.scoring import Scoring
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex


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
        self.scoring = Scoring(judge, tokenizer, cfg.shown, None if model is None else Steering(model, index.run))
        self.maker = ExampleMaker(index, cfg.examples)
        asked = {
            **index.identity(), "content": index.store.content, "examples": asdict(cfg.examples),
            "judge": [cfg.judge.base_url, cfg.judge.model, cfg.judge.embedding_model, cfg.judge.logprobs],
            "scorers": cfg.scorers, "shown": cfg.shown,
        }  # fmt: skip
        self.settings = hashlib.sha256(json.dumps(asked, default=str, sort_keys=True).encode()).hexdigest()[:16]

    def chosen(self) -> list[int]:
        """The latents to interpret."""
        if self.cfg.which is not None:
            wrong = [latent for latent in self.cfg.which if not 0 <= latent < self.index.width]
            if wrong:
                raise UserError(f"which={wrong}: {self.index.run.path} has latents 0 to {self.index.width - 1}")
            return sorted(set(self.cfg.which))
        if self.cfg.circuit is not None:
            return sorted(_of_circuit(Path(self.cfg.circuit), self.index.run.summary["hookpoint"])[: self.cfg.latents])
        alive = np.flatnonzero(self.index.counts)
        if self.cfg.latents is None or self.cfg.latents >= len(alive):
            return alive.tolist()
        if self.cfg.draw is Draw.density:
            densest: list[int] = np.argsort(-self.index.counts, kind="stable")[: self.cfg.latents].tolist()
            return sorted(densest)
        rng = np.random.default_rng(self.cfg.seed)
        return sorted(rng.choice(alive, self.cfg.latents, replace=False).tolist())

    async def run(self, advance: Callable[..., object]) -> InterpretationSummary:
        """Interpret the chosen latents; return the summary. `advance` gets the latents done."""
        latents = self.chosen()
        before = self._use()
        self.maker.prepare(np.array(latents, dtype=np.int64))
        calibrated = await calibration.calibrate(self.scoring.detection, self.maker.tokens_WT, self.tokenizer)
        slots = asyncio.Semaphore(max(2, self.cfg.judge.concurrency // 4))  # only these hold their windows

        async def one(latent: int) -> LatentRecord:
            async with slots:
                record = self.kept(latent) or await self.interpret(latent)
            advance(1, cost=f"{self.judge.cost:.2f}", failed=self.judge.failures)
            return record

        records = await asyncio.gather(*(one(latent) for latent in latents))
        shuffled = await self._shuffled([record for record in records if record["explanation"]])
        summary = self._summary(records, shuffled, calibrated)
        summary["use"] = {key: value - before[key] for key, value in self._use().items()}
        summary["problems"] = self.judge.problems
        write_summary(self.index.run, summary)
        return summary

    def kept(self, latent: int) -> LatentRecord | None:
        """The latent's record, if its settings are the same and it is complete."""
        record = read_latent(self.index.run, latent)
        return record if record is not None and record["settings"] == self.settings and not record["failed"] else None

    async def interpret(self, latent: int) -> LatentRecord:
        """Explain one latent and score the explanation."""
        examples = await asyncio.to_thread(self.maker.of, latent)
        record: LatentRecord = {
            "latent": latent, "settings": self.settings, "firing": examples.firing, "largest": examples.largest,
            "explanation": None, "problem": examples.problem, "failed": 0, "scores": {},
        }  # fmt: skip
        if examples.problem is None:
            texts = [self.scoring.strings(window) for window in examples.train]
            answer = await self.judge.ask(
                questions.explain(examples, texts), questions.EXPLAIN_TOKENS, questions.read_explanation,
                questions.EXPLAIN_SCHEMA,
            )  # fmt: skip
            record["explanation"], record["problem"] = answer.value, answer.problem
            record["failed"] = int(answer.value is None)
            if answer.value is not None:
                for scorer in self.cfg.scorers:
                    scores = await self.scoring.scores(answer.value, examples, scorer)
                    record["scores"][scorer.value] = scores
                    record["failed"] += scores["failed"]
        write_latent(self.index.run, record)
        return record

    async def _shuffled(self, records: list[LatentRecord]) -> list[dict[str, Any]]:
        """Detection with another latent's explanation: what an unrelated explanation scores."""
        if len(records) < 2:
            return []

        async def one(latent: int, explanation: str) -> dict[str, Any]:
            examples = await asyncio.to_thread(self.maker.of, latent)
            return (await self.scoring.detection(explanation, examples)).scores()

        others = [*records[1:], records[0]]
        some = list(zip(records, others, strict=True))[:50]
        tasks = [one(record["latent"], other["explanation"] or "") for record, other in some]
        return list(await asyncio.gather(*tasks))

    def _summary(
        self, records: list[LatentRecord], shuffled: list[dict[str, Any]], calibrated: dict[str, Any]
    ) -> InterpretationSummary:
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
        return cast(InterpretationSummary, summary)

    def _use(self) -> dict[str, float]:
        judge = self.judge
        return {
            "requests": judge.requests, "cached": judge.cached, "retries": judge.retries,
            "unreadable": judge.unreadable, "failures": judge.failures, "prompt_tokens": judge.prompt_tokens,
            "completion_tokens": judge.completion_tokens, "cost": judge.cost,
        }  # fmt: skip


def _of_circuit(file: Path, hookpoint: str) -> list[int]:
    """A hookpoint's latents in a circuit (evals/circuits/graph.py), the most influential first."""
    try:
        circuit = json.loads(file.read_text())
        layer = {facts["hookpoint"]: facts["number"] for facts in circuit["layers"]}.get(hookpoint)
        nodes = [
            (n["influence"], n["latent"]) for n in circuit["nodes"] if n["kind"] == "latent" and n["layer"] == layer
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"circuit={file} is no circuit.json of evals/circuit.py ({type(error).__name__}: {error})"
        ) from None
    return list(dict.fromkeys(latent for _, latent in sorted(nodes)))
