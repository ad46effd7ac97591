"""The report in a real browser: drawn, sorted, dark and narrow, without a request or an error."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import results_made
from cli_runner import golf_ray
from results_made import make_sweep

BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome")
     if (found := shutil.which(name))), None,
)  # fmt: skip
pytestmark = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    made = make_sweep(folder / "store", "nightly", num_trials=48)
    out = folder / "report.html"
    assert golf_ray("report", made.folder, "--out", out).status == 0
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        yield found
        found.close()


PICTURES = "figure:not(:has(p.nothing))"


def said_of(page: Any, report: Path) -> list[str]:
    """What the console is told until all of a report's pictures are drawn."""
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(report.as_uri())
    page.wait_for_function(
        "n => document.querySelectorAll('figure svg.marks, figure canvas.marks').length >= n",
        arg=page.locator(PICTURES).count(), timeout=20_000,
    )  # fmt: skip
    return said


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_it_is_drawn_without_a_request_or_an_error(
    browser: Any, page_file: Path, width: int, theme: str
) -> None:
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=theme)
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    said = said_of(page, page_file)
    assert page.locator("figure").count() == page.locator(PICTURES).count() >= 6
    assert said == [] and asked == [page_file.as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    shade = sum(map(int, background.removeprefix("rgb(").rstrip(")").split(",")))
    assert (shade > 600) == (theme == "light")
    context.close()


def test_of_a_sweep_without_a_best_nothing_is_complained_of(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results_made, "_status", lambda i, count: "over_limit")
    made = make_sweep(tmp_path / "store", "large", num_trials=12, num_finals=0)
    out = tmp_path / "report.html"
    assert golf_ray("report", made.folder, "--out", out).status == 0
    page = browser.new_page()
    assert said_of(page, out) == []
    assert page.locator(PICTURES).count() >= 4
    page.close()


def test_the_table_sorts_by_mouse_and_by_keyboard(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.goto(page_file.as_uri())
    head = page.locator("th", has=page.locator("button", has_text="int6")).first
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    place = head.evaluate("e => [...e.parentElement.children].indexOf(e)")

    def values() -> list[float]:
        cells = page.locator(f"tbody tr:visible > :nth-child({place + 1})").all_text_contents()
        return [float(cell) for cell in cells if cell.strip()]

    assert len(values()) > 20 and values() == sorted(values())
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(values(), reverse=True)
    page.close()


def test_the_theme_can_be_changed(browser: Any, page_file: Path) -> None:
    page = browser.new_context(color_scheme="light").new_page()
    page.goto(page_file.as_uri())
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="theme").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
