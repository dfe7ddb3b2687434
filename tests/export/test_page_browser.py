"""The interactive page in a real browser: hover, click, slider, search and toggle do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.export import draw
from circuitvit.graph import Circuit, EdgeScores, Graph
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.graph.liveness import live_edges
from circuitvit.models.timm_import import import_timm
from tests.export.browsing import Page, browser, needs_browser
from tests.export.cases import MADE, random_circuit, random_scores
from tests.export.test_svg import HOSTILE

pytestmark = [pytest.mark.browser, needs_browser]

CURVE = [(4, 0.2), (20, 0.6), (60, 0.96)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """One browser for all tests of this file."""
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_but_the_file(page: Page) -> Iterator[None]:
    """Whatever a test does, the console stays empty and nothing but the page itself is asked for."""
    page.requests(), page.complaints()
    yield
    assert page.complaints() == []
    elsewhere = [url for url in page.requests() if not url.startswith(("file:", "data:", "chrome"))]
    assert elsewhere == []


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return random_circuit(4, 3, 60)


@pytest.fixture(scope="module")
def plain(circuit: Circuit, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page without a model."""
    path = tmp_path_factory.mktemp("pages") / "plain.html"
    intervals = dict.fromkeys(circuit, (-1.5, 2.5))
    return draw(circuit, path, curve=CURVE, intervals=intervals)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of the bundled model, with images."""
    model = cv.load("catdog-tiny")
    images = torch.rand(2, 3, *model.preprocessing.size[1:], generator=torch.Generator().manual_seed(0))
    task = cv.Task(images[:1], images[1:], cv.logit_diff(0, 1))
    toy_circuit = random_scores(model.graph).connected(40)
    return draw(toy_circuit, tmp_path_factory.mktemp("pages") / "toy.html", model=model, task=task)


def strongest(circuit: Circuit, k: int) -> Circuit:
    """What the slider should show at `k`: the strongest edges."""
    names = sorted(circuit, key=lambda name: -abs(circuit.score_of(name) or 0.0))[:k]
    return Circuit.from_edges(circuit.graph, names)


def slide(page: Page, k: int) -> None:
    page.run(
        "const s = document.getElementById('threshold'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input')); s.dispatchEvent(new Event('change'));",
        k,
    )


def point_at(page: Page, kind: str, name: str) -> tuple[int, int]:
    """A point of the screen where the pointer meets this node or edge, which is scrolled into view."""
    script = """
    const item = (arguments[0] === 'node' ? nodes : edges).find(each => each.name === arguments[1]);
    item.element.scrollIntoView({block: 'center'});
    const found = at => { const hit = itemAt(...at); return hit && (hit.node ?? hit.edge) === item; };
    if (item.box) { const b = item.element.getBoundingClientRect(); return [b.x + b.width / 2, b.y + 8]; }
    const matrix = item.element.getScreenCTM(), length = item.element.getTotalLength();
    for (let step = 20; step < 180; step++) { // not where boxes begin
      const exact = item.element.getPointAtLength(length * step / 200).matrixTransform(matrix);
      const at = [Math.round(exact.x), Math.round(exact.y)];
      if (found(at)) return at;
    }
    return null;
    """
    x, y = page.run(script, kind, name)
    return round(x), round(y)


def mouse(page: Page, at: tuple[int, int], click: bool = False) -> None:
    """Move the real pointer, and click where asked."""
    places = [
        ("mouseMoved", "none"),
        *([("mousePressed", "left"), ("mouseReleased", "left")] if click else []),
    ]
    for kind, button in places:
        event = {"type": kind, "x": at[0], "y": at[1], "button": button, "clickCount": int(click)}
        page.browser.execute_cdp_cmd("Input.dispatchMouseEvent", event)


def key(page: Page, name: str) -> None:
    from selenium.webdriver.common.keys import Keys

    page.browser.switch_to.active_element.send_keys(getattr(Keys, name))


# -- what is drawn -------------------------------------------------------------------------------


def test_every_edge_and_node_of_the_circuit_is_drawn(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain, edges=True)
    assert page.visible() == set(circuit)
    assert page.run("return nodes.filter(n => n.element).map(n => n.name)") == list(circuit.nodes)
    assert page.counts() == (len(circuit), len(circuit.nodes))


def test_rows_are_layers_and_columns_are_heads(page: Page, plain: Path) -> None:
    page.open(plain, edges=True)
    places = page.run("return nodes.filter(n => n.box).map(n => [n.name, n.box[0] + n.box[2] / 2, n.box[1]])")
    x, y = {name: left for name, left, _ in places}, {name: top for name, _, top in places}
    assert y["logits"] < min(y[name] for name in y if name != "logits")
    assert y["input"] > max(y[name] for name in y if name != "input")
    for layer in range(3):
        heads = [name for name in y if name.startswith(f"a{layer}.")]
        assert len({y[name] for name in heads}) == 1
        above = [name for name in y if name.startswith(f"a{layer + 1}.")]
        assert max(y[name] for name in above) < min(y[name] for name in heads)
    for head in range(3):
        column = {round(left) for name, left in x.items() if name.endswith(f".h{head}")}
        assert len(column) == 1


# -- slider --------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [60, 31, 7, 1])
def test_the_slider_shows_the_strongest_edges_and_counts_those_alive(
    page: Page, plain: Path, circuit: Circuit, k: int
) -> None:
    page.open(plain, edges=True)
    slide(page, k)
    shown = strongest(circuit, k)
    assert page.visible() == set(shown)
    live = shown.pruned()
    assert page.counts() == (len(live), len(live.nodes))
    assert page.with_class("dead") == set(shown - live)
    assert ("on no path" in page.text("#counts")) == bool(len(shown - live))


def test_the_faithfulness_at_the_shown_size_is_stated(page: Page, plain: Path) -> None:
    page.open(plain, edges=True)
    assert page.text("#faithfulness") == "faithfulness 0.96"
    size = 0
    for k in range(60, 0, -1):
        slide(page, k)
        size = page.counts()[0]
        if 20 < size < 60:
            break
    expected = 0.6 + 0.36 * (size - 20) / 40
    assert page.text("#faithfulness") == f"faithfulness ≈ {expected:.2f}"
    slide(page, 1)
    assert page.text("#faithfulness") == "faithfulness not measured here"


def test_the_slider_counts_right_with_3000_edges_of_a_vit_b(page: Page, tmp_path: Path) -> None:
    """How fast it answers is measured by `python -m bench page_slider`, not here."""
    big = random_circuit(12, 12, 3000)
    assert len(big) == 3000
    page.open(draw(big, tmp_path / "big.html"), edges=True)
    for k in (2990, 100, 3000):
        slide(page, k)
        assert page.counts()[0] == len(strongest(big, k).pruned())


# -- hover and click -----------------------------------------------------------------------------


def test_hovering_an_edge_says_name_effect_interval_share_and_neighbours(
    page: Page, plain: Path, circuit: Circuit
) -> None:
    page.open(plain, edges=True)
    name = next(iter(strongest(circuit, 1)))
    score = circuit.score_of(name) or 0.0
    mouse(page, point_at(page, "edge", name))
    said = page.text("#tip")
    total = sum(abs(circuit.score_of(edge) or 0.0) for edge in circuit)
    assert said.startswith(name)
    assert f"{score:+.3g}".replace("-", "−") + " [−1.5, +2.5]" in said
    assert f"{100 * abs(score) / total:.2g}" in said or f"{100 * abs(score) / total:.3g}" in said
    assert "same input" in said
    assert name in page.with_class("hot")
    mouse(page, (5, 5))
    assert page.element("#tip").is_displayed() is False
    assert page.with_class("hot") == set()


def test_hovering_a_node_names_its_neighbours(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain, edges=True)
    node = "m2"
    mouse(page, point_at(page, "node", node))
    said = page.text("#tip")
    into = [name for name in circuit if name.endswith(f"->{node}")]
    out = [name for name in circuit if name.startswith(f"{node}->")]
    assert said.startswith(node)
    assert f"{len(into)} in, {len(out)} out" in said
    best = max(into, key=lambda name: abs(circuit.score_of(name) or 0.0)).partition("->")[0]
    assert f"from{best}" in said.replace("\n", "")
    assert page.with_class("hot") >= {node, *into, *out}


def paths_through(circuit: Circuit, wanted: str) -> set[str]:
    """The edges of every input-to-logits path through a node or an edge, by listing all paths."""
    ends = (f"->{wanted}<", f"->{wanted}@", f"{wanted}->")
    found: set[str] = set()
    for path in circuit.paths():
        if (
            wanted in path
            or any(f"{edge}@".find(end) >= 0 for edge in path for end in ends)
            or any(edge.endswith(f"->{wanted}") for edge in path)
        ):
            found |= set(path)
    return found


@pytest.mark.parametrize("kind", ["node", "edge"])
def test_a_click_focuses_on_the_paths_through_what_is_clicked(page: Page, tmp_path: Path, kind: str) -> None:
    small = random_circuit(3, 2, 22)
    page.open(draw(small, tmp_path / "small.html"), edges=True)
    name = "m1" if kind == "node" else next(edge for edge in small if edge.startswith("m0->"))
    mouse(page, point_at(page, kind, name), click=True)
    expected = paths_through(small, name)
    assert 0 < len(expected) < len(small)
    names = page.run("return edges.filter(e => view.focus[e.id]).map(e => e.name)")
    assert set(names) == expected
    dimmed = {item for item in page.with_class("dim") if "->" in item}
    # What the pointer is on, and what touches it, is highlighted and so never dim.
    assert dimmed == set(small) - expected - page.with_class("hot")
    assert page.text("#about h2") == name
    assert page.with_class("picked") == {name}
    mouse(page, (700, 990))
    page.element("body").send_keys("\ue00c")  # Escape
    assert page.with_class("dim") == set()
    assert page.text("#about h2") == "Nothing is in focus"


def test_neighbours_in_the_panel_lead_on(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain, edges=True)
    mouse(page, point_at(page, "node", "m2"), click=True)
    link = page.element("#about .link")
    name = link.find_element("css selector", "span").text
    assert name in circuit
    link.click()
    assert page.text("#about h2") == name


# -- search, keyboard, theme ---------------------------------------------------------------------


def test_search_finds_nodes_and_edges_by_name(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain, edges=True)
    page.element("#search").send_keys("M2-")
    edges = {name for name in circuit if "m2-" in name}
    assert page.with_class("hot") == edges
    assert page.text("#found") == f"0 nodes, {len(edges)} edges"
    page.element("#search").clear()
    page.element("#search").send_keys("a1.h0")
    assert "a1.h0" in page.with_class("hot")
    key(page, "ENTER")
    assert page.text("#about h2") == "a1.h0"
    assert page.element("#results").is_displayed() is False
    page.element("#search").clear()
    page.element("#search").send_keys("no such thing")
    assert page.text("#found") == "0 nodes, 0 edges"


def test_the_keyboard_reaches_every_node_and_focuses_on_it(page: Page, plain: Path) -> None:
    page.open(plain, edges=True)
    page.run("document.querySelector('.node[tabindex=\"0\"]').focus()")
    assert page.run("return document.activeElement.node.name") == "logits"
    seen = set()
    for name in ("ARROW_DOWN", "ARROW_DOWN", "ARROW_LEFT", "ARROW_DOWN", "ARROW_RIGHT"):
        key(page, name)
        seen.add(page.run("return document.activeElement.node.name"))
    assert len(seen) >= 4
    here = page.run("return document.activeElement.node.name")
    assert page.text("#tip").startswith(here)
    assert here in page.run("return document.activeElement.getAttribute('aria-label')")
    key(page, "ENTER")
    assert page.text("#about h2") == here
    key(page, "ESCAPE")
    assert page.text("#about h2") == "Nothing is in focus"
    reachable = """
    const seen = new Set([nodes.find(n => n.name === 'logits')]);
    for (const node of seen)
      for (const key in STEPS) { const next = neighbour(node, key); if (next) seen.add(next); }
    return seen.size;
    """
    assert page.run(reachable) == page.counts()[1]


def test_inputs_can_be_hidden(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain, edges=True)
    page.element("#filters input[data-key=v]").click()
    assert page.visible() == {name for name in circuit if not name.endswith("<v>")}


def test_light_and_dark(page: Page, plain: Path) -> None:
    page.open(plain, edges=True)
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = page.run(paper)
    page.element("#theme").click()
    page.element("#theme").click()
    assert page.text("#theme") == "Theme: dark"
    assert page.run(paper) != light


def test_token_groups_have_their_own_lines_and_filters(page: Page, tmp_path: Path) -> None:
    graph = transformer_graph(2, 2).with_groups(("cls", "patch"))
    grouped = random_scores(graph).connected(40)
    page.open(draw(grouped, tmp_path / "groups.html"), edges=True)
    assert page.visible() == set(grouped)
    assert page.counts() == (len(grouped), len(grouped.nodes))
    page.element("#filters input[data-key='1']").click()
    shown = {name for name in grouped if name.endswith("@cls")}
    assert page.visible() == shown
    kept = Circuit.from_edges(graph, shown).kept
    assert page.counts()[0] == int(live_edges(graph, kept).sum())
    assert "tokens: patch" in page.text("#legend")


# -- images --------------------------------------------------------------------------------------


def thumbs(page: Page) -> list[str]:
    return list(page.run("return nodes.filter(n => n.image).map(n => n.image.getAttribute('href'))"))


def test_the_toggle_changes_the_image_and_all_thumbnails(page: Page, toy: Path) -> None:
    page.open(toy, edges=True)
    before, shown = thumbs(page), page.run("return document.getElementById('image').toDataURL()")
    assert all(uri.startswith("data:image/png") for uri in before)
    page.element("#sides button[data-value=corrupt]").click()
    page.wait("return document.querySelector('#sides [aria-pressed=true]').textContent === 'corrupt'")
    # Some heads of the toy attend evenly to everything, whatever they see: only these look as before.
    changed = [new != old for new, old in zip(thumbs(page), before, strict=True)]
    assert sum(changed) > len(changed) / 2
    assert page.run("return document.getElementById('image').toDataURL()") != shown
    assert page.text("#caption") == "corrupt image"


def test_kinds_of_map_differ_and_say_what_they_are(page: Page, toy: Path) -> None:
    page.open(toy, edges=True)
    node = page.run("return nodes.find(n => n.image && n.kind === 'head').name")
    page.run("focusOn({node: nodes.find(n => n.name === arguments[0])})", node)
    said, pictures = set(), set()
    for kind in ("pattern", "score", "value"):
        page.element(f"#kinds button[data-value={kind}]").click()
        page.wait(f"return document.querySelector('#kinds [aria-pressed=true]').dataset.value === '{kind}'")
        said.add(page.text("#caption"))
        pictures.add("".join(thumbs(page)))
    assert len(said) == len(pictures) == 3


def test_the_numbers_behind_the_heat_are_those_of_the_model(page: Page, toy: Path) -> None:
    """Unpacked in the browser, all maps agree with a run of the model."""
    from circuitvit.export.maps import maps_of

    model = cv.load("catdog-tiny")
    images = torch.rand(2, 3, *model.preprocessing.size[1:], generator=torch.Generator().manual_seed(0))
    maps = maps_of(model, cv.Task(images[:1], images[1:], cv.logit_diff(0, 1)))
    page.open(toy, edges=True)
    page.run("choose({query: 5})")
    names = page.run("return nodes.filter(n => n.image).map(n => n.name)")
    for side_name, side in maps.sides.items():
        page.browser.execute_async_script("unpackQueries(arguments[0]).then(arguments[1])", side_name)

        def kept(name: str, kind: str, query: int | None, side_name: str = side_name) -> torch.Tensor:
            script = "return [...mapOf(arguments[0], arguments[1], arguments[2], arguments[3]).values]"
            return torch.tensor(page.run(script, side_name, name, kind, query), dtype=torch.float64)

        for name in names:
            if name in side.writes:
                expected = torch.tensor(side.writes[name])
                assert (kept(name, "pattern", None) - expected).abs().max() <= expected.max() / 400
                continue
            head = side.heads[name]
            for query, step in ((None, 0.07), (5, 0.6)):
                row = 0 if query is None else query
                pattern, scores = torch.tensor(head.pattern[row]), torch.tensor(head.scores[row])
                assert (kept(name, "pattern", query).log() - pattern.log()).abs().max() < step
                assert (kept(name, "score", query) - scores).abs().max() < step
                weighted, found = pattern * torch.tensor(head.weights), kept(name, "value", query)
                if not weighted.any():  # a head that training has silenced writes nothing
                    assert not found.any()
                    continue
                assert (found / weighted).log().abs().max() < step + 0.05


def test_clicking_a_patch_shows_what_attends_from_it(page: Page, toy: Path) -> None:
    page.open(toy, edges=True)
    page.run("focusOn({node: nodes.find(n => n.image && n.kind === 'head')})")
    before = thumbs(page)
    page.element("#image").click()  # its middle
    page.wait("return state.query !== null")
    page.wait("return !document.getElementById('query-reset').hidden")
    assert "row" in page.text("#caption")
    assert thumbs(page) != before
    page.element("#query-reset").click()
    page.wait("return document.getElementById('query-reset').hidden")
    assert thumbs(page) == before


def test_the_image_answers_to_the_keyboard(page: Page, toy: Path) -> None:
    page.open(toy, edges=True)
    page.element("#image").send_keys("\ue015")  # arrow down
    assert page.text("#patch").startswith("patch row")
    page.element("#image").send_keys("\ue007")  # Enter
    page.wait("return state.query !== null")


def test_a_model_without_a_class_token_shows_the_average(page: Page, tmp_path: Path) -> None:
    timm = import_timm()
    sizes = {
        "img_size": (24, 32),
        "patch_size": 8,
        "embed_dim": 16,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 3,
    }
    vit = timm.models.vision_transformer.VisionTransformer(class_token=False, global_pool="avg", **sizes)
    model = cv.wrap(vit.eval())
    images = torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    task = cv.Task(images, metric=cv.logit(0), ablation="zero")
    circuit = random_scores(model.graph).connected(12)
    page.open(draw(circuit, tmp_path / "pooled.html", model=model, task=task), edges=True)
    page.run("focusOn({node: nodes.find(n => n.image && n.kind === 'head')})")
    assert page.text("#caption").endswith("attention of the average patch")
    assert page.run("return [...document.querySelectorAll('#sides button')].map(b => b.textContent)") == [
        "clean"
    ]
    page.element("#image").click()
    page.wait("return !document.getElementById('query-reset').hidden")
    assert page.text("#query-reset") == "Back to the average"


# -- circuits with little in them ----------------------------------------------------------------


def test_a_circuit_without_scores_has_no_threshold(page: Page, tmp_path: Path) -> None:
    graph = transformer_graph(2, 2)
    plain_circuit = Circuit.from_edges(graph, ["input->m0", "m0->a1.h0<q>", "a1.h0->logits"])
    page.open(draw(plain_circuit, tmp_path / "x.html"), edges=True)
    assert page.element("#threshold").is_enabled() is False
    assert page.text("#counts") == "3 edges, 4 nodes"
    mouse(page, point_at(page, "edge", "input->m0"), click=True)
    assert "not scored" in page.text("#tip")


def test_an_empty_circuit_is_a_page_too(page: Page, tmp_path: Path) -> None:
    page.open(draw(Circuit.empty(transformer_graph(2, 2)), tmp_path / "x.html"), edges=True)
    assert page.counts() == (0, 0)


# -- hostile text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", [*HOSTILE, "</script><script>document.title='x'</script>", "<img src=x onerror=x()>"]
)
def test_hostile_text_is_inert(page: Page, tmp_path: Path, text: str) -> None:
    graph = transformer_graph(1, 2)
    made = type(MADE)(text, text, text, text)
    hostile = random_scores(graph).connected(8).with_provenance(made)
    page.open(draw(hostile, tmp_path / "hostile.html", title=text), edges=True)
    assert page.counts()[0] == len(hostile)
    assert page.run("return document.scripts.length") == 2
    assert page.run("return document.images.length") == 0
    assert page.text("h1") == page.run("return DATA.title || 'Circuit'")
    assert page.run("return document.title") != "x"


def test_hostile_names_of_nodes_are_only_names(page: Page, tmp_path: Path) -> None:
    stages = transformer_graph(1, 1).stages
    names = ("</script>", "\"'`${1}", "&lt;b&gt;", "__proto__", "constructor")
    safe = tuple(name.replace("<", "(").replace(">", ")") for name in names)
    stage = cv.graph.StageNodes("mlps", "mlp", 0, safe, safe)
    graph = Graph((stages[0], stage, stages[-1]))
    page.open(
        draw(EdgeScores(graph, random_scores(graph).values).top(graph.n_edges), tmp_path / "names.html")
    )
    assert page.counts()[0] == graph.n_edges
    assert set(page.run("return nodes.map(n => n.name)")) == {"input", "logits", *safe}


# -- the real model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = shared_data / "images" / "catdog"
    metric = cv.logit_diff("tabby", "Border collie")
    task = cv.Task(photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", metric)
    found = cv.attribute(model, task, method="eap", progress=False).connected(100)
    return draw(found, tmp_path_factory.mktemp("pages") / "real.html", model=model, task=task)


def test_the_page_of_a_real_model_is_small_and_works(page: Page, real: Path) -> None:
    assert real.stat().st_size < 1_500_000
    page.open(real, edges=True)
    assert page.counts()[0] == 100
    assert all(thumbs(page))
    heads = page.run("return nodes.filter(n => n.image && n.kind === 'head').length")
    assert page.run("return Object.keys(MAPS.sides.clean.full).length") == heads
    page.run("focusOn({node: nodes.find(n => n.image && n.kind === 'head')})")
    before: Any = thumbs(page)
    page.element("#image").click()
    page.wait("return !document.getElementById('query-reset').hidden")
    assert thumbs(page) != before
    slide(page, 40)
    assert page.counts()[0] <= 40


# -- nodes first, edges on demand ----------------------------------------------------------------


def test_the_page_starts_at_the_nodes_and_opens_edges_on_demand(
    page: Page, plain: Path, circuit: Circuit
) -> None:
    page.open(plain)
    own = {name for name in circuit if name.startswith("m2->") or name.endswith("->m2")}
    assert page.visible() == set()
    assert page.counts() == (len(circuit), len(circuit.nodes))
    mouse(page, point_at(page, "node", "m2"))
    assert page.visible() == own  # while the pointer is there
    mouse(page, point_at(page, "node", "m2"), click=True)
    mouse(page, (5, 5))
    assert page.visible() == own
    slide(page, 20)
    assert page.visible() == own & set(strongest(circuit, 20).pruned())
    page.element("body").send_keys("\ue00c")  # Escape
    assert page.visible() == set()
    page.element("#all-edges").click()
    assert page.visible() == set(strongest(circuit, 20))


def test_arcs_hold_every_edge_between_layers_once(page: Page, plain: Path, circuit: Circuit) -> None:
    page.open(plain)
    bundles = page.run("return view.bundles.map(each => [each.name, each.edges.map(edge => edge.name)])")
    assert sorted(edge for _, held in bundles for edge in held) == sorted(circuit)
    name, held = bundles[-1]
    page.element("#about .link").click()  # the strongest, which the keyboard reaches too
    assert page.text("#about h2") == name
    assert page.visible() == set(held)
    assert page.run("return document.querySelectorAll('.bundle.hot').length") == 1


ENDS = """
const screen = (edge, at) => edge.element.getPointAtLength(at).matrixTransform(edge.element.getScreenCTM());
const touches = (point, node) => {
  const box = [...node.element.querySelectorAll('.box')].map(each => each.getBoundingClientRect()).find(each => each.width);
  return point.x >= box.left - 4 && point.x <= box.right + 4 && point.y >= box.top - 8 && point.y <= box.bottom + 8;
};
return edges.filter(edge => getComputedStyle(edge.element).display !== 'none').map(edge =>
  [screen(edge, 0), nodes[edge.from], screen(edge, edge.element.getTotalLength()), nodes[edge.to]])
  .map(([start, from, end, to]) => touches(start, from) && touches(end, to));
