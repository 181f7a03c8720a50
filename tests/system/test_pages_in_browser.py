"""How a browser shows the pages of studies: on a phone, in the dark, without a script, without a network."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.study.page import algorithmic as algorithmic_page
from pretrain.study.page import vision as vision_page
from pretrain.study.page.language import page
from tests.support.study_fixture import HEADS, study_results

pytestmark = pytest.mark.hosts


def published(name: str) -> dict[str, Any]:
    return json.loads(Path(f"benchmarks/results/study-{name}.json").read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install playwright")
    found = os.environ.get("CHROME") or shutil.which("chromium")
    if not found:
        pytest.skip("no Chromium: install chromium, or set CHROME to the path of one")
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visits:
    """Tabs that show the page, and what they said on the console or requested."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser, self.url = browser, url
        self.troubles: list[str] = []
        self.requests: set[str] = set()

    def open(self, **options: Any) -> Any:
        tab = self.browser.new_context(**options).new_page()
        tab.on("console", lambda message: self.troubles.append(message.text))
        tab.on("pageerror", lambda error: self.troubles.append(str(error)))
        tab.on("request", lambda request: self.requests.add(request.url))
        tab.goto(self.url)
        return tab


@pytest.fixture(scope="module")
def pages(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Visits]:
    folder = tmp_path_factory.mktemp("pages")
    found = {}
    made = {
        "language": page(study_results()),
        "algorithmic": algorithmic_page.page(published("algorithmic")),
        "vision": vision_page.page(published("vision")),
    }
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html)
        found[name] = Visits(browser, (folder / f"{name}.html").as_uri())
    return found


@pytest.fixture(scope="module")
def visits(pages: dict[str, Visits]) -> Visits:
    return pages["language"]


@pytest.fixture(scope="module")
def tabs(pages: dict[str, Visits]) -> dict[str, Any]:
    return {name: visits.open() for name, visits in pages.items()}


def reset(tab: Any) -> Any:
    """At 1280 pixels, light, with nothing pointed at."""
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.emulate_media(color_scheme="light")
    tab.mouse.move(2, 2)
    return tab


@pytest.fixture
def tab(tabs: dict[str, Any]) -> Any:
    return reset(tabs["language"])


@pytest.fixture(params=["language", "algorithmic", "vision"])
def any_tab(request: pytest.FixtureRequest, tabs: dict[str, Any]) -> Any:
    """Of each page in turn."""
    return reset(tabs[request.param])


def at_width(tab: Any, width: int) -> Any:
    tab.set_viewport_size({"width": width, "height": 800})
    return tab


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_the_document_does_not_scroll_sideways(any_tab: Any, width: int) -> None:
    assert at_width(any_tab, width).evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_text_in_plots_is_legible_and_within_its_plot(any_tab: Any, width: int) -> None:
    small, outside = at_width(any_tab, width).evaluate(
        """() => {
          const small = [], outside = [];
          for (const svg of document.querySelectorAll('svg')) {
            const box = svg.getBoundingClientRect(), scale = svg.getScreenCTM().a;
            for (const text of svg.querySelectorAll('text')) {
              const size = parseFloat(getComputedStyle(text).fontSize) * scale, at = text.getBoundingClientRect();
              if (size < 10.8) small.push([text.textContent, size]);
              if (at.left < box.left - 3 || at.right > box.right + 3 || at.bottom > box.bottom + 3)
                outside.push([svg.getAttribute('aria-label'), text.textContent]);
            }
          }
          return [small, outside];
        }"""
    )
    assert not small and not outside


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_texts_of_a_plot_do_not_overlap(any_tab: Any, width: int) -> None:
    found = at_width(any_tab, width).evaluate(
        """() => [...document.querySelectorAll('svg')].flatMap(svg => {
          const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
          const found = [];
          boxes.forEach(([a, p], i) => boxes.slice(i + 1).forEach(([b, q]) => {
            if (p.left < q.right - 2 && q.left < p.right - 2 && p.top < q.bottom - 4 && q.top < p.bottom - 4)
              found.push([svg.getAttribute('aria-label'), a, b]);
          }));
          return found;
        })"""
    )
    assert not found


POINT = """async ([label, place]) => {
  const svg = document.querySelector(`svg[aria-label^="${label}"]`);
  svg.scrollIntoView({block: 'center', behavior: 'instant'});
  for (let k = 0; k < 3; k++) await new Promise(requestAnimationFrame);  // a scroll hides a tip
  const group = svg.querySelector('[data-tips]'), [x, y, told] = JSON.parse(group.dataset.tips)[place];
  const at = svg.getScreenCTM();
  return [at.e + x * at.a, at.f + y * at.a, told];
}"""


