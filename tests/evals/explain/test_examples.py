"""The index of firings, and the windows of text that are drawn from it."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcoder.evals.config import ExamplesConfig, Negatives
from skipcoder.evals.latents import index as latents
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.run.run import Run
from tests.conftest import UNIT_ROWS
from tests.evals.explain.conftest import LATENTS, frequent_words
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.slow


def test_index_is_what_the_coder_says(store: ActivationStore, tmp_path: Path) -> None:
    """Built in parts; every firing of every latent is there, nothing else; made anew for other weights."""
    training.train(config(store), tmp_path / "run")
    run = Run.open(tmp_path / "run")
    index = LatentIndex(run, store)
    index.parts = [store.units[:20], store.units[20:]]
    index.build("cpu")
    dense = np.zeros((store.rows * store.context, index.width), np.float32)
    for latent in range(index.width):
        firing = index.of(latent)
        assert (np.diff(firing.position) > 0).all()
        dense[firing.position, latent] = firing.value
    span = [store.unit_range(unit) for unit in store.units]
    flat = np.concatenate([store.read("index", *s) for s in span]).astype(np.int64)
    for ((a, b),) in [(s,) for s in span[:3] + span[-2:]]:
        out = run.coder(store.activations("layers.1.mlp", "input", a, b))
        wanted = np.zeros((b - a, index.width), np.float32)
        np.put_along_axis(wanted, out.indices.numpy(), out.values.detach().numpy(), 1)
        position = flat[a:b]
        kept = run.filter.keep(position, index.tokens.ravel()[position], store.context, store.attrs["special_tokens"])
        wanted[~kept] = 0
        np.testing.assert_allclose(dense[position], wanted, rtol=1e-5, atol=1e-6)
    assert (index.counts == (dense > 0).sum(0)).all()
    before = {file.name: file.stat().st_mtime_ns for file in index.folder.iterdir() if file.suffix == ".safetensors"}
    index.build("cpu")
    assert before == {f.name: f.stat().st_mtime_ns for f in index.folder.iterdir() if f.suffix == ".safetensors"}
    (index.folder / "identity.json").write_text('{"weights": "others"}')
    index.build("cpu")
    after = {f.name: f.stat().st_mtime_ns for f in index.folder.iterdir() if f.suffix == ".safetensors"}
    assert after.keys() == before.keys() and all(after[name] != before[name] for name in after)


def test_index_of_a_grown_store_keeps_what_it_has(
    cache_config: Any, capture_here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten units a part; 33 units and a short one become 48: the first three parts stay."""
    small = capture_here(cache_config(tmp_path / "s.zarr", rows=33 * UNIT_ROWS + 1))
    training.train(config(small), tmp_path / "run")
    monkeypatch.setattr(latents, "PART_TOKENS", 10 * UNIT_ROWS * small.context)
    LatentIndex(Run.open(tmp_path / "run"), small).build("cpu")
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "run" / "latents").glob("*.safetensors")}
    grown = capture_here(cache_config(tmp_path / "s.zarr", rows=48 * UNIT_ROWS))
    index = LatentIndex(Run.open(tmp_path / "run"), grown)
    told: list[int] = []
    index.build("cpu", told.append)
    assert sum(told) == 18 * UNIT_ROWS * grown.context
    after = {file: file.stat().st_mtime_ns for file in index.folder.glob("*.safetensors")}
    assert len(before) == 4 and len(after) == 5 and len(before.items() & after.items()) == 3
    shutil.rmtree(index.folder)
    anew = LatentIndex(Run.open(tmp_path / "run"), grown)
    anew.build("cpu")
    for latent in range(index.width):
        for mine, wanted in zip(index.of(latent), anew.of(latent), strict=True):
            np.testing.assert_array_equal(mine, wanted)


@pytest.mark.parametrize("kind", list(Negatives))
def test_windows_are_disjoint_distinct_and_the_latents_own(
    planted: Path, store: ActivationStore, kind: Negatives
) -> None:
    index = LatentIndex(Run.open(planted), store)
    cfg = ExamplesConfig(window=8, train=4, test=5, negatives=kind)
    maker = ExampleMaker(index, cfg)
    maker.prepare(np.arange(LATENTS))
    words = frequent_words(index)
    for latent in range(LATENTS):
        found = maker.of(latent)
        assert len(found.train) == 4 and len(found.test) == 5 and len(found.negative) == 5
        every = [*found.train, *found.test, *found.negative]
        assert len({window.number for window in every}) == len({window.tokens.tobytes() for window in every}) == 14
        for window in every:
            assert ((window.tokens == words[latent]) == (window.activations > 0)).all()
            assert (window.activations > 0).any() == (window not in found.negative)
        alone = ExampleMaker(index, cfg)
        alone.prepare(np.array([latent]))
        assert [w.number for w in alone.of(latent).test] == [w.number for w in found.test]
    if kind is not Negatives.random:
        assert any(window.kind == kind.value for window in maker.of(0).negative)
    top, spread = maker.shown(0, index.of(0), 5, 5)
    largest = [window.activations.max() for window in top]
    assert largest == sorted(largest, reverse=True) and largest[0] == index.of(0).value.max()
    assert len({window.number for window in spread}) == 5