"""  # noqa: E501 - JavaScript


def test_deep_models_start_folded_and_edges_still_end_at_their_nodes(page: Page, tmp_path: Path) -> None:
    page.open(draw(random_circuit(12, 12, 300), tmp_path / "deep.html"))
    buttons = "return [...document.querySelectorAll('.fold')].map(b => [b.getAttribute('aria-label').split(',')[0], b.getAttribute('aria-expanded')])"  # noqa: E501
    assert page.run(buttons) == [["layers 8–11", "false"], ["layers 4–7", "false"], ["layers 0–3", "false"]]
    shown = "return [svg.viewBox.baseVal.height, document.querySelectorAll('.node.folded').length]"
    height, folded = page.run(shown)
    assert folded == page.counts()[1] - 2  # all but input and logits
    for act in ("", "fold(blocks[1])", "document.getElementById('fold-all').click()"):
        page.run(act + "; focusOn(null); focusOn({node: nodes.find(n => n.name === 'm6')})")
        ends = page.run(ENDS)
        assert ends
        assert all(ends)
    page.run("document.getElementById('fold-all').click()")
    assert page.run(shown)[0] > 1.5 * height
    page.run("document.querySelector('.fold').focus()")
    key(page, "ENTER")
    assert page.run(buttons)[0] == ["layers 8–11", "false"]
    assert page.run("return document.activeElement.block.name") == "layers 8–11"  # the focus stays on it
    page.element("#all-edges").click()  # which are drawn where the layout has them
    assert page.run("return edges.every(edge => edge.element.getAttribute('d') === edge.path)")
