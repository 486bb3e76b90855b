"""The report in a real browser: 24 runs, at desktop and phone width, light and dark."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcoder.evals.tables import report
from skipcoder.pipeline.store.reader import ActivationStore

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def page_of_24(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rows = tmp_path_factory.mktemp("report"), []
    choices = itertools.product(("sae", "transcoder"), (16, 32, 64), (512, 1024), ("topk", "batchtopk"))
    for number, (kind, k, width, activation) in enumerate(choices):
        run = folder / "train" / str(number)
        run.mkdir(parents=True)
        line: dict[str, Any] = {
            "l0": k, "grad_norm": 1.0, "dead": 0, "density": {}, "encode_mode": "float32", "recall": 1.0, "lr": 0.1,
            "seconds": 1.0, "ms": {},
        }  # fmt: skip
        lines = [json.dumps({"step": s, "tokens": 64 * s, "fvu": 9 / s, **line}) for s in (10, 20, 30)]
        (run / "metrics.jsonl").write_text("\n".join([*lines, ""]))
        fvu = 0.5 - number / 100
        rows.append({
            "run": str(run), "kind": kind, "k": k, "width": width, "activation": activation, "seed": 0,
            "side": "output", "hookpoint": "layers.1.mlp", "model": "tiny <script>", "n": 4096, "documents": 40,
            "ce_tokens": 512, "ce_documents": 40, "ce_clean": 2.0, "ce_zero": 3.0, "ce_mean": 3.1, "l0": k + 0.5,
            "fvu": fvu, "fvu_ci": [fvu - 0.02, fvu + 0.02], "ce_increase": 1 / k, "ce_increase_ci": [0, 1],
            "seconds": 3.0, "evaluation_seconds": 1.0, "configuration": f"c{number}",
            "density_histogram": {"log10_edges": np.linspace(-4, 0, 25).tolist(), "latents": list(range(24))},
        })  # fmt: skip
    (folder / "train" / "7" / "features").mkdir()
    (folder / "train" / "7" / "features" / "index.html").write_text("latents of 7")
    return report.write(rows, rows, [], [store], folder / "report.html")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_sort_filter_toggle_and_axes(page_of_24: Path, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(page_of_24.as_uri())
    page.wait_for_selector(".plot .legend")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("h1").inner_text().startswith("Sparse coders on tiny <script>")
    first = page.locator("table.runs tbody tr:visible td:first-child").first
    assert first.inner_text() == "0"
    page.locator("th", has_text="FVU").first.click()
    assert first.inner_text() == "23"  # the lowest
    page.locator("th", has_text="FVU").first.click()
    assert first.inner_text() == "0"
    page.get_by_label("Filter runs").fill("transcoder 32 batchtopk")  # 32, not 1032
    assert page.locator("table.runs tbody tr:visible").count() == 2
    page.get_by_label("Filter runs").fill("")
    # Every run has a line of its own; a click hides it, a hover names it.
    names = page.evaluate("[...document.querySelectorAll('.plot')].map(p => p.data.map(t => t.name))")
    assert [len(set(of)) for of in names] == [8, 8, 24, 24]
    plot = page.locator(".plot").first
    plot.locator(".legendtoggle").first.click()
    page.wait_for_function("document.querySelector('.plot').data[0].visible === 'legendonly'")
    log_y = page.get_by_role("button", name="log y").first
    log_y.click()
    assert page.evaluate("document.querySelector('.plot').layout.yaxis.type") == "log"
    assert log_y.get_attribute("aria-pressed") == "true"
    assert page.evaluate("document.querySelector('.plot').data[0].visible") == "legendonly"  # still
    ink = page.evaluate("document.querySelector('.plot').layout.font.color")
    assert ink == ("#1d2129" if scheme == "light" else "#e6e8ec")
    page.emulate_media(color_scheme="dark" if scheme == "light" else "light")
    page.wait_for_function(f"document.querySelector('.plot').layout.font.color !== '{ink}'")
    page.get_by_role("link", name="7: latents").click()
    assert page.get_by_text("latents of 7").is_visible()
    assert not errors
    page.close()
