"""Documents that share a row and attend only to themselves give what each of them gives alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModel

from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline.model.hookpoints import Hookpoint
from skipcoder.pipeline.model.hooks import capture, refuse_if_documents_meet
from skipcoder.pipeline.model.load import load_trunk
from skipcoder.pipeline.store.attrs import model_config
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.text.rows import places
from skipcoder.trainer.bank.bank import train
from tests.trainer.bank.test_bank import config

pytestmark = pytest.mark.slow

HOOKPOINT = Hookpoint("layers.1.mlp", "layers.1.mlp", "layers.1.mlp")


@pytest.fixture(scope="module")
def apart(
    cache_config: Any, capture_here: Callable[..., ActivationStore], tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    cfg = cache_config(tmp_path_factory.mktemp("apart") / "s.zarr", rows=400)
    cfg.data.separate, cfg.data.context, cfg.micro_batch_tokens = True, 64, 128
    return capture_here(cfg)


def captured(model: Any, tokens: torch.Tensor, at: torch.Tensor | None) -> torch.Tensor:
    return capture(model, [HOOKPOINT], tokens, at)["layers.1.mlp"][1].view(*tokens.shape, -1)


def test_each_document_is_as_if_alone(apart: ActivationStore) -> None:
    """The stored activations are those of the document by itself, up to the rounding of other shapes; and to the bit
    those of a row of the same shape with any other documents around it."""
    model = load_trunk(model_config(apart.attrs), [HOOKPOINT], "cpu")
    bos, whole, errors = apart.attrs["bos"], 0, []
    for unit in range(6):
        tokens, start = torch.from_numpy(apart.tokens(unit)).long(), apart.unit_range(unit)[0]
        numbers = apart.read("document_number", *apart.rows_of(unit))
        at = torch.from_numpy(places(numbers))
        index = apart.read("index", *apart.unit_range(unit)).astype(np.int64) - start
        stored = torch.empty(tokens.numel(), 24, dtype=torch.bfloat16)
        stored[torch.from_numpy(index)] = apart.activations("layers.1.mlp", "output", *apart.unit_range(unit))
        stored = stored.view(*tokens.shape, -1)
        assert bos is not None and bool((tokens[at == 0] == bos).all())
        for row in range(len(tokens)):
            for number in np.unique(numbers[row]):
                mine = torch.from_numpy(numbers[row] == number)
                if mine[0] or mine.all():
                    continue  # it has nothing before it
                alone = captured(model, tokens[row, mine][None], None)[0]
                errors.append(float((stored[row, mine].float() - alone.float()).norm() / alone.float().norm()))
                others = tokens.clone()
                others[row, ~mine] = others[row, ~mine].flip(0)
                assert torch.equal(captured(model, others, at)[row, mine], captured(model, tokens, at)[row, mine])
                whole += 1
    assert whole > 5 and max(errors) < 0.02  # bfloat16 has 8 bits


def test_every_row_and_document_begins_with_bos(tiny_model: Path, tmp_path: Path) -> None:
    """Also held-out rows, which are cut out of long documents, and where few documents come again and again."""
    from skipcoder.pipeline.config import DataConfig, ModelConfig, SourceKind
    from skipcoder.pipeline.model.load import load_tokenizer
    from skipcoder.pipeline.text.rows import rows_of

    tokenizer = load_tokenizer(ModelConfig(name="tiny", id=str(tiny_model)))
    lines = "".join(json.dumps({"text": f"document {i} " * (5 + 7 * (i % 9))}) + "\n" for i in range(400))
    (tmp_path / "d.jsonl").write_text(lines)
    cfg = DataConfig(
        kind=SourceKind.jsonl, path=str(tmp_path / "d.jsonl"), context=32, separate=True, held_out_rows=1, repeat=True
    )
    rows = np.stack(list(rows_of(cfg, tokenizer, 1200, 4)))
    at = places(rows["document_number"])
    assert (rows["tokens"][at == 0] == 0).all() and (rows["tokens"][at > 0] != 0).all()


def test_without_it_documents_meet(apart: ActivationStore) -> None:
    """What the test above would find if positions were not handed on."""
    model = load_trunk(model_config(apart.attrs), [HOOKPOINT], "cpu")
    tokens, numbers = torch.from_numpy(apart.tokens(0)).long(), apart.read("document_number", *apart.rows_of(0))
    later = torch.from_numpy(places(numbers)) != torch.arange(64)
    assert later.any()
    together, alone = captured(model, tokens, None), captured(model, tokens, torch.from_numpy(places(numbers)))
    assert (together[later].float() - alone[later].float()).norm() > 0.1 * alone[later].float().norm()
    assert (
        torch.equal(together[~later], alone[~later]) or (together[~later] - alone[~later]).norm() < 0.02 * alone.norm()
    )


def test_evaluation_runs_the_model_as_the_capture_did(apart: ActivationStore, tmp_path: Path) -> None:
    train(config(apart, steps=4, lr=1e-3), tmp_path / "run")
    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "run"), ce_tokens=512, batch_rows=2))
    from skipcoder.evals.core.evaluator import Evaluator

    evaluator = Evaluator(apart, 512, 2, "cpu")
    assert evaluator.places_BT is not None
    losses = []
    for tokens, at in zip(evaluator.tokens_BT.split(2), evaluator.places_BT.split(2), strict=True):
        with torch.no_grad():
            said = evaluator.model(tokens, position_ids=at, use_cache=False).logits[:, :-1].float()
        losses.append(torch.nn.functional.cross_entropy(said.flatten(0, 1), tokens[:, 1:].flatten()))
    assert row["ce_clean"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)


def test_documents_apart_are_another_capture(
    apart: ActivationStore, cache_config: Any, capture_here: Callable[..., ActivationStore]
) -> None:
    cfg = cache_config(apart.path, rows=400)
    cfg.data.context, cfg.micro_batch_tokens = 64, 128
    with pytest.raises(UserError, match=r"holds another capture \(data.separate: True there, None asked\)"):
        capture_here(cfg)


@pytest.mark.parametrize(
    ("family", "allows"),
    [
        ("llama", True),
        ("gpt_neox", True),
        ("gpt2", True),
        ("gemma2", True),
        ("qwen2", True),
        ("opt", None),
        ("mamba", False),
    ],
)
def test_which_models_allow_it(family: str, allows: bool | None) -> None:
    """None: either way, but never silently wrong."""
    small: dict[str, Any] = {
        "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "n_embd": 16, "n_head": 2, "n_layer": 2,
        "word_embed_proj_dim": 16, "ffn_dim": 32, "state_size": 4,
    }  # fmt: skip
    names = {"gpt2": "h.1.mlp", "opt": "decoder.layers.1.fc1", "mamba": "layers.1.mixer"}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model(family, **small)).eval()
    name = names.get(family, "layers.1.mlp")
    hookpoints = [Hookpoint(name, name, name)]
    try:
        refuse_if_documents_meet(model, hookpoints, "cpu")
    except UserError as error:
        assert allows is not True and "data.separate=true: in" in str(error)
        return
    assert allows is not False
    tokens, at = torch.arange(3, 19).repeat(1, 2), torch.arange(16).repeat(1, 2)
    ((_, y),) = capture(model, hookpoints, tokens, at).values()
    ((_, alone),) = capture(model, hookpoints, tokens[:, 16:]).values()
    torch.testing.assert_close(y.view(2, 16, -1)[1], alone.view(16, -1), rtol=1e-4, atol=1e-5)
