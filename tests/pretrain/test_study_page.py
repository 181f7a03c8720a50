"""The page of a study: what it says, that it requests nothing, and how a browser shows it."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.study.charts import (
    Axis,
    Outline,
    Point,
    Series,
    intervals,
    line_chart,
    log_ticks,
    radar,
    scatter,
    short,
    spread,
    ticks,
)
from pretrain.study.page import page, shown, verdict
from tests.pretrain.study_fixture import DIVERGED, HEADS, HOSTILE, study_results

VOID = {"meta", "br", "input", "img", "hr", "link"}


class Tree(HTMLParser):
    """Checks that tags nest, and keeps what tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(attrs) == len(dict(attrs)), f"an attribute twice in {tag}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> in {self.open}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f" {data.strip()}"

    def row(self, head: str) -> str:
        """The main table's row of a head, as text."""
        found = [row for row in self.rows if len(row) > 5 and row[0].split()[:1] == [head]]
        assert len(found) == 1
        return " ".join(" ".join(found[0]).split())

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def rendered(results: dict[str, Any]) -> str:
    return page(json.loads(json.dumps(results)))


@pytest.fixture(scope="module")
def html() -> str:
    return rendered(study_results())


@pytest.fixture(scope="module")
def tree(html: str) -> Tree:
    return Tree(html)


def test_the_page_is_one_file_that_requests_nothing(html: str, tree: Tree) -> None:
    assert html.startswith("<!doctype html>") and '<html lang="en">' in html
    assert len(html.encode()) < 2_000_000
    for tag, attributes in tree.tags:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert "src" not in attributes and "srcset" not in attributes
        assert (attributes.get("href") or "#").startswith("#")
    assert "@import" not in html and "url(" not in html
    assert set(re.findall(r"\w+://[^'\"<\s]*", html)) == {"http://www.w3.org/2000/svg"}  # a name, never requested


