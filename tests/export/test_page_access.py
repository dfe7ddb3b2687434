"""The page for everybody: what a screen reader is told, contrast, the keyboard alone, small screens, paper.

Names, roles and headings are those of Chromium's own accessibility tree; colours are computed ones, composed
over whatever lies behind the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.export import draw
from tests.export.browsing import Page, browser, needs_browser
from tests.export.cases import random_scores

pytestmark = [pytest.mark.browser, needs_browser]

SIZES = {"phone": (420, 900), "laptop": (1024, 800), "projector": (1920, 1080)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it: images, attention, a curve, filters and the report."""
    model = cv.load("catdog-tiny")
    task = cv.Task(*catdog_pairs(6, seed=1), metric=cv.logit_diff("cat", "dog"))
    circuit = random_scores(model.graph).connected(40)
    report = cv.verify(model, task, circuit, n_random=5, progress=False)
    path = tmp_path_factory.mktemp("pages") / "whole.html"
    return draw(circuit, path, model=model, task=task, report=report, curve=[(10, 0.2), (40, 0.9)])


def show(page: Page, path: Path, size: str = "laptop", theme: str = "light", media: str = "screen") -> None:
    """Open a page on a screen of this size, for a reader who prefers this theme."""
    width, height = SIZES[size]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": theme}]
    page.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    page.open(path)


def tree(page: Page) -> list[tuple[str, str, dict[str, Any]]]:
    """Role, name and properties of all that a screen reader is told of, in reading order."""
    page.browser.execute_cdp_cmd("Accessibility.enable", {})
    found = page.browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return [
        (
            node["role"]["value"],
            node.get("name", {}).get("value", ""),
            {each["name"]: each["value"].get("value") for each in node.get("properties", ())},
        )
        for node in found
        if not node["ignored"]
    ]


def test_everything_has_a_name_and_headings_are_in_order(page: Page, whole: Path) -> None:
    show(page, whole)
    told = tree(page)
    need = ("button", "link", "slider", "switch", "checkbox", "searchbox", "image", "img", "region", "Canvas")
    need += ("application", "figure", "table", "columnheader", "rowheader", "complementary")
    unnamed = [role for role, name, said in told if (role in need or said.get("focusable")) and not name]
    assert unnamed == []
    assert {"button", "slider", "switch", "searchbox", "table", "main", "application"} <= {
        role for role, *_ in told
    }
    levels = [said["level"] for role, _, said in told if role == "heading"]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert page.run("return document.documentElement.lang") == "en"
    assert page.run("return document.title")
    assert page.run("return [...document.images].every(image => image.alt)")
    assert page.run("const ids = [...document.querySelectorAll('[id]')].map(e => e.id);"
                    "return ids.length === new Set(ids).size")  # fmt: skip


CONTRAST = """
const pen = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
const rgba = colour => {
  pen.clearRect(0, 0, 1, 1); pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1);
  return [...pen.getImageData(0, 0, 1, 1).data].map(value => value / 255);
};
const over = (top, below) => below.map((value, i) => i < 3 ? top[i] * top[3] + value * (1 - top[3]) : 1);
const luminance = colour => colour.slice(0, 3)
  .map(value => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
  .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
const isDrawn = element => element instanceof SVGElement && element.tagName !== 'svg';
const inkOf = element => {
  const style = getComputedStyle(element), ink = rgba(isDrawn(element) ? style.fill : style.color);
  for (let each = element; each; each = each.parentElement) ink[3] *= getComputedStyle(each).opacity;
  return ink;
};
const paperAt = (x, y, text) => {
  const layers = [];
  for (const element of document.elementsFromPoint(x, y)) {
    if (text.contains(element) && isDrawn(element)) continue;
    const style = getComputedStyle(element);
    const layer = isDrawn(element) ? (style.fill === 'none' ? [0, 0, 0, 0] : rgba(style.fill))
      : rgba(style.backgroundColor);
    layers.push(layer);
    if (layer[3] === 1) break;
  }
  return layers.reverse().reduce((below, layer) => over(layer, below), rgba(getComputedStyle(document.body).backgroundColor));
};
const found = [], seen = [];
for (const details of document.querySelectorAll('details')) details.open = true;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode, element = text.parentElement;
  if (!text.data.trim() || ['SCRIPT', 'STYLE', 'NOSCRIPT', 'TITLE', 'title'].includes(element.tagName)) continue;
  if (!element.checkVisibility() || element.closest('.skip')) continue;
  element.scrollIntoView({block: 'center', inline: 'center'});
  const range = document.createRange(); range.selectNodeContents(text);
  const box = isDrawn(element) ? element.getBoundingClientRect() : range.getClientRects()[0];
  if (!box || !box.width) continue;
  const paper = paperAt(box.x + box.width / 2, box.y + box.height / 2, element), ink = over(inkOf(element), paper);
  const [dark, light] = [luminance(paper), luminance(ink)].sort((a, b) => a - b);
  const style = getComputedStyle(element), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const ratio = (light + 0.05) / (dark + 0.05);
  seen.push(text.data);
  if (ratio < (large ? 3 : 4.5)) found.push(`${ratio.toFixed(2)} ${element.tagName}.${element.getAttribute('class')}: ${text.data.trim()}`);
}
return [seen.length, found];
"""  # noqa: E501 - JavaScript


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_stands_out_from_what_is_behind_it(page: Page, whole: Path, theme: str) -> None:
    show(page, whole, theme=theme)
    seen, faint = page.run(CONTRAST)
    assert seen > 100
    assert faint == []
    paper = page.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (theme == "light")


