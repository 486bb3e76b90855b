"""Hookpoints of which one side is stored: any module, at half the cost."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder import cli
from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline import store_cli
from skipcoder.pipeline.model.hookpoints import resolve
from skipcoder.pipeline.plan import make
from skipcoder.pipeline.store.places import place_at
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.recode import recode
from skipcoder.pipeline.store.verify import problems
from skipcoder.trainer.bank.bank import train
from skipcoder.trainer.coder.coder import SparseCoder
from skipcoder.trainer.config import CoderConfig, Kind, Side
from tests.trainer.run.test_run import config

ASKED = ("layers.*:output", "layers.1.mlp", "layers.2.self_attn:output", "embed_tokens:output", "norm:input")


@pytest.fixture(scope="module")
def mixed(cache_config: Any, capture_here: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    result: ActivationStore = capture_here(cache_config(tmp_path_factory.mktemp("mixed") / "mixed.zarr", ASKED))
    return result


@pytest.fixture(scope="module")
def both(cache_config: Any, capture_here: Any, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    path = tmp_path_factory.mktemp("both") / "both.zarr"
    result: ActivationStore = capture_here(cache_config(path, ("layers.*", "layers.2.self_attn")))
    return result


def test_one_array_each_and_what_is_two_sided_stays(mixed: ActivationStore, both: ActivationStore) -> None:
    names = ["embed_tokens", "layers.0", "layers.1", "layers.1.mlp", "layers.2", "layers.2.self_attn", "norm"]
    assert list(mixed.hookpoints) == names
    arrays = {file.split("/c/")[0] for record in mixed.commits.values() for file in record.shards if "/c/" in file}
    assert "layers.1/output" in arrays and not any(array.startswith("layers.1/input") for array in arrays)
    assert {"layers.1.mlp/input", "layers.1.mlp/output", "norm/input"} <= arrays and "norm/output" not in arrays
    n = mixed.rows * mixed.context
    for name in ("layers.0", "layers.1", "layers.2", "layers.2.self_attn"):
        assert torch.equal(mixed.activations(name, "output", 0, n), both.activations(name, "output", 0, n))
    residual = both.activations("layers.1", "input", 0, n)
    assert torch.equal(mixed.activations("layers.0", "output", 0, n), residual)  # what enters the next layer
    with pytest.raises(UserError, match=r"side 'input' of layers.1: .* has only its output"):
        mixed.activations("layers.1", "input", 0, 1)
    with pytest.raises(UserError, match=r"side 'other' of layers.1.mlp: .* has only its input and output"):
        mixed.width("layers.1.mlp", "other")


def test_half_the_bytes(mixed: ActivationStore, both: ActivationStore) -> None:
    def size(store: ActivationStore, name: str) -> int:
        shards = (s for record in store.commits.values() for s in record.shards.items())
        return sum(facts["bytes"] for file, facts in shards if file.startswith((f"{name}/input", f"{name}/output")))

    assert 0.45 < size(mixed, "layers.1") / size(both, "layers.1") < 0.55


def test_verify_recode_and_describe(mixed: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert not list(problems(mixed.place))
    for _ in recode(mixed, place_at(tmp_path / "lz4.zarr"), "lz4"):
        pass
    again = ActivationStore.open(tmp_path / "lz4.zarr")
    assert torch.equal(again.activations("norm", "input", 5, 900), mixed.activations("norm", "input", 5, 900))
    assert "layers.1 (24, output alone), layers.1.mlp (24 to 24)" in repr(mixed)
    assert store_cli.info(mixed.place) == cli.DONE
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["layers.1"]] == ["output"]
    assert [line[1] for line in lines if line[:1] == ["norm"]] == ["input"]


def test_the_plan_counts_one_side(cache_config: Any, tmp_path: Path) -> None:
    sizes = make(cache_config(tmp_path / "new.zarr", ("layers.0", "layers.1:output"))).sizes
    assert sizes["layers.0"][0] == 2 * sizes["layers.1"][0] == 2 * 2 * 24


@pytest.mark.slow
def test_an_sae_on_it_is_that_on_a_two_sided_store(
    mixed: ActivationStore, both: ActivationStore, tmp_path: Path
) -> None:
    for name, store in (("one", mixed), ("two", both)):
        cfg = config(store, Kind.sae)
        cfg.hookpoint, cfg.stream.max_norm = "layers.2.self_attn", None
        train(cfg, tmp_path / name)
    one, two = (SparseCoder.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in two)
    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "one"), ce_tokens=128))
    assert row["fvu"] < 1 and row["ce_spliced"] > 0


@pytest.mark.slow
def test_long_tokens_of_one_side(mixed: ActivationStore, tmp_path: Path) -> None:
    cfg = config(mixed, Kind.sae)
    cfg.hookpoint, cfg.stream.max_norm = "layers.1", 1.3
    train(cfg, tmp_path)
    facts = json.loads((tmp_path / "checkpoint" / "coder.json").read_text())["data"]
    assert facts["filter"]["longest"][0] is None and facts["filter"]["longest"][1] > 0 and facts["long_tokens"] > 0
    coder = SparseCoder.load(tmp_path)
    assert coder.longest == {"output": facts["filter"]["longest"][1]}


def test_coders_that_need_the_other_side_are_refused(mixed: ActivationStore, tmp_path: Path) -> None:
    cfg = config(mixed, Kind.transcoder)
    cfg.hookpoint = "layers.1"
    with pytest.raises(UserError, match=r"side 'input' of layers.1: .* has only its output"):
        train(cfg, tmp_path)
    cfg = config(mixed, Kind.sae)
    cfg.hookpoint, cfg.coder = "layers.1", CoderConfig(kind=Kind.sae, k=4, width=64, side=Side.input)
    with pytest.raises(UserError, match=r"side 'input' of layers.1: .* has only its output"):
        train(cfg, tmp_path)


def test_patterns() -> None:
    names = [f"layers.{i}{part}" for i in range(3) for part in ("", ".mlp")]
    found = resolve(["layers.*:output", "layers.1:input", "layers.2.mlp"], {}, names)
    by_name = {h.name: h.sides for h in found}
    assert by_name == {
        "layers.0": ("output",), "layers.1": ("input", "output"), "layers.2": ("output",),
        "layers.2.mlp": ("input", "output"),
    }  # fmt: skip
    with pytest.raises(UserError, match=r"'layers.1:out': what follows the colon must be input or output"):
        resolve(["layers.1:out"], {}, names)
