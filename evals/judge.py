"""A judge: any server of OpenAI's chat API (vLLM, llama.cpp, OpenRouter, OpenAI).

One client asks many questions at a time, tries again with growing, jittered pauses where the server is busy or broken,
and keeps every answer on disk, so that a question is paid for once. A question that cannot be answered is an Answer
with a `problem`; it never ends a run. The key comes from the environment and is not written anywhere.
"""

import asyncio
import hashlib
import json
import os
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tenacity
from skipcoder.evals.config import JudgeConfig
from skipcoder.pipeline.errors import UserError

Message = dict[str, str]
BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
UNREADABLE = "unreadable answer"
READINGS = 3
"""How often a question is asked whose answer cannot be read."""


@dataclass
class Answer:
    """What the judge said."""

    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """Of each token, with its alternatives, as the server gives them; empty where it gives none."""
    value: Any = None
    """What `parse` made of the text."""
    problem: str | None = None
    """Why there is no text."""


class _BusyError(Exception):
    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Judge:
    """`async with Judge(cfg, cache) as judge: await judge.ask(...)`."""

    def __init__(self, cfg: JudgeConfig, cache: Path) -> None:
        self.cfg = cfg
        self.requests = self.cached = self.failures = self.retries = self.unreadable = 0
        self.prompt_tokens = self.completion_tokens = 0
        self.problems: dict[str, int] = {}
        self._cache_file = cache
        self._offers_schema = True

    async def __aenter__(self) -> "Judge":
        key = os.environ.get(self.cfg.key_variable, "")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=self.cfg.concurrency)
        self._client = httpx.AsyncClient(headers=headers, timeout=self.cfg.timeout, limits=limits)
        self._slots = asyncio.Semaphore(self.cfg.concurrency)
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        self._answers = sqlite3.connect(self._cache_file)
        self._answers.execute("create table if not exists answers (question text primary key, answer text)")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._answers.close()

    @property
    def cost(self) -> float:
        """Of the tokens used, by the configured prices (per million)."""
        return (self.prompt_tokens * self.cfg.price_in + self.completion_tokens * self.cfg.price_out) / 1e6

    async def check(self) -> None:
        """UserError if there is no such server or model."""
        answer = await self.ask([{"role": "user", "content": "Say: ready"}], 4, lambda text: text)
        if answer.problem is not None:
            raise UserError(f"the judge at {self.cfg.base_url} does not answer: {answer.problem}")

    async def ask(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        parse: Callable[[str], Any],
        schema: dict[str, Any] | None = None,
        logprobs: bool = False,
    ) -> Answer:
        """The answer, from the cache or the server; `parse` gives None for what cannot be read, which is asked again.
        `schema`: what JSON it should be; servers that know no schemas are asked without."""
        body: dict[str, Any] = {
            "model": self.cfg.model, "messages": list(messages), "temperature": 0.0, "max_tokens": max_tokens,
        }  # fmt: skip
        if logprobs and self.cfg.logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        key = hashlib.sha256(json.dumps([self.cfg.base_url, body], sort_keys=True).encode()).hexdigest()
        row = self._answers.execute("select answer from answers where question = ?", (key,)).fetchone()
        if row is not None:
            self.cached += 1
            kept = json.loads(row[0])
            return Answer(kept["text"], kept["logprobs"], parse(kept["text"]))
        for reading in range(READINGS):
            async with self._slots:
                answer = await self._from_server(body | ({"seed": reading} if reading else {}))
            if answer.problem is not None:
                break
            answer.value = parse(answer.text)
            if answer.value is not None:
                break
            self.unreadable += 1
        else:
            answer.problem = UNREADABLE
        if answer.problem is None:
            content = json.dumps({"text": answer.text, "logprobs": answer.logprobs})
            with self._answers:
                self._answers.execute("insert or replace into answers values (?, ?)", (key, content))
        else:
            self.failures += 1
            self.problems[answer.problem] = self.problems.get(answer.problem, 0) + 1
        return answer

    async def _from_server(self, body: dict[str, Any]) -> Answer:
        if not self._offers_schema:
            body = {name: value for name, value in body.items() if name != "response_format"}
        retrying = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.cfg.attempts),
            wait=_pause,
            retry=tenacity.retry_if_exception_type((_BusyError, httpx.TransportError)),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    self.retries += attempt.retry_state.attempt_number > 1
                    response = await self._post(body)
        except _BusyError as error:
            return Answer(problem=str(error))
        except httpx.TransportError as error:
            return Answer(problem=f"{type(error).__name__}: {error}".strip(": "))
        if response.status_code == 400 and "response_format" in body:
            self._offers_schema = False
            return await self._from_server(body)
        if response.status_code != 200:
            return Answer(problem=f"HTTP {response.status_code}: {response.text[:200]}")
        try:
            content = response.json()
            choice = content["choices"][0]
            usage = content.get("usage") or {}
            self.prompt_tokens += usage.get("prompt_tokens", 0)
            self.completion_tokens += usage.get("completion_tokens", 0)
            logprobs = (choice.get("logprobs") or {}).get("content") or []
            return Answer(choice["message"]["content"] or "", logprobs)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return Answer(problem="the server's answer is not that of a chat API")

    async def _post(self, body: dict[str, Any]) -> httpx.Response:
        self.requests += 1
        response = await self._client.post(f"{self.cfg.base_url.rstrip('/')}/chat/completions", json=body)
        if response.status_code in BUSY:
            wait = response.headers.get("retry-after", "")
            raise _BusyError(f"HTTP {response.status_code}", float(wait) if wait.isdigit() else None)
        return response


def _pause(state: tenacity.RetryCallState) -> float:
    """What the server asks for, else longer after each attempt, with jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _BusyError) and error.wait is not None:
        return min(error.wait, 60)
    return tenacity.wait_random_exponential(multiplier=0.5, max=30)(state)
