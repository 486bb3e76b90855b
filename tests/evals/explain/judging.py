"""Judges over HTTP that know the truth, and a coder whose latents are planted."""

import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Oracle:
    """Knows which words each excerpt holds. `mood`: honest, inverted or constant; `faults`: the share of requests that
    go wrong, in turn by each of FAULTS."""

    FAULTS = ("429", "500", "slow", "garbage", "short", "not json", "hang up")

    def __init__(self, mood: str = "honest", faults: float = 0.0, logprobs: bool = True, schemas: bool = True) -> None:
        self.mood, self.faults, self.logprobs, self.schemas = mood, faults, logprobs, schemas
        self.holds: dict[str, set[str]] = {}
        self.requests: Counter = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.chance = random.Random(0)
        self.pushed = ""

    def explanation(self, user: str) -> str:
        """The word that is marked most often."""
        marked = Counter(re.findall(r"<<(.*?)>>", user, re.DOTALL))
        return json.dumps({"explanation": f"The word {marked.most_common(1)[0][0].strip()!r}."})

    def answers(self, system: str, user: str) -> list[int]:
        """Whether each excerpt fits the explanation."""
        word = re.search(r"The word '(.*?)'\.", system)
        assert word is not None, system
        if "continuations" in system:  # the steered one holds the token that was pushed
            pairs = re.findall(r"First: (.*?)\nSecond: (.*?)(?=\n\nExcerpt|\Z)", user, re.DOTALL)
            return [int(second.count(self.pushed) > first.count(self.pushed)) for first, second in pairs]
        excerpts = re.split(r"(?:^|\n\n)Excerpt \d+: ", user)[1:]
        truth = []
        for excerpt in excerpts:
            marked = re.findall(r"<<(.*?)>>", excerpt, re.DOTALL)
            if marked:
                truth.append(int(all(mark.strip() == word[1] for mark in marked)))
            else:
                truth.append(int(word[1] in self.holds[excerpt]))
        return {"honest": truth, "inverted": [1 - t for t in truth], "constant": [0] * len(truth)}[self.mood]

    def embedding(self, text: str) -> list[float]:
        """One dimension for each word that is known; an explanation has its word's."""
        words = sorted({word for held in self.holds.values() for word in held})
        explained = re.fullmatch(r"The word '(.*?)'\.", text)
        held = {explained[1]} if explained else self.holds[text]
        return [float(word in held) for word in words]

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        """As vLLM answers with prompt_logprobs: it sees 8 on the explained word, 0 elsewhere."""
        assert body["prompt_logprobs"] == 15
        word = re.search(r"The word '(.*?)'\.", body["prompt"])
        assert word is not None
        found: list[dict[str, Any] | None] = [None]
        for line in body["prompt"].split("\n\n")[-1].splitlines():
            token = line.rsplit("\t", 1)[0]
            number = "8" if token.strip() == word[1] else "0"
            found.append({"5": {"decoded_token": token, "logprob": -9.0}})
            found.append({"6": {"decoded_token": "\t", "logprob": -0.1}})
            guess = {"decoded_token": number, "logprob": -0.1}
            found.append({"7": {"decoded_token": "unknown", "logprob": -20.0}, "8": guess})
            found.append({"9": {"decoded_token": "\n", "logprob": -0.1}})
        return {"choices": [{"text": " ", "prompt_logprobs": found if self.logprobs else None}]}

    def reply(self, body: dict[str, Any]) -> dict[str, Any]:
        """As a chat API replies."""
        system, user = body["messages"][0]["content"], body["messages"][-1]["content"]
        tokens: list[dict[str, Any]] = []
        if user == "Say: ready":
            text = "ready"
        elif '"explanation"' in system:
            text = self.explanation(user)
        else:
            answers = self.answers(system, user)
            text = json.dumps({"answers": answers})
            if self.logprobs and body.get("logprobs"):
                tokens = [{"token": '{"answers": [', "logprob": 0.0, "top_logprobs": []}]
                for a in answers:
                    likely, other = {"token": f" {a}", "logprob": -0.1}, {"token": f" {1 - a}", "logprob": -2.4}
                    tokens.append({"token": f" {a}", "logprob": -0.1, "top_logprobs": [likely, other]})
        return {
            "choices": [{"message": {"content": text}, "logprobs": {"content": tokens} if tokens else None}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 10},
        }

    @contextmanager
    def serving(self) -> Iterator[str]:
        """The base URL."""
        oracle = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                oracle.requests["all"] += 1
                oracle.bodies.append(body)
                oracle.keys.add(self.headers.get("Authorization"))
                if self.path.endswith("/embeddings"):
                    return self.answer(json.dumps({"data": [{"embedding": oracle.embedding(body["input"])}]}), 200)
                if self.path.endswith("/completions") and "prompt" in body:
                    return self.answer(json.dumps(oracle.completion(body)), 200)
                content, status = json.dumps(oracle.reply(body)), 200
                if not oracle.schemas and "response_format" in body:
                    content, status = '{"error": "response_format is not supported"}', 400
                elif body["messages"][-1]["content"] != "Say: ready" and oracle.chance.random() < oracle.faults:
                    fault = oracle.FAULTS[oracle.requests["faults"] % len(oracle.FAULTS)]
                    oracle.requests["faults"] += 1
                    oracle.requests[fault] += 1
                    if fault == "429":
                        status = 429
                    elif fault == "500":
                        status = 500
                    elif fault == "slow":
                        time.sleep(1.5)
                    elif fault == "garbage":
                        content = json.dumps({"choices": [{"message": {"content": "I cannot say, sorry."}}]})
                    elif fault == "short":
                        content = json.dumps({"choices": [{"message": {"content": '{"answers": [1]}'}}]})
                    elif fault == "not json":
                        content = "<html>gateway</html>"
                    elif fault == "hang up":
                        self.close_connection = True
                        return
                self.answer(content, status)

            def answer(self, content: str, status: int) -> None:
                try:
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(content.encode())))
                    if status == 429:
                        self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(content.encode())
                except (BrokenPipeError, ConnectionResetError):
                    pass  # whom we kept waiting has gone

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1"
        finally:
            server.shutdown()
            server.server_close()
