"""A judge: any server with OpenAI's chat API (vLLM, llama.cpp, OpenRouter, OpenAI).

One client asks many questions at a time, tries again with growing, jittered pauses while the server is busy or broken,
and keeps every answer on disk, so that a question is paid for once. A question that cannot be answered gives an Answer
with a `problem`; it never ends a run. The key comes from the environment and is not written anywhere.
"""

import asyncio
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tenacity

from skipcoder.errors import UserError
from skipcoder.evals.config import JudgeConfig
from skipcoder.evals.explain.answer_cache import AnswerCache

Message = dict[str, str]
BUSY = (408, 409, 425, 429)
UNREADABLE = "unreadable answer"
READINGS = 3
"""Most times that a question is asked while its answer cannot be read."""


@dataclass
class Answer:
    """What the judge said."""

    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    """One entry per token, with its alternatives, as the server gives them; empty where it gives none."""
    value: Any = None
    """What `parse` made of the text."""
    problem: str | None = None
    """Why there is no answer."""


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
        self._offers = {"response_format": True, "logprobs": True}
        self._checked, self._checking = False, asyncio.Lock()

    async def __aenter__(self) -> "Judge":
        key = os.environ.get(self.cfg.key_variable, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise UserError(f"the environment variable {self.cfg.key_variable} holds no key: letters out of ASCII")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key = key
        limits = httpx.Limits(max_connections=self.cfg.concurrency)
        self._client = httpx.AsyncClient(headers=headers, timeout=self.cfg.timeout, limits=limits)
        self._slots = asyncio.Semaphore(self.cfg.concurrency)
        self._answers = AnswerCache(self._cache_file, self.cfg.base_url)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()
        self._answers.close()

    @property
    def cost(self) -> float:
        """Cost of the tokens used, at the configured prices (per million)."""
        return (self.prompt_tokens * self.cfg.price_in + self.completion_tokens * self.cfg.price_out) / 1e6

    async def _check(self) -> None:
        """Test the judge before the first question that is not in the cache: UserError if it does not answer."""
        async with self._checking:
            if self._checked:
                return
            body = {"model": self.cfg.model, "messages": [{"role": "user", "content": "Say: ready"}], "max_tokens": 4}
            answer = await self._from_server(body)
            if answer.problem is not None:
                raise UserError(f"the judge at {self.cfg.base_url} does not answer: {answer.problem}")
            self._checked = True

    async def ask(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        parse: Callable[[str], Any],
        schema: dict[str, Any] | None = None,
        logprobs: bool = False,
    ) -> Answer:
        """The answer, from the cache or the server. `parse` gives None for an unreadable answer; the question is then
        asked again. `schema`: the answer's JSON schema; servers that know no schemas are asked without."""
        body: dict[str, Any] = {
            "model": self.cfg.model, "messages": list(messages), "temperature": 0.0, "max_tokens": max_tokens,
        }  # fmt: skip
        if logprobs and self.cfg.logprobs:
            body |= {"logprobs": True, "top_logprobs": 5}
        if schema is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        kept = self._kept(body)
        if kept is not None:
            return Answer(kept["text"], kept["logprobs"], parse(kept["text"]))
        await self._check()
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
            self._answers.keep(body, {"text": answer.text, "logprobs": answer.logprobs})
        else:
            self._count(answer.problem)
        return answer

    async def embed(self, text: str) -> list[float] | None:
        """The text's embedding, from the cache or the server; None where there is none."""
        body = {"model": self.cfg.embedding_model or self.cfg.model, "input": text}
        kept = self._kept(body)
        if kept is not None:
            result: list[float] | None = kept["embedding"]
            return result
        await self._check()
        async with self._slots:
            response = await self._send("embeddings", body)
        if isinstance(response, str) or response.status_code != 200:
            self._count(response if isinstance(response, str) else self._refusal(response))
            return None
        try:
            embedding = [float(value) for value in response.json()["data"][0]["embedding"]]
        except (ValueError, KeyError, IndexError, TypeError):
            self._count("the server's answer is no embedding")
            return None
        self._answers.keep(body, {"embedding": embedding})
        return embedding

    def _count_tokens(self, response: httpx.Response) -> None:
        """Also check that this is an answer: gateways in trouble send pages of HTML with a good status."""
        try:
            content = response.json()
            if not content.get("data") and not isinstance(content["choices"][0], dict):
                raise TypeError
            usage = content.get("usage") or {}
            self.prompt_tokens += int(usage.get("prompt_tokens") or 0)
            self.completion_tokens += int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise _BusyError("the server's answer is not that of a chat API") from None

    async def prompt_logprobs(self, prompt: str, alternatives: int) -> list[dict[str, Any] | None] | None:
        """What the judge would have said at each token of the prompt (vLLM); None where the server does not say."""
        body = {"model": self.cfg.model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": alternatives}
        kept = self._kept(body)
        if kept is not None:
            result: list[dict[str, Any] | None] | None = kept["prompt_logprobs"]
            return result
        await self._check()
        async with self._slots:
            response = await self._send("completions", body)
        if isinstance(response, str) or response.status_code != 200:
            self._count(response if isinstance(response, str) else self._refusal(response))
            return None
        choice = response.json()["choices"][0]
        found = choice.get("prompt_logprobs") if isinstance(choice, dict) else None
        if not isinstance(found, list):
            self._count("the server gives no log-probabilities of prompts")
            return None
        self._answers.keep(body, {"prompt_logprobs": found})
        return found

    def _kept(self, body: dict[str, Any]) -> dict[str, Any] | None:
        found = self._answers.get(body)
        self.cached += found is not None
        return found

    def _count(self, problem: str) -> None:
        self.failures += 1
        self.problems[problem] = self.problems.get(problem, 0) + 1

    async def _from_server(self, body: dict[str, Any]) -> Answer:
        lacking = {name for name, offered in self._offers.items() if not offered}
        if "logprobs" in lacking:
            lacking.add("top_logprobs")
        body = {name: value for name, value in body.items() if name not in lacking}
        response = await self._send("chat/completions", body)
        if isinstance(response, str):
            return Answer(problem=response)
        if response.status_code in (400, 422):  # the server may lack schemas or probabilities
            for name in ("response_format", "logprobs"):
                if name in body:
                    others = {key: value for key, value in body.items() if key not in (name, f"top_{name}")}
                    answer = await self._from_server(others)
                    if answer.problem is None:
                        self._offers[name] = False
                    return answer
        if response.status_code != 200:
            return Answer(problem=self._refusal(response))
        choice = response.json()["choices"][0]
        content = (choice.get("message") or {}).get("content")
        if isinstance(content, list):  # parts, as reasoning models send
            content = "".join(part.get("text", "") for part in content if isinstance(part, dict))
        return Answer(content or "", (choice.get("logprobs") or {}).get("content") or [])

    async def _send(self, path: str, body: dict[str, Any]) -> httpx.Response | str:
        """The server's response, with retries while it is busy; or what went wrong."""
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
                    self.requests += 1
                    response = await self._client.post(f"{self.cfg.base_url.rstrip('/')}/{path}", json=body)
                    if response.status_code in BUSY or response.status_code >= 500:
                        wait = response.headers.get("retry-after", "")
                        raise _BusyError(f"HTTP {response.status_code}", float(wait) if wait.isdigit() else None)
                    if response.status_code == 200:
                        self._count_tokens(response)
        except _BusyError as error:
            return str(error)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return f"{type(error).__name__}: {error}".strip(": ")
        return response

    def _refusal(self, response: httpx.Response) -> str:
        """What the server said, without the key, which some repeat."""
        said = response.text.replace(self._key, "***") if self._key else response.text
        return f"HTTP {response.status_code}: {said[:200]}"


def _pause(state: tenacity.RetryCallState) -> float:
    """The pause that the server asks for, else longer after each attempt, with jitter."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, _BusyError) and error.wait is not None:
        return min(error.wait, 60)
    return tenacity.wait_random_exponential(multiplier=0.5, max=30)(state)
