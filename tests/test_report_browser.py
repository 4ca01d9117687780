"""The report in a real browser: wide, on a phone, in the dark, and on paper."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_helpers import hostile_run

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="needs playwright: make test-browser installs it"
)
CHROMIUM = os.environ.get("LTM_PYRO_CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
WIDTHS = (1280, 390)
READABLE = 4.5
"""Contrast of text to what is behind it (WCAG 2.1, level AA)."""
CONTRAST = """() => {
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const level = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0.99) return c;
    }
    return [255, 255, 255];
  };
  const worst = [];
  const all = "p, li, td, th, dt, dd, h1, h2, h3, a, code, pre, text";
  for (const e of document.querySelectorAll(all)) {
    if (!e.textContent.trim() || e.closest(".tokens")) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.tagName === "text" ? style.fill : style.color);
    const [a, b] = [level(ink), level(behind(e))].sort((x, y) => y - x);
    worst.push([(a + 0.05) / (b + 0.05), e.tagName + " " + e.textContent.trim().slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_run(tmp_path_factory.mktemp("browser")) / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as driver:
        try:
            started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"needs Chromium, which make test-browser installs: {error.message[:80]}")
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, page_file: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at the width and in the colours of the test, and what the browser complained of."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda asked: said.append(f"asked for {asked.url[:80]}")
            if not asked.url.startswith(("file:", "data:")) else None)  # fmt: skip
    page.goto(page_file.as_uri())
    yield page, said
    context.close()


BOTH = [(width, scheme) for width in WIDTHS for scheme in ("light", "dark")]
IDS = [f"{width}-{scheme}" for width, scheme in BOTH]


@pytest.mark.parametrize("opened", BOTH, ids=IDS, indirect=True)
def test_it_opens_without_a_complaint_and_fits(opened: Any) -> None:
    page, said = opened
    assert said == []
    assert "report" in page.title()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    beyond = page.evaluate(
        "[...document.querySelectorAll('main *:not(svg *)')].filter((e) =>"
        " e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert beyond == []


@pytest.mark.parametrize("opened", BOTH, ids=IDS, indirect=True)
def test_every_picture_is_drawn(opened: Any) -> None:
    page, _ = opened
    sizes = page.evaluate(
        "[...document.querySelectorAll('figure svg')].map((e) => {"
        " const box = e.getBoundingClientRect();"
        " return [box.width, box.height, e.querySelectorAll('path, use').length]; })"
    )
    assert len(sizes) >= 8
    for width, height, parts in sizes:
        assert width > 150
        assert height > 60
        assert parts > 5


@pytest.mark.parametrize("opened", BOTH, ids=IDS, indirect=True)
def test_text_can_be_read(opened: Any) -> None:
    page, _ = opened
    contrast, what = page.evaluate(CONTRAST)
    assert contrast >= READABLE, what


@pytest.mark.parametrize("opened", [(1280, "light"), (390, "light")], indirect=True)
def test_tables_are_sorted_by_a_click(opened: Any) -> None:
    page, _ = opened
    column = "[...document.querySelectorAll('#table-files tbody td:nth-child(2) data')]"
    values = f"{column}.map((e) => Number(e.value))"
    button = page.locator("#table-files th:nth-child(2) button")
    button.click()
    rising = page.evaluate(values)
    assert rising == sorted(rising)
    button.click()
    assert page.evaluate(values) == sorted(rising, reverse=True)
    for table in page.locator("table.sortable").all():
        assert table.locator("th button").count() == table.locator("th").count()


@pytest.mark.parametrize("opened", [(1280, "dark")], indirect=True)
def test_paper_is_white_and_shows_what_is_folded(opened: Any) -> None:
    page, _ = opened
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("[...document.querySelectorAll('details')].every((e) => e.open)")
