"""Conversations: put through the tokenizer's chat template, with the role of whoever wrote each token.

    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]

A message's content is looked for in the text that the template makes; what is around it is the template's.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from skipcoder.errors import UserError

Messages = list[dict[str, Any]]

ROLES = ("template", "text", "system", "user", "assistant", "tool", "other")
"""By their numbers in a store. `text`: of documents that are no conversations."""
TEMPLATE, TEXT, OTHER = (ROLES.index(name) for name in ("template", "text", "other"))

DATE = "26 Jul 2024"
"""What templates that print the date print: text must be the same on every day."""
TODAY = "{% macro strftime_now(format) %}" + DATE + "{% endmacro %}"

SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""How ShareGPT's `from` names the roles."""


class Tokens(NamedTuple):
    """A document in tokens."""

    text: str
    ids: list[int]
    roles: np.ndarray
    """uint8, of each token."""
    unplaced: int = 0
    """Messages whose words the template changed or left out."""


def messages_of(value: Any, where: str) -> Messages:
    """Return a conversation as [{"role", "content"}], also from ShareGPT's [{"from", "value"}]. UserError if it is
    none."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: no conversation, a list of messages, but {type(value).__name__}; set data.field")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise UserError(f"{where}, message {number}: not {{role, content}}, but {type(message).__name__}")
        sender = message.get("from")
        role = message.get("role") or (SHAREGPT.get(sender, sender) if isinstance(sender, str) else None)
        content = message["content"] if message.get("content") is not None else message.get("value")
        if not isinstance(role, str) or not (isinstance(content, str | list) or content is None):
            raise UserError(f"{where}, message {number}: needs role and content; it has {', '.join(message)}")
        kept = {key: part for key, part in message.items() if key not in ("from", "value") and part is not None}
        found.append({**kept, "role": role, "content": content or ""})
    return found


def set_template(tokenizer: Any, file: str | None) -> str:
    """Give the tokenizer the chat template of a file, if one is named, and a date that never changes; return the hash
    of the template that it has."""
    if file is not None:
        try:
            tokenizer.chat_template = Path(file).expanduser().read_text()
        except OSError as error:
            raise UserError(f"data.chat_template={file}: cannot be read ({error.strerror})") from None
    if not isinstance(tokenizer.chat_template, str):
        raise UserError(
            "data.chat=true: this model's tokenizer has no chat template; name a file with one as data.chat_template"
        )
    if "strftime_now" in tokenizer.chat_template:
        tokenizer.chat_template = TODAY + tokenizer.chat_template
    return hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:16]


def encode(tokenizer: Any, messages: Messages) -> Tokens:
    """Return a conversation in tokens; a token that holds any of a content's characters has that message's role."""
    text = _rendered(tokenizer, messages)
    role_of_char = np.full(len(text) + 1, TEMPLATE, np.uint8)
    unplaced = 0
    for message, span in zip(messages, _spans(tokenizer, messages, text), strict=True):
        if span is None:
            unplaced += bool(_text(message["content"]))
        else:
            role_of_char[span] = ROLES.index(message["role"]) if message["role"] in ROLES[2:] else OTHER
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    # The largest from start to before stop; of an empty one, as of blanks where offsets are trimmed, that at its start.
    roles = np.maximum.reduceat(role_of_char, offsets.ravel())[::2] if len(offsets) else np.empty(0, np.uint8)
    return Tokens(text, found["input_ids"], roles, unplaced)


def _rendered(tokenizer: Any, messages: Messages) -> str:
    import jinja2

    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    except (jinja2.TemplateError, TypeError) as error:
        first = str(messages[0]["content"])[:60]
        raise UserError(f"the chat template refuses a conversation ({error}): it begins {first!r}") from None
    return text


def _spans(tokenizer: Any, messages: Messages, text: str) -> list[slice | None]:
    """Where each content stands in what the template made of them; None if the template left it out or changed it.

    What the template makes of marks in place of the contents tells its own words from theirs. An empty content stays
    empty, as templates may ask.
    """
    marks = [f"\ue000{number}\ue001" if _text(m["content"]) else "" for number, m in enumerate(messages)]
    marked = _rendered(
        tokenizer, [{**m, "content": mark or m["content"]} for m, mark in zip(messages, marks, strict=True)]
    )
    spans: list[slice | None] = []
    at = read = 0
    for message, mark in zip(messages, marks, strict=True):
        place = marked.find(mark, read) if mark else -1
        if place < 0:
            spans.append(None)
            continue
        content, found = _text(message["content"]), text.find(marked[read:place], at)
        at, read = found + place - read if found >= 0 else at, place + len(mark)
        content = content if text.startswith(content, at) else content.strip()  # templates may strip it
        if found < 0 or not text.startswith(content, at):
            spans.append(None)
            continue
        spans.append(slice(at, at + len(content)))
        at += len(content)
    return spans


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))
