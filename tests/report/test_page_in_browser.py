"""The report's page driven by a real browser: tabs, hover, keys, themes, a narrow screen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eevp_batch.report.figures import JobFigures
from eevp_batch.report.page import render_page
from tests.report.browser import Browser
from tests.report.outputs import EVIL, TEXT

pytestmark = pytest.mark.browser

TABS = ("overview", "exits", "quality", "replicas", "rows", "samples", "job")
GROUND = "getComputedStyle(document.body).backgroundColor"
LIGHT, DARK = "rgb(246, 247, 249)", "rgb(15, 20, 26)"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, evil_figures: JobFigures) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_page(evil_figures, 0.0), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with contextlib.closing(Browser(tmp_path_factory.mktemp("browser"))) as browser:
        yield browser


@pytest.fixture
def browser(running: Browser, path: Path) -> Iterator[Browser]:
    """The page just opened; after the test, nothing went wrong and nothing was asked for."""
    running.open(path)
    yield running
    assert running.errors == []
    assert set(running.requests) == {path.as_uri()}, "the page and nothing else"
    assert running.evaluate("document.title") == "test: eevp-batch report", "no text ran"


def shown(browser: Browser) -> Any:
    panels = "[...document.querySelectorAll('.panel')].filter(p => p.offsetHeight > 0)"
    return browser.evaluate(f"{panels}.map(p => p.id)")


def text_of(browser: Browser, selector: str) -> Any:
    return browser.evaluate(f"document.querySelector('{selector}').textContent")


def click(browser: Browser, selector: str) -> None:
    browser.evaluate(f"document.querySelector('{selector}').click()")


def test_tabs_show_one_part_at_a_time(browser: Browser) -> None:
    assert shown(browser) == ["overview"]
    for tab in TABS:
        click(browser, f"#tab-{tab}")
        assert shown(browser) == [tab]
        assert browser.evaluate("location.hash") == f"#{tab}", "the address leads back here"


def test_tabs_are_walked_with_the_keyboard(browser: Browser) -> None:
    browser.evaluate("document.querySelector('#tab-overview').focus()")
    for key, tab in [("ArrowRight", "exits"), ("ArrowRight", "quality"), ("ArrowLeft", "exits")]:
        browser.press(key)
        assert shown(browser) == [tab]
        assert browser.evaluate("document.activeElement.id") == f"tab-{tab}"
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert shown(browser) == ["job"], "from the first to the last"


def test_everything_that_can_be_focused_shows_that_it_is(browser: Browser) -> None:
    seen = set()
    for _ in range(5):
        browser.press("Tab")
        seen.add(browser.evaluate("document.activeElement.id || document.activeElement.tagName"))
        outline = browser.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid"
    assert {"theme", "tab-overview", "SUMMARY"} <= seen


def test_pointing_at_a_token_tells_its_layer_and_confidence(browser: Browser) -> None:
    click(browser, "#tab-samples")
    assert text_of(browser, "#sample-text") == TEXT + "<|endoftext|>"
    browser.point("#sample-text span:nth-child(2)")
    browser.wait_for("!document.querySelector('#tip').hidden")
    assert text_of(browser, "#tip") == "left after layer 4, confidence 0.8000"
    box = browser.evaluate("(r => [r.left, r.right])(tip.getBoundingClientRect())")
    assert 0 <= box[0] < box[1] <= 1200
    browser.press("Escape")
    assert browser.evaluate("document.querySelector('#tip').hidden")


def test_tokens_are_walked_with_the_keyboard(browser: Browser) -> None:
    click(browser, "#tab-samples")
    browser.evaluate("document.querySelector('#sample-text').focus()")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    facts = text_of(browser, "#token-facts")
    assert facts.startswith("Token 2 of ") and "layer 4, confidence 0.8000" in facts


def test_samples_are_leafed_through(browser: Browser) -> None:
    click(browser, "#tab-samples")
    titles = browser.evaluate("[...document.querySelectorAll('#pick option')].map(o => o.text)")
    assert len(titles) == 20 and len(set(titles)) == 20
    assert text_of(browser, "#sample-prompt").startswith(EVIL)
    click(browser, "#previous")
    assert browser.evaluate("document.querySelector('#pick').selectedIndex") == 19
    click(browser, "#next")
    assert browser.evaluate("document.querySelector('#pick').selectedIndex") == 0


def test_tokens_have_the_colour_of_their_layer(browser: Browser) -> None:
    click(browser, "#tab-samples")
    colour = "getComputedStyle(document.querySelectorAll('#sample-text span')[{}]).backgroundColor"
    first = [browser.evaluate(colour.format(place)) for place in range(6)]
    assert len(set(first)) == 3 and first[:3] == first[3:]


def test_pointing_at_a_column_of_a_chart_tells_its_numbers(browser: Browser) -> None:
    click(browser, "#tab-exits")
    browser.point("#exits svg rect")
    browser.wait_for("!document.querySelector('#tip').hidden")
    assert text_of(browser, "#tip") == "0-3: 50.0 % layer 2, of 80 tokens"


def test_the_theme_follows_the_system_and_the_button(browser: Browser, path: Path) -> None:
    assert browser.evaluate(GROUND) == LIGHT
    click(browser, "#theme")
    assert browser.evaluate(GROUND) == DARK
    browser.open(path, dark=True)
    assert browser.evaluate(GROUND) == DARK
    assert browser.evaluate("theme.getAttribute('aria-pressed')") == "true"
    click(browser, "#theme")
    assert browser.evaluate(GROUND) == LIGHT


CONTRAST = """
(() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgb = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (c) => {
    const [r, g, b] = c.map((v) => v / 255)
      .map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const poor = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.offsetHeight || !e.checkVisibility()) continue;
    const grounds = [];
    for (let at = e; at; at = at.parentElement) {
      grounds.unshift(getComputedStyle(at).backgroundColor);
    }
    const a = light(rgb(grounds)), b = light(rgb([...grounds, getComputedStyle(e).color]));
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) poor.push([e.tagName, e.className, e.textContent.slice(0, 20), ratio]);
  }
  return poor;
})()
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(browser: Browser, path: Path, dark: bool) -> None:
    browser.open(path, dark=dark)
    for tab in TABS:
        click(browser, f"#tab-{tab}")
        assert browser.evaluate(CONTRAST) == [], f"{tab}: a contrast below 4.5 (WCAG 2, AA)"


OVERLAPS = """
[...document.querySelectorAll('.x-axis, .y-axis, .lane-ticks')].flatMap((axis) => {
  const boxes = [...axis.children].map((e) => e.getBoundingClientRect()).filter((b) => b.width);
  return boxes.filter((a, k) => boxes.some((b, m) => m > k
    && a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)).length;
}).filter((count) => count)
"""


@pytest.mark.parametrize("width", [320, 390, 768, 1600])
def test_no_width_cuts_the_page_or_makes_labels_overlap(
    browser: Browser, path: Path, width: int
) -> None:
    browser.open(path, width=width)
    for tab in TABS:
        click(browser, f"#tab-{tab}")
        wide = browser.evaluate("document.documentElement.scrollWidth")
        assert wide <= width, f"{tab} is wider than the screen"
        assert browser.evaluate(OVERLAPS) == [], f"{tab}: labels of an axis overlap"
        places = (
            "(r => [r.left, r.right])(document.querySelector('#tab-{}').getBoundingClientRect())"
        )
        left, right = browser.evaluate(places.format(tab))
        assert left >= -1 and right <= width + 1, f"the tab {tab} is in view"
