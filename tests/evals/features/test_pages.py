"""The feature pages in a real browser: from disk, at desktop and phone width, with hostile text and 100,000 latents."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from skipcoder.evals.config import ExamplesConfig
from skipcoder.evals.features.pages import TEMPLATE, firing_together, nearest_latents, promoted, write_pages
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.evals.explain import made
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.browser

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Hostile:
    """A tokenizer one of whose tokens is HTML."""

    def __init__(self, tokenizer: Any, token: int) -> None:
        self.tokenizer, self.token = tokenizer, token

    def decode(self, ids: list[int], **options: Any) -> str:
        return HOSTILE if ids == [self.token] else self.tokenizer.decode(ids, **options)


@pytest.fixture(scope="module")
def site(store: ActivationStore, lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of two coders, the first with explanations of some latents."""
    folder = tmp_path_factory.mktemp("sites")
    runs = []
    for name, kind in (("a", Kind.skip_transcoder), ("b", Kind.transcoder)):
        training.train(config(store, kind), folder / name)
        runs.append(Run.open(folder / name))
        LatentIndex(runs[-1], store).build("cpu")
    tokenizer = AutoTokenizer.from_pretrained(store.attrs["model"]["id"])
    index = LatentIndex(runs[0], store)
    busiest = int(index.counts.argmax())
    token = int(index.tokens.ravel()[index.of(busiest).position[index.of(busiest).value.argmax()]])
    for latent, text, score in ((3, "comments about zebras " + HOSTILE, 0.9), (busiest, "everything", 0.6)):
        scores: dict[str, dict[str, Any]] = {
            "detection": {"balanced_accuracy": score},
            "fuzzing": {"balanced_accuracy": None},
        }
        made.latent(runs[0], latent, text, scores)
    made.latent(runs[0], 5, "of another judge", {}, settings="others")
    made.summary(runs[0], judge="weak", calibration={"usable": False})
    for run, others in ((runs[0], [runs[1]]), (runs[1], [runs[0]])):
        index = LatentIndex(run, store)
        maker = ExampleMaker(index, ExamplesConfig(window=8, train=4, test=5))
        write_pages(index, maker, Hostile(tokenizer, token), lm, others)
    (folder / "a" / "busiest").write_text(str(busiest))
    return folder / "a"


@pytest.mark.parametrize("width", [1280, 390])
def test_search_sort_open_and_compare(site: Path, browser: Any, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 850})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto((site / "features" / "index.html").as_uri())
    busiest = (site / "busiest").read_text()

    def fits() -> bool:
        return page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    assert page.get_by_text("failed on planted latents").is_visible() and fits()
    assert page.get_by_role("status").inner_text() == "64 of 64 latents"
    assert page.get_by_text("of another judge").count() == 0
    page.get_by_label("search").fill("ZEBRAS")
    assert page.get_by_role("status").inner_text() == "1 of 64 latents"
    page.locator(".row").click()
    page.wait_for_selector("text=Latent 3")
    assert page.get_by_text("comments about zebras <script>").is_visible()
    page.keyboard.press("j")
    page.wait_for_selector("text=Latent 4")
    page.go_back()
    page.get_by_role("link", name="Table").click()
    page.get_by_label("search").fill("")
    page.get_by_role("button", name="detection").click()  # the best first
    assert page.locator(".row").first.inner_text().split()[0] == "3"
    page.locator(".viewport").focus()
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector(f"text=Latent {busiest}")
    # The hostile token stands in its contexts as text.
    assert page.locator(".context span", has_text="<script>").count() > 0
    assert page.locator("main script, main img").count() == 0 and page.title() != "owned"
    shaded = page.locator(".context span[title]")
    assert shaded.count() > 10
    assert page.locator(".bars i").count() == 24 and page.locator(".chips span").count() > 10 and fits()
    page.get_by_role("link", name="Compare").click()
    page.get_by_label("other coder").select_option("0")
    page.wait_for_selector("text=have a near twin")
    assert page.locator(".compare .row").count() > 10 and fits()
    page.goto((site / "features" / "index.html").as_uri() + "#latent/9999")
    assert page.get_by_text("There is no latent of this number").is_visible()
    assert not errors
    page.close()


