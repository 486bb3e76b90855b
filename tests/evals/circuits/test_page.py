"""A circuit's page in a browser."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcoder.evals.circuits.contexts import Shown
from skipcoder.evals.circuits.page import write_overview, write_page

pytestmark = pytest.mark.slow
HOSTILE = '</script><img src=x onerror="document.title=1">'


def test_the_page(traced: Path, browser: Any) -> None:
    """Opens from disk, shows edges of the chosen node, searches, pins, groups, and keeps them."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"file://{traced}/index.html")
    found = json.loads((traced / "circuit.json").read_text())
    assert page.locator(".node").count() == len(found["nodes"])
    assert "next token" in page.locator("#panel h2").inner_text()
    assert page.locator(".edge").count() > 0
    source = page.locator("#panel .row").first
    name = source.locator("span").inner_text()
    source.click()
    assert name.startswith(page.locator("#panel h2").inner_text())
    latent = next(i for i, node in enumerate(found["nodes"]) if node["kind"] == "latent")
    page.locator(f'.node[data-i="{latent}"]').click()
    assert (
        f"{found['nodes'][latent]['layer']}/{found['nodes'][latent]['latent']} at"
        in page.locator("#panel").inner_text()
    )
    assert page.locator("#panel .context").count() > 0
    page.locator("#graph").focus()
    before = page.locator("#panel h2").inner_text() + page.locator("#panel p").first.inner_text()
    page.keyboard.press("ArrowUp")
    assert page.locator("#panel h2").inner_text() + page.locator("#panel p").first.inner_text() != before
    page.keyboard.press("p")
    assert page.locator(".node.pinned").count() == 1
    page.keyboard.press("ArrowDown")
    page.keyboard.press("p")
    page.locator("#own input[name=member]").first.check()
    page.locator("#own input[type=text]").fill(HOSTILE)
    page.locator("#own form button").click()
    assert page.locator(".box").count() == 2 and page.locator(".box.group").count() == 1
    page.keyboard.press("/")
    page.keyboard.type("layer 1")
    page.locator("#search").fill("error of layer 1")
    assert page.locator(".node.found").count() == sum(n["kind"] == "error" and n["layer"] == 1 for n in found["nodes"])
    page.locator("#search").fill("")
    page.locator("#errors").uncheck()
    assert page.locator(".node.error").count() == 0
    page.reload()
    assert page.locator(".node.pinned").count() == 2 and page.locator(".box.group").count() == 1
    with page.expect_download() as download:
        page.locator("#export").click()
    kept = json.loads(Path(download.value.path()).read_text())["qParams"]
    form = json.loads((traced / "circuit_tracer.json").read_text())
    assert set(kept["pinnedIds"]) <= {node["node_id"] for node in form["nodes"]}
    assert len(kept["pinnedIds"]) == 2 and kept["supernodes"][0][0] == HOSTILE.strip()[:80]
    page.evaluate('localStorage.setItem(localStorage.key(0), \'{"pinned":5,"groups":[{}]}\')')
    page.reload()
    assert page.locator(".node.pinned").count() == 0 and page.locator("#panel h2").count() == 1
    assert not errors and all(url.startswith(("file:", "blob:")) for url in asked)
    assert page.title().startswith("Circuit: ")
    phone = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
    phone.goto(f"file://{traced}/index.html")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 390
    assert phone.locator("#panel").bounding_box()["y"] > phone.locator("#graph").bounding_box()["y"]


def test_the_overview_of_several(tmp_path: Path, browser: Any) -> None:
    edge = {"source": f"token {HOSTILE!r}", "target": "latent 3/5", "circuits": 2, "weight": -0.25}
    found = {"prompts": [HOSTILE, "b"], "edges": [edge], "nodes": [{"node": "latent 3/5", "circuits": 2}]}
    write_overview(tmp_path / "index.html", found, {"latent 3/5": HOSTILE})
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/index.html")
    assert page.locator("img").count() == 0 and page.locator("li").count() == 2
    assert page.locator("td").all_inner_texts()[1:4] == [f"latent 3/5 {HOSTILE}", "2", "-25.0%"]
    assert page.locator("a").first.get_attribute("href") == "0/index.html" and page.title() == "Circuits"


