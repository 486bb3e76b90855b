"""The texts shown for a circuit's latents are those of the whole index, without making one."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcoder.errors import UserError
from skipcoder.evals.circuits.config import CircuitConfig
from skipcoder.evals.circuits.contexts import pages_of
from skipcoder.evals.circuits.trace import Tracer
from skipcoder.evals.config import Draw, ExamplesConfig, InterpretConfig
from skipcoder.evals.explain.interpreter import Interpreter
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.evals.latents.largest import largest_windows
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.run.run import Run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("window", [5, 8])
def test_with_room_for_all_windows_they_are_the_index_s(store: ActivationStore, coders: Path, window: int) -> None:
    """5 does not divide the context of 16: no window holds a row's last token."""
    run = Run.open(coders / "layers.1.mlp")
    index = LatentIndex(run, store)
    index.ensure("cpu")
    maker = ExampleMaker(index, ExamplesConfig(window=window))
    latents = np.nonzero(index.counts)[0][:12].tolist()
    done: list[int] = []
    found = largest_windows(run, store, latents, 10**4, window, "cpu", done.append)
    assert sum(done) == store.rows * store.context
    for latent, windows in zip(latents, found, strict=True):
        top, _ = maker.shown(latent, index.of(latent), 10**4, 1)
        largest = {one.tokens.tobytes(): float(one.activations.max()) for one in top}
        assert len(windows) == len(top) == len({one.tokens.tobytes() for one in windows})
        values = [float(one.activations.max()) for one in windows]
        assert values == sorted(values, reverse=True)
        # Of the same words in two places the index shows the first; here it is the one in which the latent is larger.
        assert np.all(np.array(values) >= np.array(sorted(largest.values(), reverse=True)) * (1 - 1e-5))
        for one in windows[:3]:
            row, at = divmod(one.number, maker.each_row)
            firing = index.of(latent)
            here = {int(p): v for p, v in zip(firing.position, firing.value, strict=True)}
            start = row * store.context + at * window
            np.testing.assert_allclose(one.activations, [here.get(start + i, 0) for i in range(window)], rtol=1e-5)
            assert one.tokens.tolist() == index.tokens[row, at * window : (at + 1) * window].tolist()


def test_few_windows_are_the_largest(store: ActivationStore, coders: Path) -> None:
    run = Run.open(coders / "layers.1.mlp")
    index = LatentIndex(run, store)
    index.ensure("cpu")
    maker = ExampleMaker(index, ExamplesConfig(window=8))
    latents = np.argsort(-index.counts)[:12].tolist()
    found = largest_windows(run, store, latents, 3, 8, "cpu")
    for latent, windows in zip(latents, found, strict=True):
        top, _ = maker.shown(latent, index.of(latent), 3, 1)
        assert len(windows) == 3
        assert windows[0].activations.max() == pytest.approx(float(top[0].activations.max()), rel=1e-5)


def test_pages_and_the_latents_to_explain(store: ActivationStore, coders: Path, traced: Path) -> None:
    found = json.loads((traced / "circuit.json").read_text())
    tracer = Tracer(CircuitConfig(str(coders), "x"))
    assert pages_of(tracer, traced) == {}
    page = coders / "layers.2.mlp" / "features" / "index.html"
    page.parent.mkdir()
    page.touch()
    assert (traced / pages_of(tracer, traced)[2]).resolve() == page
    shutil.rmtree(page.parent)
    index = LatentIndex(Run.open(coders / "layers.1.mlp"), store)
    index.ensure("cpu")

    def chosen(**settings: Any) -> list[int]:
        nobody: Any = None
        return Interpreter(index, nobody, InterpretConfig(run="r", **settings), nobody).chosen()

    file = str(traced / "circuit.json")
    mine = {n["latent"]: n["influence"] for n in reversed(found["nodes"]) if n["kind"] == "latent" and n["layer"] == 1}
    assert chosen(circuit=file, latents=None) == sorted(mine) != []
    assert len(chosen(circuit=file, latents=2)) == 2
    best = min((n["influence"], n["latent"]) for n in found["nodes"] if n["kind"] == "latent" and n["layer"] == 1)
    assert chosen(circuit=file, latents=1) == [best[1]]
    dense = chosen(draw=Draw.density, latents=3)
    assert sorted(index.counts[dense]) == sorted(index.counts)[-3:]
    with pytest.raises(UserError, match=r"circuit=.* is no circuit\.json"):
        chosen(circuit=str(traced / "index.html"))
    with pytest.raises(UserError, match="either which"):
        chosen(circuit=file, which=[1])
