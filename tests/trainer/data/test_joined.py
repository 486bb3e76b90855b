"""Two stores of the same tokens, read as one."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipcoder.errors import UserError
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank.bank import train
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import Kind
from skipcoder.trainer.data.batch import Column
from skipcoder.trainer.data.joined import JoinedStore, addresses, open_stores, opened_again
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.build import hookpoints
from skipcoder.trainer.run.run import Run
from tests.conftest import CONTEXT, UNIT_ROWS
from tests.trainer.run.test_run import config

MLP = "layers.1.mlp"


@pytest.fixture(scope="module")
def capture_tuned(
    tiny_model: Path, cache_config: Any, capture_here: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., ActivationStore]:
    """Capture a model that differs from the tiny one in the weights of its layer 1."""
    tuned = tmp_path_factory.mktemp("tuned")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="bfloat16")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    model.save_pretrained(tuned)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tuned)

    def capture(path: Path, **options: Any) -> ActivationStore:
        data = options.pop("data", {})
        cfg = cache_config(path, **options)
        cfg.model.id, cfg.data = str(tuned), replace(cfg.data, **data)
        found: ActivationStore = capture_here(cfg)
        return found

    return capture


@pytest.fixture(scope="module")
def other(capture_tuned: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    result: ActivationStore = capture_tuned(tmp_path_factory.mktemp("other") / "tuned.zarr")
    return result


def test_the_same_tokens_of_both(store: ActivationStore, other: ActivationStore) -> None:
    joined = open_stores(store.place, other.place)
    names = [MLP, f"other:{MLP}"]
    both = list(ActivationStream(joined, names, 100, epochs=1))
    each = [list(ActivationStream(one, MLP, 100, epochs=1, pool_chunks=10**6)) for one in (store, other)]
    assert len(both) == len(each[0]) == len(each[1])
    for batch, a, b in zip(both, *each, strict=True):
        assert torch.equal(batch.position, a.position) and torch.equal(batch.position, b.position)
        for name, of in zip(names, (a, b), strict=True):
            assert torch.equal(batch.columns[Column(name, "input")], of.x)
            assert torch.equal(batch.columns[Column(name, "output")], of.y)
        assert torch.equal(a.x, b.x) and not torch.equal(a.y, b.y)
    for name, one in zip(names, (store, other), strict=True):
        found, expected = (s.moments(n, "output") for s, n in ((joined, name), (one, MLP)))
        assert found.count == expected.count and (found.mean == expected.mean).all()
    assert joined.content not in (store.content, other.content)


def test_another_process_opens_both_again(store: ActivationStore, other: ActivationStore) -> None:
    joined = open_stores(store.place, other.place)
    again = opened_again(addresses(joined))
    assert isinstance(again, JoinedStore) and again.attrs == joined.attrs
    name = f"other:{MLP}"
    assert torch.equal(again.activations(name, "output", 0, 50), other.activations(MLP, "output", 0, 50))
    assert type(opened_again(addresses(store))) is ActivationStore


@pytest.mark.slow
def test_a_crosscoder_between_two_models(store: ActivationStore, other: ActivationStore, tmp_path: Path) -> None:
    cfg = config(store, Kind.crosscoder)
    cfg.store.other, cfg.hookpoint = str(other.path), MLP
    train(cfg, tmp_path)
    cfg.hookpoint = None  # of two stores with one hookpoint each
    assert hookpoints(cfg, JoinedStore(other, other)) == [MLP, f"other:{MLP}"]
    coder = SparseCoder.load(tmp_path)
    assert [side["hookpoint"] for side in coder.meta["sides"]] == [MLP, f"other:{MLP}"]
    assert coder.meta["sides"][1]["module"] == MLP
    assert coder.meta["model"]["id"] == store.attrs["model"]["id"]
    assert coder.meta["other_model"]["id"] == other.attrs["model"]["id"] != store.attrs["model"]["id"]
    run = Run.open(tmp_path)
    joined = open_stores(*run.stores)
    run.check(joined)
    rows = run.rows(joined, 0, 10)
    assert torch.equal(rows[:, coder.d_in // 2 :], other.activations(MLP, "output", 0, 10))
    with pytest.raises(UserError, match=r"was trained on other:layers.1.mlp, which .* lacks"):
        run.check(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit_rows": 2 * UNIT_ROWS}, r"do not align: unit_rows \d+ and \d+; capture the second with the first one's"),
        ({"codec": "int8"}, r"do not align: codec bf16 and int8"),
        ({"rows": 20 * UNIT_ROWS}, r"do not align: rows \d+ and \d+"),
        ({"data": {"context": CONTEXT // 2}}, r"do not align: context \d+ and \d+"),
    ],
)
def test_stores_that_do_not_align(
    change: dict[str, Any], message: str, store: ActivationStore, capture_tuned: Any, tmp_path: Path
) -> None:
    other = capture_tuned(tmp_path / "other.zarr", **change)
    with pytest.raises(UserError, match=message):
        open_stores(store.place, other.place)


def test_stores_of_different_tokens(
    store: ActivationStore, capture_tuned: Any, text_file: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(reversed(text_file.read_text().splitlines(keepends=True))))
    other = capture_tuned(tmp_path / "other.zarr", data={"path": str(text)})
    with pytest.raises(UserError, match=r"hold different tokens \(from row 0 on\); capture both from the same text"):
        open_stores(store.place, other.place)
    with pytest.raises(UserError, match=r"no hookpoint 'layers.0.mlp': .*tuned.zarr holds layers.1.mlp"):
        cfg = config(store, Kind.crosscoder)
        cfg.store.other, cfg.hookpoint = str(capture_tuned(tmp_path / "tuned.zarr").path), "layers.0.mlp"
        train(cfg, tmp_path / "run")
