"""What an SVG diagram says: hover texts, looks, legend; and that no text can break out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import OptionError
from circuitvit.export import picture_of, svg_of
from circuitvit.export.style import COLOURS, dash_of
from circuitvit.graph import Circuit, EdgeScores, Provenance
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores
from tests.export.geometry import SVG, Drawing

GRAPH = transformer_graph(2, 2)
VALUES = {"input->m0": -2.0, "m0->a1.h0<q>": 1.0, "a1.h0->logits": -0.5, "input->a1.h0<v>": 0.0}


def small(direction: str = "noising") -> Circuit:
    values = np.zeros(GRAPH.shape)
    for name, value in VALUES.items():
        values[GRAPH.edge_index(name)] = value
    made = Provenance("toy", method="by hand", parameters={"direction": direction})
    return Circuit.from_edges(GRAPH, VALUES, made).with_scores(EdgeScores(GRAPH, values))


def drawn(circuit: Circuit, **options: object) -> Drawing:
    return Drawing(svg_of(picture_of(circuit, **options)))  # type: ignore[arg-type]


def words_of(drawing: Drawing) -> str:
    return "\n".join(words for words, _ in drawing.texts)


# -- edges ---------------------------------------------------------------------------------------


def test_every_edge_says_its_name_score_and_meaning_when_hovered() -> None:
    said = {curve.said for curve in drawn(small()).curves}
    assert said == {
        "input->m0: -2 (supports)",
        "m0->a1.h0<q>: +1 (opposes)",
        "a1.h0->logits: -0.5 (supports)",
        "input->a1.h0<v>: +0 (no effect)",
    }


def test_the_strongest_edge_is_drawn_last_and_so_on_top() -> None:
    names = [curve.name for curve in drawn(small()).curves]
    assert names == ["input->a1.h0<v>", "a1.h0->logits", "m0->a1.h0<q>", "input->m0"]


def test_width_is_proportional_to_magnitude_and_colour_tells_the_sign() -> None:
    curves = {curve.name: curve for curve in drawn(small()).curves}
    assert curves["m0->a1.h0<q>"].width == pytest.approx(curves["input->m0"].width / 2)
    assert curves["a1.h0->logits"].width == pytest.approx(curves["input->m0"].width / 4)
    colours = {name: curve.attributes["stroke"] for name, curve in curves.items()}
    assert colours["input->m0"] == colours["a1.h0->logits"] == COLOURS["supports"]
    assert colours["m0->a1.h0<q>"] == COLOURS["opposes"]
    assert colours["input->a1.h0<v>"] == COLOURS["unscored"]


def test_when_edges_are_restored_a_positive_effect_supports() -> None:
    for drawing in (drawn(small(), direction="denoising"), drawn(small("denoising"))):
        strongest = drawing.curves[-1]
        assert strongest.said == "input->m0: -2 (opposes)"
        assert "restoring lowers the metric (opposes)" in words_of(drawing)


def test_without_scores_all_edges_look_alike() -> None:
    drawing = drawn(replace(small(), values=None))
    assert len({(curve.width, curve.attributes["stroke"]) for curve in drawing.curves}) == 1
    assert {curve.said for curve in drawing.curves} == set(VALUES)
    assert "edge without a score" in words_of(drawing)
    assert "effect" not in [words for words, _ in drawing.texts]  # no scale of widths


def test_only_the_strongest_edges_are_drawn_when_so_asked() -> None:
    drawing = drawn(small(), max_edges=2)
    assert [curve.name for curve in drawing.curves] == ["m0->a1.h0<q>", "input->m0"]
    assert "4 of 46 edges, 4 of 8 nodes; drawn: the 2 strongest" in words_of(drawing)
    assert set(drawing.boxes) == {"input", "m0", "a1.h0"}
    assert "No edges are shown." in words_of(drawn(small(), max_edges=0))


@pytest.mark.parametrize("options", [{"max_edges": -1}, {"direction": "sideways"}])
def test_options_that_make_no_sense_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(OptionError, match=r"max_edges must be|direction is"):
        drawn(small(), **options)


def test_token_groups_have_dash_patterns_that_the_legend_explains() -> None:
    graph = GRAPH.with_groups(("cls", "patch"))
    drawing = drawn(Circuit.from_edges(graph, ["input->m0@cls", "m0->logits@patch"]))
    dashes = {curve.name: curve.attributes.get("stroke-dasharray", "") for curve in drawing.curves}
    assert dashes == {"input->m0@cls": dash_of(0), "m0->logits@patch": dash_of(1)}
    assert dash_of(0) != dash_of(1)
    assert "tokens: cls" in words_of(drawing)
    assert "tokens: patch" in words_of(drawing)


# -- nodes ---------------------------------------------------------------------------------------


def test_only_nodes_of_the_circuit_are_boxes_and_the_others_are_dots() -> None:
    drawing = drawn(small())
    assert set(drawing.boxes) == set(small().nodes)
    hover = {dot.findtext(f"{SVG}title") for dot in drawing.dots}
    assert hover == {f"{name} (outside the circuit)" for name in set(GRAPH.nodes) - set(small().nodes)}


def test_inputs_of_a_head_are_told_apart_by_letter_and_the_used_ones_are_dark() -> None:
    node = next(
        group
        for group in drawn(small()).root.iter(f"{SVG}g")
        if (group.findtext(f"{SVG}title") or "").startswith("a1.h0")
    )
    weights = {text.text: text.get("font-weight", "400") for text in node.iter(f"{SVG}text")}
    assert weights == {"a1.h0": "600", "q": "700", "k": "400", "v": "700"}
    assert len(node.findall(f"{SVG}path")) == 2  # an arrow head under each used input


def test_a_node_says_how_many_edges_it_has_when_hovered() -> None:
    titles = {title.text for title in drawn(small()).root.iter(f"{SVG}title")}
    assert {"a1.h0: 2 edges in, 1 out", "input: 0 edges in, 2 out"} <= titles


# -- words around it -----------------------------------------------------------------------------


def test_the_legend_says_what_colours_and_widths_mean_and_where_the_circuit_is_from() -> None:
    words = words_of(drawn(small()))
    for said in (
        "Circuit of toy",
        "ablating lowers the metric (supports)",
        "ablating raises the metric (opposes)",
        "inputs of a head: query, key, value (dark: used)",
        "node outside the circuit",
        "4 of 46 edges, 4 of 8 nodes · edges run upwards",
        "model: toy · method: by hand · circuitvit",
    ):
        assert said in words


def test_shares_have_no_sign_and_the_legend_says_what_they_are_of() -> None:
    values = np.abs(small().values)  # type: ignore[arg-type]
    shares = EdgeScores(GRAPH, values, provenance=Provenance(parameters={"shares_of": "the votes"}))
    circuit = small().with_scores(shares)
    drawing = drawn(circuit)
    assert "as wide as its share of the votes" in words_of(drawing)
    assert "metric" not in words_of(drawing)
    assert "share" in [words for words, _ in drawing.texts]
    assert {curve.attributes["stroke"] for curve in drawing.curves} == {COLOURS["unscored"]}
    assert drawing.curves[-2].width == pytest.approx(drawing.curves[-1].width / 2)
    assert drawing.curves[-1].said == "input->m0: 2 (share of the votes)"
    again = circuit.with_scores(EdgeScores(GRAPH, values))
    assert "(opposes)" in words_of(drawn(again)), "effects take the place of shares"


def test_the_scale_of_widths_has_numbers() -> None:
    words = [words for words, _ in drawn(small()).texts]
    scale = words[words.index("effect") + 1 :][:3]
    assert scale == ["2", "1", "0.4"]


def test_a_screen_reader_is_told_what_the_picture_is_and_which_edges_are_strongest() -> None:
    root = drawn(small()).root
    assert root.get("role") == "img"
    by_id = {element.get("id"): element.text or "" for element in root if element.get("id")}
    title, about = (by_id[key] for key in root.attrib["aria-labelledby"].split())
    assert title == "Circuit of toy: 4 of 46 edges, 4 of 8 nodes"
    assert "Strongest edges: input->m0: -2 (supports); m0->a1.h0<q>: +1 (opposes)" in about


def test_two_pictures_can_share_a_page() -> None:
    one, other = (drawn(circuit).root for circuit in (small(), random_circuit(2, 2, 10)))
    assert one.attrib["aria-labelledby"] != other.attrib["aria-labelledby"]


def test_texts_are_texts_in_fonts_that_everybody_has() -> None:
    drawing = drawn(small())
    assert drawing.root.attrib["font-family"].endswith("sans-serif")
    assert not list(drawing.root.iter(f"{SVG}image"))
    assert not [element for element in drawing.root.iter() if "href" in "".join(element.attrib)]


# -- whatever the names hold ---------------------------------------------------------------------

HOSTILE = [
    "<script>alert('x')</script>",
    "\"/><image href='x'/>",
    "]]><!-- & &lt; &#0; -->",
    "two\nlines\r\n\tand a tab",
    "null\x00 bell\x07 escape\x1b[31m delete\x7f \x85",
    "reversed \u202etxet\u202c \u2066isolated\u2069 \u200bzero",
    "lone \ud800 surrogate, \ufffe and \uffff",
    "emoji 🐈‍⬛ and 日本語 and عربى",
    "W" * 5000,
    "",
    " ",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    made = Provenance(text, text, text, text, {"direction": text})
    circuit = small().with_provenance(made)
    plain, spoiled = drawn(small(), title="plain"), drawn(circuit, title=text)
    assert {element.tag for element in spoiled.root.iter()} == {element.tag for element in plain.root.iter()}
    assert spoiled.clashes() == []
    everything = "".join(spoiled.root.itertext())
    assert not any(letter in everything for letter in "\x00\x07\x1b\x7f\u202e\u2066\u200b\ud800\ufffe\uffff")


@given(st.text(), st.text(st.characters(codec=None), max_size=30))
def test_any_text_gives_well_formed_xml_without_new_elements(title: str, model: str) -> None:
    circuit = Circuit.empty(GRAPH).with_provenance(Provenance(model=model))
    root = ET.fromstring(svg_of(picture_of(circuit, title)).encode())
    assert {element.tag.removeprefix(SVG) for element in root.iter()} == {
        *("svg", "title", "desc", "style", "rect", "text", "g", "circle")
    }


@pytest.mark.parametrize("name", ["a\"b'c&d", "x;}--", "日本", "node", "a:b\\N", "-1"])
def test_node_names_with_markup_characters_survive_as_text(name: str) -> None:
    graph = transformer_graph(1, 1)
    first = replace(graph.stages[0], senders=(name,))
    odd = replace(graph, stages=(first, *graph.stages[1:]))
    drawing = drawn(Circuit.from_edges(odd, [f"{name}->m0", "m0->logits"]))
    assert name in drawing.boxes
    assert [curve.name for curve in drawing.curves] == ["m0->logits", f"{name}->m0"]
    assert drawing.clashes() == []


# -- determinism ---------------------------------------------------------------------------------


def test_the_same_circuit_gives_the_same_bytes_in_every_process() -> None:
    """Also under another seed for the hashes of strings, which decides the order of sets."""
    code = (
        "import sys\nfrom circuitvit.export import picture_of, svg_of\n"
        "from tests.export.cases import random_circuit\n"
        "sys.stdout.buffer.write(svg_of(picture_of(random_circuit(12, 3, 300))).encode())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "0" else "0"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    there = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    assert there.stdout == svg_of(picture_of(random_circuit(12, 3, 300))).encode()


def test_numbers_have_one_decimal_so_that_files_stay_small() -> None:
    svg = svg_of(picture_of(random_scores(transformer_graph(12, 3)).connected(300)))
    assert len(svg) < 200_000