TABBABLE = """
return [...document.querySelectorAll('a[href], button, input, summary, [tabindex]')]
  .filter(each => each.tabIndex >= 0 && !each.disabled && each.checkVisibility()).length
"""
FOCUSED = """
const each = document.activeElement, box = each.getBoundingClientRect();
if (each === document.body) return null;
window.known ??= new Map();
if (!known.has(each)) known.set(each, known.size);
const mark = each.querySelector('.box, rect'), style = getComputedStyle(mark && each instanceof SVGElement ? mark : each);
const seen = mark && each instanceof SVGElement ? parseFloat(style.strokeWidth) >= 2
  : style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) >= 2;
const regions = ['.skip', 'header', '.controls', '#diagram', 'aside', '#report'];
let [down, right] = [scrollY, scrollX], region = -1;
for (let outer = each; outer; outer = outer.parentElement) {
  if (outer !== each && outer !== document.documentElement) { down += outer.scrollTop; right += outer.scrollLeft; }
  if (region < 0) region = regions.findIndex(css => outer.matches(css));
}
return [known.get(each), each.className.baseVal ?? (each.id || each.className || each.outerHTML), seen, region,
        box.left + right, box.top + down, box.right + right, box.bottom + down];
"""  # noqa: E501 - JavaScript


def test_the_keyboard_reaches_everything_in_the_order_of_the_page(page: Page, whole: Path) -> None:
    """From part to part, within them rightwards or down; and each stop shows that it has the focus."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    show(page, whole)
    page.run("document.body.tabIndex = -1; document.body.focus(); document.body.removeAttribute('tabindex')")
    expected, stops = page.run(TABBABLE), []
    for _ in range(expected):
        ActionChains(page.browser).send_keys(Keys.TAB).perform()
        stops.append(page.run(FOCUSED))
    assert None not in stops
    assert len({stop[0] for stop in stops}) == expected  # every one of them, none twice
    assert [name for _, name, seen, *_ in stops if not seen] == []
    assert [region for *_, region, _, _, _, _ in stops] == sorted(stop[3] for stop in stops)
    for before, after in pairwise(stops):
        right_of, below = after[4] >= before[6] - 1, after[5] >= before[7] - 1
        assert right_of or below or after[3] != before[3], (before, after)


@pytest.mark.parametrize("size", list(SIZES))
def test_nothing_sticks_out_of_the_screen(page: Page, whole: Path, size: str) -> None:
    show(page, whole, size)
    page.run("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    root = float(page.run("return parseFloat(getComputedStyle(document.documentElement).fontSize)"))
    assert root >= 15
    assert (root >= 18) == (size == "projector")


def test_on_paper_it_is_light_whole_and_without_controls(page: Page, whole: Path) -> None:
    show(page, whole, theme="dark", media="print")
    page.run("document.documentElement.dataset.theme = 'dark'")
    assert page.run("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    hidden = (
        "return ['.tools', '.controls', '.choices'].map(c => document.querySelector(c).checkVisibility())"
    )
    assert page.run(hidden) == [False, False, False]
    assert page.run(
        "const box = document.getElementById('diagram'), drawn = svg.getBoundingClientRect();"
        "return box.scrollHeight <= box.clientHeight + 1 && drawn.width <= innerWidth"
    )
    assert page.element("#report").is_displayed()
