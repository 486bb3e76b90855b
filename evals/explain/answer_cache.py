"""Keep every answer of a judge on disk, so that a question is paid for once."""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any


class AnswerCache:
    """Answers by question and server, in an SQLite file."""

    def __init__(self, file: Path, server: str) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._server, self._answers = server, sqlite3.connect(file)
        self._answers.execute("create table if not exists answers (question text primary key, answer text)")

    def get(self, question: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request, if it was kept."""
        row = self._answers.execute("select answer from answers where question = ?", (self._key(question),)).fetchone()
        return None if row is None else json.loads(row[0])

    def keep(self, question: dict[str, Any], answer: dict[str, Any]) -> None:
        """Remember the answer to a request."""
        with self._answers:
            row = (self._key(question), json.dumps(answer))
            self._answers.execute("insert or replace into answers values (?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self._answers.close()

    def _key(self, question: dict[str, Any]) -> str:
        return hashlib.sha256(json.dumps([self._server, question], sort_keys=True).encode()).hexdigest()
