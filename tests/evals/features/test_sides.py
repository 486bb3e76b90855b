"""Pages of a coder over several hookpoints, in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest

from skipcoder.evals.config import ExamplesConfig
from skipcoder.evals.core.by_side import norm_shares
from skipcoder.evals.features.pages import promoted, write_pages
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import CoderConfig, Kind
from skipcoder.trainer.data.joined import open_stores
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.browser


def pages(run: Run, store: ActivationStore, lm: Any) -> Path:
    index = LatentIndex(run, store)
    index.build("cpu")
    maker = ExampleMaker(index, ExamplesConfig(window=8, train=4, test=5))
    return write_pages(index, maker, store.load_tokenizer(), lm)


@pytest.mark.parametrize("width", [1280, 390])
def test_shares_and_whose_a_latent_is(
    store: ActivationStore, lm: Any, browser: Any, tmp_path: Path, width: int
) -> None:
    cfg = config(store, Kind.crosscoder)
    cfg.store.other = str(store.path)
    training.train(cfg, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    kinds = ["tuned" if latent == 5 else "shared" for latent in range(64)]
    nothing = [None] * 64
    diff = {"weights": run.weights, "models": ["a", "b"], "tokens": 1, "kind": kinds, "relative_norm": nothing}
    (run.path / "diff.json").write_text(json.dumps({**diff, "nu_error": nothing, "nu_reconstruction": nothing}))
    where = pages(run, open_stores(*run.stores), lm)
    page = browser.new_page(viewport={"width": width, "height": 850})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(where.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    heads = page.locator(".head button:visible").all_inner_texts()
    assert [title in heads for title in ("other:layers.1.mlp", "belongs to")] == [width > 1000] * 2
    if width > 1000:
        page.get_by_role("button", name="other:layers.1.mlp").click()  # the largest share first
        first = int(page.locator(".row").first.locator("span").first.inner_text())
        assert first == int(norm_shares(run.coder)[:, 1].argmax())
    page.get_by_role("searchbox").fill("tuned")
    page.get_by_text("1 of 64 latents").wait_for()
    page.locator(".row").first.click()
    page.get_by_role("heading", name="Latent 5").wait_for()
    body = page.locator("main").inner_text()
    assert "belongs to: tuned" in body and "Share of its decoder on each side" in body
    assert not errors


def test_a_cross_layer_transcoders_latents_are_numbered_through(
    store: ActivationStore, lm: Any, browser: Any, tmp_path: Path
) -> None:
    cfg = config(store, Kind.sae)
    cfg.hookpoint, cfg.coder = "layers.*.mlp", CoderConfig(kind=Kind.clt, k=4, width=64)
    training.train(cfg, tmp_path / "run")
    run = Run.open(tmp_path / "run")
    where = pages(run, store, lm)
    page = browser.new_page(viewport={"width": 1280, "height": 850})
    page.goto(where.as_uri() + "#latent/150")
    page.get_by_role("heading", name="Latent 150").wait_for()
    assert "Share of its decoder on each side" in page.locator("main").inner_text()
    table = (where.parent / "data" / "table.js").read_text()
    shares = json.loads(table.removeprefix("window.skipcoderTable = ").removesuffix(";"))["shares"]
    assert len(shares) == 192 and shares[150][:2] == [0, 0] and shares[150][2] == 1
    up, _ = promoted(lm, run.coder.W_dec)
    assert len(up) == 192