def test_a_list_without_a_judge_tells_what_latents_are_about(site: Path, browser: Any) -> None:
    """Of the second coder: the tokens on which a latent is largest, one of them in its context; both can be searched.
    First come latents that fire often enough, and not too often."""
    folder = site.parent / "b"
    index = LatentIndex(Run.open(folder), ActivationStore.open(Run.open(folder).store_path))
    page = browser.new_page()
    page.goto((folder / "features" / "index.html").as_uri())
    heads = page.locator(".head button").all_inner_texts()
    assert heads == ["latent", "largest on", "in context", "density", "largest"]
    first = page.locator(".row").first
    latent = int(first.locator("span").first.inner_text())
    firing = index.of(latent)
    assert len(firing.value) >= 12 and len(firing.value) < 0.05 * index.tokens.size
    marked = first.locator("mark").evaluate("it => it.textContent")
    tokenizer = AutoTokenizer.from_pretrained(index.store.attrs["model"]["id"])
    largest = int(index.tokens.ravel()[firing.position[firing.value.argmax()]])
    assert marked == str(tokenizer.decode([largest])).replace("\n", "\u21b5")
    assert float(page.locator(".row").first.locator("span").last.inner_text()) == pytest.approx(
        firing.value.max(), rel=5e-3
    )
    shown = page.evaluate("table.tokens")[latent]
    page.get_by_label("search").fill(shown.upper())
    assert page.locator(f".row[href='#latent/{latent}']").count() == 1
    page.locator(f".row[href='#latent/{latent}']").click()
    page.wait_for_selector(f"text=Latent {latent}")
    assert page.get_by_text(f"largest on: {shown}").count() == 1
    where = page.locator(".context b").first.get_attribute("title")
    row, start = (int(word) for word in re.findall(r"\d+", where)[:2])
    there = [tokenizer.decode([int(token)]) for token in index.tokens[row, start : start + 8]]
    assert page.locator(".context").first.locator("span").all_text_contents() == there
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_system(site: Path, browser: Any, scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto((site / "features" / "index.html").as_uri())
    ink, paper = (
        page.evaluate(f"getComputedStyle(document.body).{name}").strip("rgb()").split(",")
        for name in ("color", "backgroundColor")
    )
    brightness = [sum(map(int, colour)) for colour in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light")
    page.close()


def test_a_hundred_thousand_latents_are_usable_at_once(browser: Any, tmp_path: Path) -> None:
    site = Path(shutil.copytree(TEMPLATE, tmp_path / "features"))
    (site / "data").mkdir()
    rng = np.random.default_rng(0)
    count = 100_000
    table = {
        "title": "large", "facts": "many", "warning": None, "chunk": 64, "others": [],
        "density": rng.random(count).round(5).tolist(),
        "explanation": [f"words about subject {i % 977} and the number {i}" for i in range(count)],
        "detection": rng.random(count).round(3).tolist(), "fuzzing": rng.random(count).round(3).tolist(),
        "tokens": [f"token{i % 1009}" for i in range(count)], "preview": [["as it", " stood", " there"]] * count,
        "largest": rng.random(count).round(4).tolist(), "order": list(range(count)), "window": [1, 32],
    }  # fmt: skip
    (site / "data" / "table.js").write_text("window.skipcoderTable = " + json.dumps(table))
    page = browser.new_page()
    begun = time.perf_counter()
    page.goto((site / "index.html").as_uri())
    page.wait_for_selector(".row")
    opened = time.perf_counter() - begun
    page.get_by_label("search").fill("subject 976 ")
    assert page.get_by_role("status").inner_text() == f"{count // 977:,} of 100,000 latents"
    page.get_by_label("search").fill("token1008")
    begun = time.perf_counter()
    assert page.get_by_role("status").inner_text() == f"{count // 1009:,} of 100,000 latents"
    print(f"searched in {time.perf_counter() - begun:.2f} s")
    page.get_by_label("search").fill("subject 976 ")
    page.get_by_role("button", name="fuzzing").click()
    assert page.locator(".row").count() < 100  # only what is in sight is in the page
    page.get_by_label("search").fill("")
    page.locator(".viewport").evaluate("it => it.scrollTop = it.scrollHeight")
    fuzzing = np.array(table["fuzzing"])
    least = int(np.flatnonzero(fuzzing == fuzzing.min())[-1])  # of equals the last
    page.wait_for_function("document.querySelector('.viewport').scrollTop > 3e6")
    page.wait_for_function(f"[...document.querySelectorAll('.row')].some(r => r.hash === '#latent/{least}')")
    print(f"usable after {opened:.2f} s")
    page.close()


def test_promoted_tokens_are_those_of_the_unembedding(lm: Any) -> None:
    """A decoder row that is a token's own unembedding, the norm's weights taken out, promotes that token."""
    gain = lm.base_model.norm.weight.float()
    unembed = lm.get_output_embeddings().weight.float()
    wanted = unembed * gain
    up, down = promoted(lm, wanted[[7, 300]])
    for row, token in zip((0, 1), (7, 300), strict=True):
        logits = unembed @ (gain * wanted[token])
        for (found, logit), best in ((up[row][0], logits.argmax()), (down[row][0], logits.argmin())):
            assert found == int(best) and logit == pytest.approx(float(logits[best]), rel=1e-4)
    assert promoted(None, wanted[:2]) == ([[], []], [[], []])


def test_latents_that_fire_together(site: Path) -> None:
    run = Run.open(site)
    index = LatentIndex(run, ActivationStore.open(run.store_path))
    fires = [set(index.of(latent).position.tolist()) for latent in range(index.width)]
    for latent, found in enumerate(firing_together(index)):
        shares = [len(fires[latent] & other) / max(1, len(fires[latent] | other)) for other in fires]
        shares[latent] = 0
        assert [share for _, share in found] == pytest.approx(sorted(shares, reverse=True)[: len(found)], abs=1e-3)
        assert all(shares[int(other)] == pytest.approx(share, abs=1e-3) for other, share in found)


def test_favourites_and_notes_are_kept_by_the_browser(site: Path, browser: Any) -> None:
    context = browser.new_context()
    page = context.new_page()
    address = (site / "features" / "index.html").as_uri()
    page.goto(address)
    page.wait_for_selector(".row")
    assert page.get_by_text("favourites and notes only").count() == 0
    page.goto(address + "#latent/3")
    page.get_by_role("button", name="favourite").click()
    page.goto(address + "#latent/4")
    page.get_by_label("note", exact=True).fill("about <b>numbers</b>")
    page.get_by_role("button", name="favourite").click()
    page.get_by_role("button", name="favourite").click()  # the note stays
    page.close()
    page = context.new_page()  # later
    page.goto(address)
    page.get_by_label("favourites and notes only (2)").check()
    assert sorted(row.split()[1] for row in page.locator(".row").all_inner_texts()) == ["3", "4"]
    page.get_by_label("search").fill("numbers</b>")
    assert page.get_by_role("status").inner_text() == "1 of 64 latents"
    with page.expect_download() as download:
        page.get_by_role("link", name="download").click()
    found = json.loads(Path(download.value.path()).read_text())
    assert found["latents"] == {"3": {"star": True, "note": ""}, "4": {"star": False, "note": "about <b>numbers</b>"}}
    page.locator(".row").click()
    page.get_by_label("note", exact=True).fill("")
    page.goto(address + "#latent/3")
    page.get_by_role("button", name="favourite").click()  # and away: nothing is kept, so nothing is left out
    page.get_by_role("link", name="Table").click()
    page.get_by_label("search").fill("")
    assert page.get_by_role("status").inner_text() == "64 of 64 latents"
    page.goto((site.parent / "b" / "features" / "index.html").as_uri())  # another coder's
    assert page.evaluate("kept.count()") == 0
    context.close()


def test_nearest_latents() -> None:
    torch.manual_seed(0)
    W = torch.randn(50, 16)
    other = 3 * W[torch.randperm(50)]
    latent, cosine = nearest_latents(W, other, 1)
    assert torch.allclose(cosine, torch.ones(50, 1)) and torch.allclose(other[latent[:, 0]], 3 * W)
    own, _ = nearest_latents(W, W, 3, same=True)
    assert not (own == torch.arange(50)[:, None]).any()
