"""Tokens that are too long are found, left out of all that training and evaluation look at, and left alone later."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import skipcoder
from skipcoder.errors import UserError
from skipcoder.evals.config import EvaluateConfig
from skipcoder.evals.evaluate import evaluate
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.pipeline.store.stats import Moments
from skipcoder.trainer.bank.bank import train
from skipcoder.trainer.data import outliers
from skipcoder.trainer.data.filter import USUAL
from skipcoder.trainer.data.stream import ActivationStream
from skipcoder.trainer.run.run import Run
from tests.evals.circuits.test_attribution import replacement_of
from tests.trainer.bank.test_bank import config

pytestmark = pytest.mark.slow

HOOKPOINT, MOST = "layers.1.mlp", 1.2


def everything(store: ActivationStore, split: str | None) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """Both sides of all tokens that the usual filter keeps, and their positions."""
    stream = ActivationStream(store, HOOKPOINT, 64, split=split, epochs=1) if split else None
    batches = list(stream) if stream else [b for s in ("train", "validation", "test") for b in everything_of(store, s)]
    x, y, position = (torch.cat(z) for z in zip(*((b.x, b.y, b.position) for b in batches), strict=True))
    order = position.argsort()
    return {"input": x[order], "output": y[order]}, position[order].numpy()


def everything_of(store: ActivationStore, split: str) -> list[Any]:
    return list(ActivationStream(store, HOOKPOINT, 64, split=split, epochs=1))


@pytest.fixture(autouse=True)
def forgetful(store: ActivationStore) -> None:
    """Nothing found before, in memory or beside the store."""
    outliers._found.cache_clear()
    for file in Path(f"{store.path}".removesuffix(".zarr") + ".derived").glob("outlier*"):
        file.unlink()


def test_what_is_found_is_what_a_look_at_all_tokens_finds(store: ActivationStore) -> None:
    kept = outliers.limited(USUAL, MOST, store, HOOKPOINT)
    train_sides, train_position = everything(store, "train")
    sides, position = everything(store, None)
    first = np.isin(train_position // (store.unit_rows * store.context), store.split("train")[: outliers.UNITS])
    assert kept.longest is not None and kept.long is not None
    long, long_in_training = np.zeros(len(position), bool), np.zeros(len(train_position), bool)
    for side, longest in zip(("input", "output"), kept.longest, strict=True):
        lengths = train_sides[side].norm(dim=1).numpy()
        assert longest == pytest.approx(MOST * np.median(lengths[first]), rel=1e-6)
        long |= sides[side].norm(dim=1).numpy() > longest
        long_in_training |= lengths > longest
    assert 10 < long.sum() < 0.5 * len(long)
    assert np.array_equal(kept.long, position[long])

    for side, z in train_sides.items():
        found = outliers.moments(store, HOOKPOINT, side, kept)
        wanted = Moments.of(z[torch.from_numpy(~long_in_training)])
        assert found.count == wanted.count
        for name in ("mean", "m2"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), rtol=1e-9, atol=1e-12)
        assert found.norms == pytest.approx(wanted.norms)

    _, streamed = map(np.concatenate, zip(*((b.x, b.position) for b in stream_of(store, kept)), strict=True))
    assert np.array_equal(np.sort(streamed), train_position[~long_in_training])


def test_statistics_are_exact_whatever_else_is_left_out(store: ActivationStore) -> None:
    for first in (0, 3):
        kept = outliers.limited(replace(USUAL, first_positions=first), MOST, store, HOOKPOINT)
        batches = list(stream_of(store, kept))
        found = outliers.moments(store, HOOKPOINT, "output", kept)
        wanted = Moments.of(torch.cat([batch.y for batch in batches]))
        assert found.count == wanted.count
        np.testing.assert_allclose(found.m2, wanted.m2, rtol=1e-9)


def stream_of(store: ActivationStore, kept: Any) -> Any:
    return ActivationStream(store, HOOKPOINT, 64, filter=kept, epochs=1)


def test_it_is_looked_for_once_and_only_where_it_can_be(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = outliers.limited(USUAL, MOST, store, HOOKPOINT)
    assert kept.long is not None
    asked: list[int] = []
    monkeypatch.setattr(outliers, "_scan", lambda *_: asked.append(1))
    outliers._found.cache_clear()
    again = outliers.outliers(kept, store, HOOKPOINT)  # from beside the store
    assert np.array_equal(again.position, kept.long) and not asked
    monkeypatch.undo()

    def refuse(*_: object) -> None:
        raise AssertionError("read without need")

    monkeypatch.setattr(ActivationStore, "activations", refuse)
    none = outliers.outliers(replace(USUAL, longest=(1e6, 1e6)), store, HOOKPOINT)
    assert not len(none.position) and not none.moments["input"].count


def test_training_evaluation_and_splicing_leave_it_out(store: ActivationStore, lm: Any, tmp_path: Path) -> None:
    cfg = config(store, lr=1e-3)
    cfg.stream.max_norm = MOST
    train(cfg, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    kept = outliers.in_store(run.filter, store, [HOOKPOINT])
    saved = json.loads((tmp_path / "run" / "checkpoint" / "coder.json").read_text())["data"]
    assert kept.long is not None and kept.longest is not None
    assert saved["filter"]["max_norm"] == MOST and saved["long_tokens"] == len(kept.long)

    (row,) = evaluate(EvaluateConfig(run=str(tmp_path / "run"), ce_tokens=4096))
    every = sum(len(b.position) for b in everything_of(store, "test"))
    left_out = np.isin(kept.long // (store.unit_rows * store.context), store.split("test")).sum()
    assert row["n"] == every - left_out < every

    tokens = torch.from_numpy(store.tokens(store.split("test")[0])[:2]).long()
    seen: dict[str, torch.Tensor] = {}
    mlp = lm.model.layers[1].mlp
    handles = [
        mlp.register_forward_hook(lambda _, args, out: seen.update(x=args[0], y=out)),
    ]
    with torch.no_grad():
        lm(tokens)
        with skipcoder.splice(lm, {HOOKPOINT: run.coder}, special_tokens=()):
            plain = {**seen}
            handles.append(mlp.register_forward_hook(lambda _, args, out: seen.update(spliced=out)))
            lm(tokens)
    for handle in handles:
        handle.remove()
    long = (plain["x"].norm(dim=-1) > kept.longest[0]) | (plain["y"].norm(dim=-1) > kept.longest[1])
    same = (seen["spliced"] == plain["y"]).all(-1)
    long[:, 0] = True  # the first position is left out, too
    assert 2 < long.sum() < long.numel() and torch.equal(same, long)


def test_circuits_leave_it_as_it_is() -> None:
    free = replacement_of("llama", torch.float64)
    coder = free.layers[1].coder
    assert coder is not None
    lengths = free.writes[1].norm(dim=1)
    limit = float(lengths.sort().values[-2])  # one token is longer
    coder.meta = {"data": {"filter": {"first_positions": 1, "special_tokens": True, "longest": [1e9, limit]}}}
    bound = type(free)(free.model, free.layers, free.ids_T, free.left_out_T)
    assert torch.equal(bound.left_out[1], free.left_out_T | (lengths > limit))
    assert int(bound.left_out[1].sum()) in (1, 2) and torch.equal(bound.left_out[0], free.left_out_T)
    torch.testing.assert_close(
        bound.run(bound.embedding_TD, bound.writes).final[-1], free.run(free.embedding_TD, free.writes).final[-1]
    )


def test_a_limit_below_the_median_is_refused(store: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"stream.max_norm=0.5: must be above 1, or null"):
        type(config(store).stream)(max_norm=0.5)
