"""The documentation as it is built, opened from disk."""

from typing import Any

import pytest

from tests.conftest import REPO

SITE = REPO / "build" / "site" / "index.html"


@pytest.mark.browser
@pytest.mark.skipif(not SITE.exists(), reason="make docs has not been run")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_search_and_pictures_work_from_disk(browser: Any, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 1280, "height": 850}, color_scheme=scheme)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: errors.append(request.url) if request.url.startswith("http") else None)
    page.goto(SITE.as_uri())
    page.locator("input.md-search__input").press_sequentially("absorption", delay=20)
    page.wait_for_selector(".md-search-result__item a")
    assert "matching document" in page.locator(".md-search-result__meta").inner_text()
    found = page.locator(".md-search-result__item a").first.get_attribute("href")
    page.goto(found if "://" in found else (SITE.parent / found).as_uri())
    assert "bsorption" in page.locator("article").inner_text()
    page.goto((SITE.parent / "explorer.html").as_uri())
    assert page.locator("article img").evaluate("it => it.complete && it.naturalWidth > 600")
    assert not errors
    page.close()
