"""The page of attention: compact forms are right to what they say, of every family, within a size; and the
browser shows these values, for a row and for a column, with pointer and keyboard."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.export.attention_page import LADDER, SCRIPTS, Tokens, pack
from circuitvit.export.sheet import Sheet
from circuitvit.views import AttentionPage, attention_page, attention_patterns
from circuitvit.views.attention import attention_places
from tests.export.browsing import Page, browser, needs_browser
from tests.export.test_page import Elements
from tests.export.test_svg import HOSTILE
from tests.families import FAMILIES, made
from tests.views.commands import run, save_pictures

MODEL = cv.load("catdog-tiny")
IMAGES = catdog_pairs(2, seed=0).clean
TOKENS = Tokens(("cls",), Sheet((6, 7)))


def drawn(tokens: Tokens, signed: bool = False) -> np.ndarray:
    """A pattern whose largest values are far above the others, as those of real heads are."""
    scores = 2 * np.random.default_rng(0).standard_normal((len(tokens), len(tokens)))
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    return (shares - signed * shares[::-1]).astype(np.float32)


def assert_within(found: np.ndarray, expected: np.ndarray, precision: float) -> None:
    """Every value is off by no more than this share of the largest in its row."""
    largest = np.abs(expected).max(axis=1, keepdims=True)
    assert (np.abs(found - expected) <= (precision + 1e-5) * largest).all()


# -- the compact form ----------------------------------------------------------------------------


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("room", [1e9, 2500, 1700, 1300, 900, 600])
def test_a_head_is_as_precise_as_it_says_in_less_and_less_room(room: float, signed: bool) -> None:
    pattern = drawn(TOKENS, signed)
    packed = pack(pattern, None, TOKENS, room)
    blocks = TOKENS.blocks(packed.pool)
    same = blocks[:, None] == blocks
    means = pattern @ same / same.sum(axis=0)
    assert_within(packed.unpacked(TOKENS), means, packed.precision)
    assert len(packed.content) <= room
    assert packed.signed is signed
    if room == 1e9:
        assert (packed.pool, packed.precision) == (1, 1 / (127 if signed else 255))


def test_less_room_never_gives_more_precision() -> None:
    steps = [pack(drawn(TOKENS), None, TOKENS, room) for room in range(3000, 300, -100)]
    places = [LADDER.index((each.pool, each.levels)) for each in steps]
    assert places == sorted(places)
    assert len(set(places)) > 5


def test_squares_of_patches_end_where_a_frame_ends() -> None:
    tokens = Tokens((), Sheet((4, 3, 3)))
    blocks = tokens.sheet.tile(
        np.arange(4)[:, None, None].repeat(3, 1).repeat(3, 2)
    )  # the frame of each patch
    for block in np.unique(tokens.blocks(2)):
        assert len(np.unique(blocks.ravel()[tokens.blocks(2) == block])) == 1
    assert len(np.unique(tokens.blocks(2))) == 4 * 4


# -- of every family -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family",
    [
        "timm, registers",
        "timm, average",
        "timm, gated and normed together",
        "timm, differential",
        "timm, two of each",
        "timm, pool",
        "transformers, vivit",
    ],
)
def test_the_page_holds_the_patterns_that_the_view_has(family: str) -> None:
    model, _ = made(family)
    images = FAMILIES[family].images(1)
    page = attention_page(model, images)
    layers = [model.stages[place].nodes.layer for place in attention_places(model)]
    for layer in layers:
        view = attention_patterns(model, images, layer)
        for head, name in enumerate(view.heads):
            assert_within(page.pattern(name), view.pattern[0, head], page.precision)
    signed = family == "timm, differential"
    assert ("rollout" in page.heads) is not signed
    assert [row.latents > 0 for row in page.rows] == [row.name == "pool" for row in page.rows]
    gated = family in ("timm, gated and normed together", "timm, differential")
    assert {row.gated for row in page.rows if row.name != "rollout"} == {gated}


def test_models_whose_patches_form_no_grid_are_refused() -> None:
    model, _ = made("transformers, timesformer")
    with pytest.raises(DataError, match="no grid"):
        attention_page(model, FAMILIES["transformers, timesformer"].images(1))


def test_an_edit_is_seen() -> None:
    edited = MODEL.edit({"a2.h1.pattern@patch->cls": cv.knock_out()})
    found, plain = (attention_page(model, IMAGES).pattern("a2.h1") for model in (edited, MODEL))
    assert_within(found, attention_patterns(edited, IMAGES, 2).pattern[0, 1], 1 / 255)
    assert np.abs(found - plain).max() > 0.01


def test_the_rollout_is_that_of_the_paper() -> None:
    literal = np.eye(37)
    for layer in range(4):
        mixed = 0.5 * attention_patterns(MODEL, IMAGES, layer).pattern[1].mean(axis=0) + 0.5 * np.eye(37)
        literal = mixed / mixed.sum(axis=1, keepdims=True) @ literal
    assert_within(attention_page(MODEL, IMAGES).pattern("rollout", 1), literal, 1 / 255)


def test_sizes_of_values_are_those_of_the_view() -> None:
    page, view = attention_page(MODEL, IMAGES, [2]), attention_patterns(MODEL, IMAGES, 2)
    sizes = page.packed[0][1].sizes(page.tokens)
    assert sizes is not None
    np.testing.assert_allclose(view.pattern[0, 1] * sizes, view.weighted[0, 1], rtol=1e-4, atol=1e-6)
    assert page.heads == ("a2.h0", "a2.h1", "a2.h2", "a2.h3")


# -- its size, and what is refused ---------------------------------------------------------------


def test_a_page_keeps_to_its_size_or_says_what_would_fit() -> None:
    free = attention_page(MODEL, IMAGES)
    megabytes = 0.32
    tight = attention_page(MODEL, IMAGES, megabytes=0.25)
    assert len(free.html()) < 1e6 * megabytes
    assert len(tight.html()) < 1e6 * 0.25
    assert tight.precision >= free.precision == 1 / 255
    with pytest.raises(
        OptionError, match=r"34 maps of 37 tokens do not fit into 0.1 megabytes: give fewer images"
    ):
        attention_page(MODEL, IMAGES, megabytes=0.1)


def test_refusals_name_the_culprit() -> None:
    page = attention_page(MODEL, IMAGES[:1], [0, -1])
    with pytest.raises(NameNotFoundError, match=r"a0\.h0"):
        page.pattern("a0.h00")
    with pytest.raises(NameNotFoundError, match="head"):
        page.html(head="a1.h1")
    with pytest.raises(OptionError, match="there is no token 37"):
        page.html(query=37)
    with pytest.raises(OptionError, match="there is no patch"):
        page.html(query=(6, 6))
    with pytest.raises(OptionError, match="no attention in layer 9"):
        attention_page(MODEL, IMAGES, [9])
    with pytest.raises(OptionError, match="a layer is a whole number, not 'a'"):
        attention_page(MODEL, IMAGES, ["a"])  # type: ignore[list-item]
    for size in ("20", float("nan"), 0):
        with pytest.raises(OptionError, match=r"\(megabytes\) must be a positive number"):
            attention_page(MODEL, IMAGES, megabytes=size)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="layers names no layer"):
        attention_page(MODEL, IMAGES, [])
    with pytest.raises(OptionError, match="room for 16 images, not for 17"):
        attention_page(MODEL, torch.zeros(17, 3, 48, 48))


def test_a_command_writes_it(tmp_path: Path) -> None:
    photos = save_pictures(tmp_path / "photos", catdog_pairs(2, seed=0, preprocessed=False).clean)
    said = run(
        "attention", "--model", "catdog-tiny", photos, "--out", tmp_path / "a.html", "--query", "2,3",
        "--image", "1", "--no-picture",
    )  # fmt: skip
    assert "17 maps, 37 tokens, 2 images" in said
    text = (tmp_path / "a.html").read_text()
    assert '"start":{"image":1,"head":12,"token":16}' in text
    assert "data:image" not in text


# -- the document --------------------------------------------------------------------------------


def html_of(names: tuple[str, ...]) -> str:
    page = attention_page(MODEL, IMAGES, [0])
    subjects = type(page.subjects)(names, page.subjects.pictures, page.subjects.grid, page.subjects.kinds)
    return AttentionPage(names[0], subjects, page.rows, page.packed, page.overview).html()


@pytest.mark.parametrize("text", [*HOSTILE, "</script><script>alert(1)</script>", "<!--<script>"])
def test_hostile_names_add_no_element(text: str) -> None:
    tags = [tag for tag, _ in Elements(html_of((text, text))).found]
    assert tags == [tag for tag, _ in Elements(html_of(("plain", "plain"))).found]


def test_nothing_is_fetched_and_the_same_images_give_the_same_bytes() -> None:
    text = html_of(("a", "b"))
    assert text == html_of(("a", "b"))
    policy = next(each["content"] for _, each in Elements(text).found if "src" in (each.get("content") or ""))
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r"https?://", text)
    folder = Path(cv.__file__).parent / "export"
    for name in SCRIPTS:
        code = (folder / name).read_text(encoding="utf-8")
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|fetch\(", code)


# -- in the browser ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        opened.requests(), opened.complaints()
        yield opened
        assert opened.complaints() == []
        assert [url for url in opened.requests() if not url.startswith(("file:", "data:", "chrome"))] == []


def numbers(page: Page, name: str, **look: Any) -> np.ndarray:
    """What the page shows of an item, for each token, once it is unpacked."""
    script = (
        "const item = items.find(each => each.name === arguments[0]), done = arguments[2];"
        "Promise.all(item.heads.map(head => ensure(arguments[1].image, head)))"
        ".then(() => done([...valuesOf(item, arguments[1])]));"
    )
    look = {"image": 0, "token": 0, "mode": "row", "weighted": False, "latent": -1, **look}
    return np.array(page.browser.execute_async_script(script, name, look))


@pytest.mark.browser
@needs_browser
def test_the_browser_shows_the_values_that_python_has(page: Page, tmp_path: Path) -> None:
    packed = attention_page(MODEL, IMAGES)
    page.open(packed.save(tmp_path / "a.html"))
    heads = [packed.pattern(f"a2.h{head}", 1) for head in range(4)]
    one = heads[1]
    sizes = packed.packed[1][9].sizes(packed.tokens)
    assert sizes is not None
    for look, expected in [
        ({"token": 20}, one[20]),
        ({"token": 20, "mode": "column"}, one[:, 20]),
        ({"token": 20, "weighted": True}, one[20] * sizes),
        ({"token": 20, "weighted": True, "mode": "column"}, one[:, 20] * sizes[20]),
        ({"token": -1}, one.mean(axis=0)),
    ]:
        np.testing.assert_allclose(numbers(page, "a2.h1", image=1, **look), expected, rtol=1e-5, atol=1e-8)
    mean, most = np.mean(heads, axis=0), np.max(heads, axis=0)
    np.testing.assert_allclose(numbers(page, "mean of layer 2", image=1, token=5), mean[5], rtol=1e-5)
    np.testing.assert_allclose(numbers(page, "max of layer 2", image=1, token=5), most[5], rtol=1e-5)


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("family", ["timm, differential", "timm, pool", "transformers, vivit"])
def test_the_browser_unpacks_other_families_too(page: Page, tmp_path: Path, family: str) -> None:
    model, _ = made(family)
    images = FAMILIES[family].images(1)
    packed = attention_page(model, images)
    page.open(packed.save(tmp_path / "a.html"))
    name = packed.heads[0] if "pool" not in family else "pool.h0"
    pattern = packed.packed[0][packed.heads.index(name)].unpacked(packed.tokens)
    expected = pattern.mean(axis=0) if "pool" in family else pattern[3]
    np.testing.assert_allclose(numbers(page, name, token=3), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.browser
@needs_browser
def test_few_bytes_unpack_to_the_same_values(page: Page, tmp_path: Path) -> None:
    packed = attention_page(MODEL, IMAGES[:1])
    coarse = pack(drawn(packed.tokens), None, packed.tokens, 500)
    assert coarse.pool > 1
    heads = (coarse, *packed.packed[0][1:])
    spoiled = AttentionPage(packed.model, packed.subjects, packed.rows, (heads,), packed.overview)
    page.open(spoiled.save(tmp_path / "a.html"))
    found = coarse.unpacked(packed.tokens)
    np.testing.assert_allclose(numbers(page, "a0.h0", token=7), found[7], rtol=1e-5)
    np.testing.assert_allclose(numbers(page, "a0.h0", token=7, mode="column"), found[:, 7], rtol=1e-5)
    page.run("choose({item: 0})")
    assert "squares of" in page.text("#precision")


@pytest.mark.browser
@needs_browser
def test_pointer_and_keyboard_choose_heads_and_patches(page: Page, tmp_path: Path) -> None:
    from selenium.webdriver.common.keys import Keys

    page.open(attention_page(MODEL, IMAGES).save(tmp_path / "a.html", head="a2.h1"))
    assert page.text("#map-title") == "a2.h1: where cls looks"
    x, y, width, height = page.run(
        "canvas.scrollIntoView({block: 'center'}); const b = canvas.getBoundingClientRect();"
        "return [b.x, b.y, b.width, b.height]"
    )
    at = {"x": x + width * 2.5 / 6, "y": y + height * 3.5 / 6}
    for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
        button = {"button": "none" if kind == "mouseMoved" else "left", "clickCount": 1}
        page.browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": kind, **at, **button})
        if kind == "mouseMoved":
            page.wait("return document.getElementById('map-title').textContent.includes('patch (3, 2)')")
    page.wait("return state.kept && state.token === 1 + 3 * 6 + 2")
    image = page.element("#image")
    image.send_keys(Keys.ARROW_RIGHT)
    page.wait(
        "return document.getElementById('said').textContent.includes('Under the pointer: patch (3, 3)')"
    )
    image.send_keys(Keys.ENTER)
    page.wait("return state.token === 1 + 3 * 6 + 3")
    image.send_keys(Keys.ESCAPE)
    page.wait("return !state.kept && state.token === 0")
    page.element("#modes [data-value=column]").click()
    page.wait("return document.getElementById('map-title').textContent === 'a2.h1: who looks at cls'")
    cell = page.element(".head[aria-pressed=true]")
    cell.send_keys(Keys.ARROW_RIGHT)
    page.wait("return document.activeElement.textContent === 'h2' && items[state.item].name === 'a2.h2'")
    page.run("const s = document.getElementById('images'); s.value = 1; s.dispatchEvent(new Event('change'))")
    page.wait("return state.image === 1 && !document.querySelector('.head.stale')")
    labels = page.run(
        "return [...document.querySelectorAll('.head')].map(each => each.getAttribute('aria-label'))"
    )
    assert len(labels) == 4 * 6 + 1
    assert all("most at" in label for label in labels)