def test_plots_tables_and_the_document_are_labelled(tree: Tree) -> None:
    plots = [attributes for tag, attributes in tree.tags if tag == "svg"]
    assert len(plots) > 4 * len(HEADS)
    assert all(plot.get("role") == "img" and plot.get("aria-label") for plot in plots)
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in tree.tags if tag == "th")
    assert [tag for tag, _ in tree.tags if tag in ("title", "h1")] == ["title", "h1"]
    places = {attributes["id"] for _, attributes in tree.tags if "id" in attributes}
    links = {attributes["href"][1:] for tag, attributes in tree.tags if tag == "a"}
    assert links and links <= places
    ids = [attributes["id"] for _, attributes in tree.tags if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_table_has_every_head_with_its_figures(tree: Tree) -> None:
    results = study_results()
    for head in results["heads"]:
        row = tree.row(head["name"])
        if head["name"] == DIVERGED:
            continue
        assert f"{head['bits_per_byte']['mean']:.4f}" in row
        assert f"[{head['bits_per_byte']['low']:.4f}, {head['bits_per_byte']['high']:.4f}]" in row
        assert f"{head['tokens_per_s']:,.0f}" in row and f"{head['pca90']:,.4g}" in row
        assert f"{head['effective_rank']:.1f}" in row and "not measured" in row
        if head["name"] != "softmax":
            gap = head["difference"]
            for value in (gap["mean"], gap["low"], gap["high"], gap["documents_low"], gap["documents_high"]):
                assert f"{value:+.4f}".replace("-", "\N{MINUS SIGN}") in row
            assert str(verdict(gap)) in row
    assert "0.62×" in tree.row("euclidean") and "baseline" in tree.row("softmax")
    assert "0.001 edge" in tree.row("cosine") and "edge" not in tree.row("euclidean")
    assert "1 of 5" in tree.row("canberra") and "1 failed" in tree.row("minkowski")


def test_a_head_that_diverged_has_a_row_that_says_so(tree: Tree) -> None:
    assert tree.row(DIVERGED).endswith("- all 5 runs diverged - - - - - - - - 5 of 5")
    assert f"{DIVERGED}: all 5 runs diverged." in tree.text


def test_why_energy_was_not_measured_is_told_below_the_table_and_in_place_of_plots(tree: Tree) -> None:
    assert tree.text.count("GPU: no NVIDIA GPU; CPU: no RAPL counter that may be read.") == 4  # table, 2 plots, limits
    assert "the third axis is time, which is no measure of energy" in tree.text


def test_measured_energy_is_shown_and_takes_the_place_of_time() -> None:
    tree = Tree(rendered(study_results(energy=True)))
    assert "0.0003" in tree.row("softmax") and "not measured" not in tree.text.lower()
    assert "Sustainability is the energy per token" in tree.text and "axis is time" not in tree.text


def test_energy_that_one_head_lacks_is_not_compared() -> None:
    results = study_results(energy=True)
    results["heads"][3]["j_per_token"] = None
    tree = Tree(rendered(results))
    assert "Energy was not measured for every head. No reason was recorded." in tree.text
    assert "axis is time" in tree.text and "0.0003" in tree.row("softmax")


def test_facts_of_the_budget_are_told(tree: Tree) -> None:
    for told in ("1,181,824", "2,457,600", "9f2c41d07be5a3346c1f", "abc1234", "torch 2.13.0", "0.001, 0.003, 0.01"):
        assert told in tree.text


def test_values_off_the_radar_are_clipped_and_said_so() -> None:
    results = study_results()
    results["heads"][1]["bits_per_byte"]["mean"] = 3.5  # worse than token frequencies
    results["heads"][2]["seconds_per_token"] = 1e-9
    told = Tree(rendered(results)).text
    assert "Clipped to the scale: euclidean, quality; cosine, time." in told
    assert "0.00 (clipped)" in told and "1.00 (clipped)" in told


def test_hostile_text_is_escaped() -> None:
    results = study_results()
    evil = "</script><img src=x onerror=alert(1)>'\"&"
    for tree in (results, results["data"], results["heads"][1]):
        for key in ("title", "machine", "path", "fingerprint", "name", "exponent"):
            if isinstance(tree.get(key), str):
                tree[key] = evil
    results["not_measured"] = {"gpu": evil}
    results["versions"] = {evil: evil}
    tree = Tree(rendered(results))
    assert not [tag for tag, attributes in tree.tags if tag == "img" or "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in tree.tags) == 1
    assert evil in tree.text


def test_texts_of_tokens_reach_the_tips_unharmed(tree: Tree) -> None:
    tips = [json.loads(attributes["data-tips"] or "") for _, attributes in tree.tags if "data-tips" in attributes]
    told = {text.split("\n")[0] for found in tips for *_, text in found}
    assert {f"“{shown(text)}”" for text in HOSTILE} <= told


def test_blanks_and_control_characters_of_tokens_are_visible() -> None:
    assert shown(" a\n\t\x00") == "␣a⏎⇥\\x00" and shown("") == "(empty)" and shown("▁the") == "␣the"


def _leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, (*path, key))
    elif isinstance(tree, list) and path[-1] in ("heads", "sweep", "eval_curve", "values", "scree", "explained", "lrs"):
        for place in range(min(2, len(tree))):
            yield from _leaves(tree[place], (*path, place))


def _small() -> dict[str, Any]:
    results = study_results()
    results["heads"] = results["heads"][:2]
    for head in results["heads"]:
        head["train_curve"] = head["train_curve"][::200]
        head["projection"]["points"] = head["projection"]["points"][:3]
    return results


def test_any_figure_may_be_null() -> None:
    whole = _small()
    paths = [
        path
        for path in _leaves(whole)
        if path[0:3:2] != ("heads", "name")
        and path[0] != "runs"
        and not (path[2:3] == ("sweep",) and len(path) > 3 and path[-1] != "bits_per_byte")
        and not (isinstance(path[-1], int) and path[-2] in ("heads", "eval_curve"))
    ]
    assert len(paths) > 80
    for path in paths:
        results = copy.deepcopy(whole)
        tree = results
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = None
        found = rendered(results)
        assert not re.search(r"\b(None|nan|inf)\b", found.split("</style>")[1].split("<script>")[0]), path


def test_a_study_of_nothing_has_a_page() -> None:
    studies: list[dict[str, Any]] = [{}, {"heads": []}, {"heads": [{"name": "softmax"}], "baseline": "softmax"}]
    for results in studies:
        assert "None" not in Tree(rendered(results)).text


def test_an_unmeasured_figure_is_a_dash_and_never_zero() -> None:
    results = study_results()
    head = results["heads"][1]
    head.update(tokens_per_s=None, pca90=None, effective_rank=None, gradient_stability=None, learning_stability=None)
    head["difference"].update(low=None, high=None)
    row = Tree(rendered(results)).row("euclidean")
    assert "no interval over seeds" in row and "better" not in row
    assert row.endswith("- not measured - - - - - 0 of 5")


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-2.0, -1.0, "better"),
        (1.0, 2.0, "worse"),
        (-1.0, 1.0, "no difference"),
        (None, 1.0, None),
        (0.0, 1.0, "no difference"),
    ],
)
def test_a_verdict_needs_an_interval_without_zero(low: float | None, high: float | None, word: str | None) -> None:
    assert verdict({"mean": 0.5, "low": low, "high": high}) == word


# ---- charts


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(2, 8))
def test_ticks_are_round_and_within(low: float, span: float, count: int) -> None:
    high = low + span
    if high - low < 1e-9 * abs(low):
        return
    found = ticks(low, high, count)
    assert len(found) <= count + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in found)


@given(st.floats(1e-12, 1e9), st.floats(1.01, 1e15))
def test_logarithmic_ticks_are_within(low: float, ratio: float) -> None:
    found = log_ticks(low, low * ratio)
    assert 1 <= len(found) <= 7
    assert all(low * 0.99 <= tick <= low * ratio * 1.01 for tick in found)


@given(st.lists(st.floats(0, 200), min_size=1, max_size=10).map(sorted))
def test_labels_do_not_overlap_and_stay_in_order(places: list[float]) -> None:
    found = spread(places, 13.0, 0.0, 230.0)
    assert all(b - a >= 13.0 - 1e-6 for a, b in zip(found, found[1:], strict=False))
    assert found[0] >= -1e-6 and found[-1] <= 230.0 + 1e-6


