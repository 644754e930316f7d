"""The report in a real Chromium: it renders, filters work, the console stays empty."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_samples import report

from pipeline.report.html import write_html

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)"),
    pytest.mark.filterwarnings("default"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture
def page(browser: Any, tmp_path: Path) -> Iterator[Any]:
    """The sample report, open; fails if anything was said on the console or asked of a network."""
    write_html(report(), tmp_path / "report.html")
    made = browser.new_page(viewport={"width": 1200, "height": 900})
    said: list[str] = []
    made.on("console", lambda message: said.append(message.text))
    made.on("pageerror", lambda error: said.append(str(error)))
    made.on("request", lambda request: None if request.url.startswith("file:") else said.append(request.url))
    made.goto((tmp_path / "report.html").as_uri())
    yield made
    made.close()
    assert said == []


def test_the_verdict_comes_first_and_every_section_is_there(page: Any) -> None:
    assert page.locator("header .badge").inner_text().startswith("verdict:")
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).is_visible()
    box = page.locator("header").bounding_box()
    assert box is not None
    assert box["y"] < 100
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing sticks out


def test_the_filter_keeps_what_was_asked_for(page: Any) -> None:
    rows = page.locator("#plan-table tbody tr")
    every = rows.count()
    page.locator("#f-plan-table").fill("ffn_up int8")
    shown = [row for row in rows.all() if row.is_visible()]
    assert 0 < len(shown) < every
    assert all("ffn_up" in row.inner_text() and "int8" in row.inner_text() for row in shown)
    assert page.locator('[data-count="plan-table"]').inner_text() == f"{len(shown)} of {every} rows"
    page.locator("#f-plan-table").press("Escape")
    assert all(row.is_visible() for row in rows.all())


def test_histograms_and_the_picture_by_block_have_a_size(page: Any) -> None:
    pictures = page.locator("svg.histogram")
    assert pictures.count() == 5  # one of the six tensors has none, and says so
    assert page.get_by_text("no histogram").count() == 1
    box = pictures.first.bounding_box()
    assert box is not None
    assert (box["width"], box["height"]) == (240, 44)
    kept = pictures.first.locator(".kept").bounding_box()
    assert kept is not None
    assert 0 < kept["width"] < 240
    cells = page.locator(".blocks td i")
    assert cells.count() > 4
    assert {c for cell in cells.all() for c in (cell.get_attribute("class") or "").split()} <= {
        "int8", "fp16", "fp32", "mixed", "fp8", "int4", "fp4", "bf16",
    }  # fmt: skip


def test_kernels_are_a_table_that_opens_by_keyboard(page: Any) -> None:
    summary = page.get_by_text("Every kernel (3)")
    assert not page.get_by_text("__myl_gemm_1").is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert page.get_by_text("__myl_gemm_1").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    ratio = page.evaluate(
        """() => {
          const luminance = (color) => {
            const [r, g, b] = color.match(/[0-9.]+/g).map(Number).map((v) => {
              v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
            return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
          const style = getComputedStyle(document.body);
          const [a, b] = [luminance(style.color), luminance(style.backgroundColor)].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05); }"""
    )
    assert ratio > 7
