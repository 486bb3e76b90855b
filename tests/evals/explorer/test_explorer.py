"""The explorer: what it says of a text is what the model and the coder do; its page in a browser; who is refused."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.testclient import TestClient

import skipcoder
from skipcoder.errors import UserError
from skipcoder.evals.config import ExamplesConfig, ExploreConfig
from skipcoder.evals.explorer.explorer import LONGEST, Asked, Edit, Explorer
from skipcoder.evals.explorer.server import app
from skipcoder.evals.features.pages import write_pages
from skipcoder.evals.latents.examples import ExampleMaker
from skipcoder.evals.latents.index import LatentIndex
from skipcoder.pipeline.store.reader import ActivationStore
from skipcoder.trainer.bank import bank as training
from skipcoder.trainer.config import Kind
from skipcoder.trainer.run.run import Run
from tests.trainer.run.test_run import config

pytestmark = pytest.mark.browser

TEXT = "The store of activations <b>is</b> read"


@pytest.fixture(scope="module")
def explorer(store: ActivationStore, tmp_path_factory: pytest.TempPathFactory) -> Explorer:
    """Of a run with pages."""
    folder = tmp_path_factory.mktemp("explored") / "run"
    training.train(config(store, Kind.skip_transcoder), folder)
    run = Run.open(folder)
    index = LatentIndex(run, store)
    index.build("cpu")
    maker = ExampleMaker(index, ExamplesConfig(window=8, train=4, test=5))
    write_pages(index, maker, store.load_tokenizer(), None)
    return Explorer(run, store, "cpu")


@torch.no_grad()
def test_latents_are_those_of_the_stored_activations(explorer: Explorer) -> None:
    found = explorer.annotate(TEXT)
    ids = torch.tensor([[0, *explorer.tokenizer(TEXT, add_special_tokens=False)["input_ids"]]])
    assert "".join(found["tokens"][1:]) == TEXT and found["fires"][0] == []  # the first was left out in training
    read: list[torch.Tensor] = []
    mlp = explorer.model.base_model.get_submodule(explorer.hookpoint)
    handle = mlp.register_forward_hook(lambda _, args, out: read.append(args[0]))
    explorer.model(ids)
    handle.remove()
    out = explorer.coder(read[0][0].float())
    for position, fires in enumerate(found["fires"][1:], 1):
        active = out.values[position] > 0
        expected = dict(zip(out.indices[position][active].tolist(), out.values[position][active].tolist(), strict=True))
        assert dict(fires) == pytest.approx(expected, abs=1e-4)
        assert [value for _, value in fires] == sorted((value for _, value in fires), reverse=True)
    everywhere = {latent for fires in found["fires"] for latent, _ in fires}
    assert {entry["latent"] for entry in found["latents"]} == everywhere == set(map(int, found["labels"]))
    assert any(found["labels"].values())  # the tokens on which they are largest


@torch.no_grad()
def test_edits_are_those_of_splice(explorer: Explorer) -> None:
    latent = int(explorer.annotate(TEXT)["latents"][0]["latent"])
    ids = explorer._ids(TEXT)
    plain = explorer.model(ids).logits[0, -1].float().softmax(-1)
    special = explorer.special
    for edit, do in (
        (Edit(latent=latent, how="ablate"), lambda one: one.ablate(latent)),
        (Edit(latent=latent, how="add", amount=50), lambda one: one.add(latent, 50)),
        (Edit(latent=latent, how="scale", amount=-3), lambda one: one.scale(latent, -3)),
        (Edit(latent=latent, how="set", amount=7), lambda one: one.set(latent, 7)),
    ):
        for replaced in (False, True):
            found = explorer.continued(Asked(text=TEXT, edits=[edit], new_tokens=4, replaced=replaced))
            with skipcoder.splice(
                explorer.model, {explorer.hookpoint: explorer.coder}, keep_error=not replaced, special_tokens=special
            ) as spliced:
                do(spliced[explorer.hookpoint])
                edited = explorer.model(ids).logits[0, -1].float().softmax(-1)
            for name, chances in (("plain", plain), ("edited", edited)):
                shown = [chance for _, chance in found[name]["next"]]
                assert shown == pytest.approx(chances.topk(8).values.tolist(), abs=2e-3)  # a cache rounds otherwise
            assert (edited - plain).abs().max() > 1e-5


def test_differences_are_of_the_largest_activations(explorer: Explorer) -> None:
    other = TEXT + " again and again"
    found = explorer.difference(TEXT, other)["latents"]
    for text, key in ((TEXT, "here"), (other, "there")):
        largest = {i: 0.0 for i in range(64)}
        for pairs in explorer.annotate(text)["fires"]:
            largest |= {i: max(value, largest[i]) for i, value in pairs}
        assert all(entry[key] == largest[entry["latent"]] for entry in found)
        assert len(found) >= sum(value > 0 for value in largest.values())
    assert all(entry["here"] == entry["there"] for entry in explorer.difference(TEXT, TEXT)["latents"])


def test_who_and_what_is_refused(explorer: Explorer) -> None:
    client = TestClient(app(explorer), base_url="http://127.0.0.1:8765")
    own = {"origin": "http://127.0.0.1:8765"}

    def post(content: dict[str, Any], name: str = "annotate", **headers: str) -> tuple[int, str]:
        answer = client.post(f"/{name}", json=content, headers=own | headers)
        return answer.status_code, answer.json().get("error", "")

    assert post({"text": TEXT})[0] == 200
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.post("/annotate", json={"text": TEXT}).status_code == 403  # no origin: not the page
    for origin in ("http://evil.example", "http://127.0.0.1:9999", "null"):
        assert post({"text": TEXT}, origin=origin)[0] == 403
    for content, name, said in (
        ({"text": ""}, "annotate", "too short"),
        ({"text": "a " * 4 * LONGEST}, "annotate", "at most 1,024"),
        ({}, "annotate", "text: Field required"),
        ({"text": TEXT, "new_tokens": 10_000}, "continue", "new_tokens: Input should be less than"),
        ({"text": TEXT, "edits": [{"latent": 64, "how": "ablate"}]}, "continue", "has latents 0 to 63"),
        ({"text": TEXT, "edits": [{"latent": 1, "how": "explode"}]}, "continue", "edits.0.how: Input should be"),
    ):
        code, message = post(content, name)
        assert code == 422 and said in message
    assert post({"text": TEXT}, "annotate")[0] == 200  # and no edit was left in the model
    for path in ("/features/index.html", "/features/data/table.js", "/about"):  # no other page may load them
        answer = client.get(path)
        assert answer.status_code == 200 and answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    with pytest.raises(UserError, match="port=70000"):
        ExploreConfig(run="r", port=70000)


@pytest.fixture(scope="module")
def address(explorer: Explorer) -> Iterator[str]:
    uv = uvicorn.Config(app(explorer), host="127.0.0.1", port=0, log_level="warning")
    listening = uv.bind_socket()
    server = uvicorn.Server(uv)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_type_ablate_steer_and_compare(explorer: Explorer, address: str, browser: Any, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 850}, color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_label("text", exact=True).fill(TEXT)
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector(".row")
    assert page.locator("#tokens").inner_text().endswith(TEXT) and page.locator("#tokens b").count() == 0
    page.locator("#tokens span").nth(3).click()
    assert "Latents on" in page.locator("#listed").inner_text()
    latent = page.locator(".row a").first.inner_text()
    page.locator(".row button").first.click()
    page.get_by_role("button", name="Continue").click()
    page.wait_for_selector(".both")
    plain = page.locator(".both .card").first.inner_text()
    page.get_by_label("what to do").select_option("add")
    page.get_by_label("amount").fill("80")
    page.get_by_label("amount").press("Tab")
    page.get_by_role("button", name="Continue").click()
    page.wait_for_function("document.getElementById('status').textContent.endsWith(' s')")
    assert page.locator(".both .card").first.inner_text() == plain
    assert page.locator(".both .card").nth(1).inner_text() != plain
    page.get_by_label("other text").fill("Another text entirely")
    page.get_by_role("button", name="Which latents differ?").click()
    page.wait_for_selector("text=Latents by difference")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # The address holds text and edits; latents lead to their pages.
    again = browser.new_page()
    again.goto(page.url)
    again.wait_for_selector(".edit")
    assert again.locator(".edit b").inner_text() == latent and again.get_by_label("amount").input_value() == "80"
    again.close()
    page.get_by_role("button", name="Read").click()
    page.wait_for_selector("text=Latents of this text")
    page.locator(".row a").first.click()
    page.wait_for_selector("h2:has-text('Latent ')")
    assert not errors
    page.close()


def test_typed(tmp_path: Path, explorer: Explorer, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The program serves until it is interrupted, and says where."""
    from skipcoder.evals import explore

    served: list[Any] = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.extend(sockets))
    explore.explore(ExploreConfig(run=str(explorer.run.path), port=0))
    with pytest.raises(UserError, match="port=0 takes any that is free"):
        explore.explore(ExploreConfig(run=str(explorer.run.path), port=served[0].getsockname()[1]))
    (socket,) = served
    assert f"open http://127.0.0.1:{socket.getsockname()[1]} " in capsys.readouterr().out
    assert socket.getsockname()[0] == "127.0.0.1"
    socket.close()