def test_hostile_text_is_text(traced: Path, tmp_path: Path, browser: Any) -> None:
    found = json.loads((traced / "circuit.json").read_text())
    found["tokens"] = [HOSTILE for _ in found["tokens"]]
    found["prompt"] = HOSTILE
    write_page(tmp_path / "index.html", found, {}, {}, lambda token: HOSTILE)
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/index.html")
    assert page.locator("img").count() == 0 and HOSTILE in page.locator("h1").inner_text()
    assert page.title() == f"Circuit: {HOSTILE}" and page.locator(".node").count() == len(found["nodes"])


def large() -> Any:
    """A circuit of 3,000 latents in 30 layers at 20 positions, and 150,000 edges."""

    def node(i: int) -> dict[str, Any]:
        layer, position = i % 30, i % 20
        return {
            "id": f"{layer}_{i}_{position}", "kind": "latent", "layer": layer, "position": position, "latent": i,
            "token": None, "value": 1.0, "constant": 0.1, "probability": None, "influence": i / 3000,
        }  # fmt: skip

    nodes = [node(i) for i in range(3000)]
    nodes.append(node(3029) | {"kind": "logit", "layer": 30, "token": 1, "latent": None, "probability": 0.5})
    pairs = torch.randint(0, 3000, (300_000, 2), generator=torch.Generator().manual_seed(0)).tolist()
    edges = [(a, b, 0.5) for a, b in pairs if a % 30 < b % 30] + [(i, 3000, 1.0) for i in range(99)]
    layers = [{"hookpoint": f"layers.{i}.mlp", "number": i, "width": 3000, "run": None} for i in range(30)]
    return {
        "format": "", "version": 1, "prompt": "large", "tokens": ["w"] * 20, "ids": [1] * 20, "left_out": [],
        "model": "m", "layers": layers, "nodes": nodes, "edges": edges, "replacement": 0.5, "completeness": 0.5,
        "active": 3000, "visited": 3000, "departure": 0.0, "thresholds": (0.8, 0.98),
    }  # fmt: skip


def test_a_latent_s_explanation_and_its_page(traced: Path, tmp_path: Path, browser: Any) -> None:
    found = json.loads((traced / "circuit.json").read_text())
    place, node = next((i, n) for i, n in enumerate(found["nodes"]) if n["kind"] == "latent")
    shown: Shown = {"contexts": [], "tokens": [], "explanation": "fires on tests", "up": [], "down": []}
    latents = {f"{node['layer']}_{node['latent']}": shown}
    write_page(tmp_path / "index.html", found, latents, {node["layer"]: "../there/index.html"}, str)
    page = browser.new_page()
    page.goto(f"file://{tmp_path}/index.html")
    page.locator(f'.node[data-i="{place}"]').click()
    assert page.locator("#panel h2").inner_text() == "fires on tests"
    assert page.locator("#panel a").get_attribute("href") == f"../there/index.html#latent/{node['latent']}"
    page.locator("#search").fill("fires on t")
    assert page.locator(".node.found").count() == sum(
        n["kind"] == "latent" and (n["layer"], n["latent"]) == (node["layer"], node["latent"]) for n in found["nodes"]
    )


def test_three_thousand_nodes(tmp_path: Path, browser: Any) -> None:
    """How fast is measured in benchmarks/circuits.py."""
    write_page(tmp_path / "index.html", large(), {}, {}, str)
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"file://{tmp_path}/index.html")
    assert page.locator(".node").count() == 3001
    page.locator('.node[data-i="2999"]').click()
    assert page.locator(".edge").count() > 10
