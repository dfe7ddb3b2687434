"""Two circuits in one figure: every edge is shown as what it is, shared or only in one."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest

from circuitvit.errors import OptionError
from circuitvit.export import DIFFERENCE_FORMATS, difference_of, draw_difference
from circuitvit.graph import Circuit
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit
from tests.export.geometry import SVG, Drawing
from tests.export.test_svg import HOSTILE

FIRST, SECOND = random_circuit(4, 2, 40, seed=1), random_circuit(4, 2, 30, seed=2)


def drawn(tmp_path: Path, **options: object) -> Drawing:
    path = draw_difference(FIRST, SECOND, tmp_path / "x.svg", names=("cats", "dogs"), **options)  # type: ignore[arg-type]
    return Drawing(path.read_text(encoding="utf-8"))


def test_every_edge_looks_like_the_part_that_it_belongs_to(tmp_path: Path) -> None:
    drawing = drawn(tmp_path)
    looks = {
        curve.name: (curve.attributes["stroke"], "stroke-dasharray" in curve.attributes)
        for curve in drawing.curves
    }
    assert set(looks) == set(FIRST | SECOND)
    shared, first, second = (
        {looks[name] for name in part} for part in (FIRST & SECOND, FIRST - SECOND, SECOND - FIRST)
    )
    assert len(shared) == len(first) == len(second) == 1
    assert len({*shared, *first, *second}) == 3
    assert next(iter(second))[1] is True  # told apart without colour
    assert drawing.clashes() == []


def test_hover_texts_give_both_effects(tmp_path: Path) -> None:
    said = {curve.name: curve.said for curve in drawn(tmp_path).curves}
    for name in FIRST & SECOND:
        assert said[name].startswith(f"{name}: shared (cats ")
        assert "dogs" in said[name]
    for name in FIRST - SECOND:
        assert said[name].startswith(f"{name}: only in cats (cats ")


def test_counts_are_those_of_the_sets() -> None:
    picture = difference_of(FIRST, SECOND)
    shared, only, other = len(FIRST & SECOND), len(FIRST - SECOND), len(SECOND - FIRST)
    index = FIRST.jaccard(SECOND)
    words = f"{shared} edges shared, {only} only in A, {other} only in B; Jaccard index {index:.3g}"
    assert picture.counts == words
    assert "the 10 strongest" in difference_of(FIRST, SECOND, max_edges=10).counts


def test_panels_show_each_circuit_and_the_difference_in_the_same_places(tmp_path: Path) -> None:
    path = draw_difference(FIRST, SECOND, tmp_path / "x.svg", names=("cats", "dogs"), panels=True)
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    panels = [group for group in root if group.tag == f"{SVG}g"]
    edges = []
    places: list[dict[str, str | None]] = []
    for panel in panels:
        titles = [
            path.findtext(f"{SVG}title") or ""
            for path in panel.iter(f"{SVG}path")
            if path.get("class") == "edge"
        ]
        edges.append({title.split(": ")[0] for title in titles})
        boxes = [group for group in panel.iter(f"{SVG}g") if (group.get("class") or "").startswith("node")]
        places.append(
            {str(box.findtext(f"{SVG}title")).split(":")[0]: box.find(f"{SVG}rect").get("x") for box in boxes}
        )  # type: ignore[union-attr]
    assert edges == [set(FIRST), set(SECOND), set(FIRST | SECOND)]
    for circuit, boxes_of in zip((FIRST, SECOND), places[:2], strict=True):
        assert set(boxes_of) == set(circuit.nodes)
        assert all(places[2][name] == x for name, x in boxes_of.items())
    words = Counter(text.text for text in root.iter(f"{SVG}text"))
    assert words["cats: 40 edges"] == words["dogs: 30 edges"] == words["difference"] == 1


@pytest.mark.parametrize("ending", DIFFERENCE_FORMATS)
def test_every_format_is_written_and_the_same_each_time(ending: str, tmp_path: Path) -> None:
    if ending in ("pdf", "png"):
        pytest.importorskip("matplotlib")
    first, second = (draw_difference(FIRST, SECOND, tmp_path / f"{n}.{ending}").read_bytes() for n in "ab")
    assert first == second


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="belongs to another graph"):
        draw_difference(FIRST, random_circuit(3, 2, 5), tmp_path / "x.svg")
    with pytest.raises(OptionError, match=r"cannot draw a \.html file"):
        draw_difference(FIRST, SECOND, tmp_path / "x.html")
    with pytest.raises(OptionError, match="side by side"):
        draw_difference(FIRST, SECOND, tmp_path / "x.tex", panels=True)


def test_circuits_without_scores_and_empty_ones(tmp_path: Path) -> None:
    graph = transformer_graph(2, 2)
    plain = Circuit.from_edges(graph, ["input->m0", "m0->logits"])
    picture = difference_of(plain, Circuit.empty(graph))
    assert {edge.look.width for edge in picture.edges} == {1.6}
    assert [words for words, _ in picture.key] == ["only in A"]
    for panels in (False, True):
        draw_difference(Circuit.empty(graph), Circuit.empty(graph), tmp_path / "x.svg", panels=panels)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_are_inert(text: str, tmp_path: Path) -> None:
    path = draw_difference(FIRST, SECOND, tmp_path / "x.svg", names=(text, "B"), title=text, panels=True)
    plain = draw_difference(FIRST, SECOND, tmp_path / "y.svg", names=("A", "B"), panels=True)
    tags = [{element.tag for element in ET.parse(each).iter()} for each in (path, plain)]
    assert tags[0] == tags[1]