@pytest.mark.parametrize("label", ["Validation loss in bits/byte against tokens", "euclidean: 30", "euclidean: time"])
def test_a_tip_shows_on_hover_and_leaves(tab: Any, label: str) -> None:
    x, y, told = tab.evaluate(POINT, [label, 0])
    tab.mouse.move(x, y)
    tip = tab.locator("#tip")
    assert tip.is_visible() and tip.locator("span").text_content()
    if label.startswith("euclidean"):
        assert tip.locator("b").text_content() == "euclidean"
    if label == "euclidean: time":
        assert tip.locator("span").text_content() == told
    tab.mouse.move(2, 2)
    assert tip.is_hidden()


def test_a_tip_shows_on_tap(visits: Visits) -> None:
    tab = visits.open(viewport={"width": 360, "height": 800}, has_touch=True, is_mobile=True)
    x, y, _ = tab.evaluate(POINT, ["euclidean: 30", 4])
    tab.touchscreen.tap(x, y)
    assert tab.locator("#tip").is_visible() and "in training" in tab.locator("#tip").inner_text()
    box = tab.locator("#tip").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_unticking_a_head_hides_it_from_every_plot_but_not_from_the_table(tab: Any) -> None:
    shows = "[...document.querySelectorAll('[data-k=\"1\"]')].filter(e => e.getClientRects().length).length"
    assert tab.evaluate(shows) > 8
    tab.locator("label:has(#show-1)").click()
    assert tab.evaluate(shows) == 0
    assert tab.locator("#results .scroll tbody tr").count() == len(HEADS)
    assert tab.locator('[data-k="2"]').first.is_visible()
    tab.get_by_role("button", name="none").click()
    assert tab.evaluate("[...document.querySelectorAll('[data-k]')].every(e => !e.getClientRects().length)")
    tab.get_by_role("button", name="all").click()
    assert tab.evaluate(shows) > 8


def test_a_head_that_is_hidden_has_no_tips(tab: Any) -> None:
    tab.locator("label:has(#show-0)").click()
    x, y, _ = tab.evaluate(POINT, ["Difference", 0])
    tab.mouse.move(x, y)
    assert tab.locator("#tip b").text_content() == "euclidean"
    tab.locator("label:has(#show-1)").click()
    x, y, _ = tab.evaluate(POINT, ["Difference", 0])
    tab.mouse.move(2, 2)
    tab.mouse.move(x, y)
    assert tab.locator("#tip").is_hidden() or tab.locator("#tip b").text_content() != "euclidean"
    tab.get_by_role("button", name="all").click()


def test_heads_can_be_chosen_without_javascript(visits: Visits) -> None:
    tab = visits.open(java_script_enabled=False)
    assert tab.get_by_text("How it was done").is_visible() and tab.locator("svg").first.is_visible()
    figure = tab.locator('figure[data-k="1"]').first
    assert figure.is_visible()
    tab.locator("label:has(#show-1)").click()
    assert figure.is_hidden()


CONTRAST = """() => {
  const parse = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const light = c => c.slice(0, 3).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] === 1) return c;
    }
  };
  const found = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,li,a,dt,dd,small,th,td,.tag,figcaption,label,code,svg text')) {
    if (!e.textContent.trim() || !e.getClientRects().length || e.closest('.toggles')) continue;
    const style = getComputedStyle(e), text = parse(e.closest('svg') ? style.fill : style.color);
    const [a, b] = [light(text), light(behind(e))].sort((p, q) => q - p);
    found.push([(a + .05) / (b + .05), e.tagName, e.textContent.slice(0, 20)]);
  }
  return [found.length, found.filter(one => one[0] < 4.5)];
}"""


def test_text_has_contrast_in_light_and_dark(any_tab: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        any_tab.emulate_media(color_scheme=scheme)
        count, weak = any_tab.evaluate(CONTRAST)
        assert count > 300 and not weak
        ground = any_tab.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
    assert grounds[0] > 220 and grounds[1] < 40


def test_a_tip_of_the_algorithmic_page_tells_the_share_and_the_epochs(tabs: dict[str, Any]) -> None:
    tab = reset(tabs["algorithmic"])
    x, y, told = tab.evaluate(POINT, ["Modular addition, mlp: epochs", 0])
    tab.mouse.move(x, y)
    assert tab.locator("#tip span").text_content() == told
    assert re.fullmatch(r"[\d,]+ epochs, (30|45|60)% of the examples|\d of 3 seeds never.*", told)


def test_the_browser_complains_of_nothing_and_requests_nothing_else(
    pages: dict[str, Visits], tabs: dict[str, Any]
) -> None:
    for name, visits in pages.items():
        assert tabs[name].locator("svg").count() > 15
        assert not visits.troubles and visits.requests == {visits.url}