def test_labels_with_room_stay_where_they_are() -> None:
    assert spread([10.0, 50.0, 90.0], 13.0, 0.0, 100.0) == [10.0, 50.0, 90.0]
    assert spread([50.0, 50.0], 10.0, 0.0, 100.0) == [45.0, 55.0]


@pytest.mark.parametrize(
    "value, told",
    [(0, "0"), (1500, "1.5k"), (2e6, "2M"), (0.003, "0.003"), (3e-5, "3e-5"), (1e-6, "10⁻⁶"), (12_500, "12.5k")],
)
def test_short_numbers(value: float, told: str) -> None:
    assert short(value) == told


def test_a_chart_leaves_out_what_an_axis_cannot_show() -> None:
    nan = float("nan")
    points = [(0.0, 1.0), (1.0, None), (2.0, 3.0), (3.0, nan), (4.0, 5.0)]
    chart = line_chart("a", [Series("s", points)], Axis("x", log=True), Axis("y"))
    tips = re.search("data-tips='(.*?)'", chart)
    assert tips is not None and len(json.loads(tips[1])) == 2 and "nan" not in chart


def test_a_line_is_cut_at_the_upper_edge() -> None:
    chart = line_chart("a", [Series("s", [(0, 10), (1, 1), (2, 0)])], Axis("x"), Axis("y", low=0, high=2))
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", re.search('class="line" d="(.*?)"', chart)[1])]
    assert len(heights) == 3 and min(heights) == 22.0


def test_a_band_and_the_name_of_a_line_are_drawn() -> None:
    band = Series("a & b", [(0, 1), (1, 2)], 3, band=[(0, 0.5, 1.5), (1, 1, 3)])
    chart = line_chart("a", [band], Axis("x"), Axis("y"))
    assert 'class="band"' in chart and 'class="k3" data-k="3"' in chart and ">a &amp; b</text>" in chart
    assert 'class="direct"' not in line_chart("a", [band], Axis("x"), Axis("y"), direct=False)


def test_charts_without_data_are_empty() -> None:
    assert line_chart("a", [Series("s", [(1.0, None)])], Axis("x"), Axis("y")) == ""
    assert scatter("a", [Point(float("nan"), 1, "t")], Axis("x"), Axis("y")) == ""
    assert intervals("a", [], Axis("x")) == ""


def test_one_value_has_an_axis() -> None:
    for value in (0.0, 5.0, -3.0):
        assert "<path" in line_chart("a", [Series("s", [(value, value)])], Axis("x"), Axis("y"))


@pytest.mark.parametrize("axes", [3, 4, 5, 6])
def test_a_radar_of_any_number_of_axes_stays_within_its_box(axes: int) -> None:
    names = [f"axis {place}" for place in range(axes)]
    drawn = radar("a", names, [Outline("s", [1.0] * axes, 1)], size=(150, 142))
    places = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", drawn)]
    assert places and all(0 <= x <= 150 and 0 <= y <= 142 for x, y in places)


# ---- in a browser


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


@pytest.fixture(scope="module")
def file(html: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(html)
    return path


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
def visits(browser: Any, file: Path) -> Visits:
    return Visits(browser, file.as_uri())


@pytest.fixture(scope="module")
def one_tab(visits: Visits) -> Any:
    return visits.open()


@pytest.fixture
def tab(one_tab: Any) -> Any:
    """The page at 1280 pixels, light, with nothing pointed at and everything shown."""
    one_tab.set_viewport_size({"width": 1280, "height": 800})
    one_tab.emulate_media(color_scheme="light")
    one_tab.mouse.move(2, 2)
    return one_tab


def at_width(tab: Any, width: int) -> Any:
    tab.set_viewport_size({"width": width, "height": 800})
    return tab


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_the_document_does_not_scroll_sideways(tab: Any, width: int) -> None:
    assert at_width(tab, width).evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("width", [360, 700, 1000, 1280])
def test_text_in_plots_is_legible_and_within_its_plot(tab: Any, width: int) -> None:
    small, outside = at_width(tab, width).evaluate(
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
def test_texts_of_a_plot_do_not_overlap(tab: Any, width: int) -> None:
    found = at_width(tab, width).evaluate(
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


@pytest.mark.parametrize("label", ["Held-out loss in bits/byte against tokens", "euclidean: 30", "euclidean: time"])
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
    assert tab.locator(".scroll tbody tr").count() == len(HEADS)
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


def test_text_has_contrast_in_light_and_dark(tab: Any) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        tab.emulate_media(color_scheme=scheme)
        count, weak = tab.evaluate(CONTRAST)
        assert count > 300 and not weak
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        grounds.append(sum(map(int, re.findall(r"\d+", ground)[:3])) / 3)
    assert grounds[0] > 220 and grounds[1] < 40


def test_the_browser_complains_of_nothing_and_requests_nothing_else(visits: Visits, tab: Any) -> None:
    assert tab.locator("svg").count() > 40
    assert not visits.troubles and visits.requests == {visits.url}
