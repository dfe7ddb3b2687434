"""Nothing in a diagram overlaps anything else: boxes, texts and curves, read back from the SVG itself."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvit.export import picture_of, svg_of
from circuitvit.graph import Circuit, Graph, StageNodes, parse_edge, port_of
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores
from tests.export.geometry import Drawing
from tests.graph.strategies import circuits

SIZES = [(12, 3, 20), (12, 3, 100), (12, 3, 300), (4, 4, 20), (4, 4, 100), (4, 4, 300), (12, 12, 20)]
LARGE = [(12, 12, 100), (12, 12, 300), (24, 16, 300)]


def drawn(circuit: Circuit, title: str | None = None) -> Drawing:
    return Drawing(svg_of(picture_of(circuit, title)))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n_layers", "n_heads", "n_edges"), SIZES)
def test_nothing_overlaps(n_layers: int, n_heads: int, n_edges: int, seed: int) -> None:
    drawing = drawn(random_circuit(n_layers, n_heads, n_edges, seed))
    assert len(drawing.curves) == n_edges
    assert drawing.clashes() == []


@pytest.mark.parametrize(("n_layers", "n_heads", "n_edges"), LARGE)
def test_nothing_overlaps_in_a_large_model(n_layers: int, n_heads: int, n_edges: int) -> None:
    drawing = drawn(random_circuit(n_layers, n_heads, n_edges))
    assert len(drawing.curves) == n_edges
    assert drawing.clashes() == []


def test_nothing_overlaps_even_when_every_edge_is_drawn() -> None:
    assert drawn(Circuit.full(transformer_graph(4, 4))).clashes() == []


@pytest.mark.parametrize("n_heads", range(1, 7))
@pytest.mark.parametrize("parallel", [False, True])
def test_nothing_overlaps_whatever_the_number_of_heads(n_heads: int, parallel: bool) -> None:
    graph = transformer_graph(3, n_heads, parallel=parallel)
    assert drawn(random_scores(graph).connected(min(40, graph.n_edges))).clashes() == []


def test_nothing_overlaps_with_token_groups() -> None:
    graph = transformer_graph(4, 4).with_groups(("cls", "reg", "patch"))
    assert drawn(random_scores(graph).connected(120)).clashes() == []


@settings(max_examples=40)
@given(circuits())
def test_nothing_overlaps_in_graphs_of_any_shape(circuit: Circuit) -> None:
    """Several sources and readouts, receivers that are no senders, stages of any size; dead edges too."""
    drawing = drawn(circuit)
    assert drawing.clashes() == []
    assert [curve.name for curve in drawing.curves] == list(circuit)[::-1]  # unscored: first edges on top


def test_long_names_are_cut_and_stay_in_their_boxes() -> None:
    names = tuple(f"neuron_{index}_" + "W" * 60 for index in range(3))
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input.patch", "input.position", "input.class_token")),
            StageNodes("mlp", "mlp", 0, senders=names, receivers=names),
            StageNodes("readout", "readout", 1, receivers=("logits", "logits_of_the_distillation_token")),
        )
    )
    drawing = drawn(Circuit.full(graph), title="A title that is much too long for the picture " * 9)
    assert drawing.clashes() == []
    shown = [words for words, _ in drawing.texts if words.startswith("neuron")]
    assert len(shown) == 3
    assert all(words.endswith("…") for words in shown)
    assert set(names) <= set(drawing.boxes)  # whole, in the hover texts


def test_inputs_with_long_names_stand_side_by_side() -> None:
    ports = ("q", "k", "v", "gate")
    attention = StageNodes("attn", "attention", 0, ("a0.h0",), tuple(f"a0.h0<{port}>" for port in ports))
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            attention,
            StageNodes("readout", "readout", 1, receivers=("logits",)),
        )
    )
    assert drawn(Circuit.full(graph)).clashes() == []


# -- where things are ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tall() -> Drawing:
    return drawn(random_circuit(12, 3, 100))


def test_the_input_is_at_the_bottom_and_the_logits_on_top(tall: Drawing) -> None:
    assert tall.boxes["logits"].top == min(box.top for box in tall.boxes.values())
    assert tall.boxes["input"].bottom == max(box.bottom for box in tall.boxes.values())


def test_every_edge_runs_upwards_without_a_turn_back(tall: Drawing) -> None:
    for curve in tall.curves:
        heights = [y for _, y in curve.points]
        assert heights == sorted(heights, reverse=True)


def test_a_row_holds_the_heads_of_a_layer_and_a_column_a_head_of_all_layers(tall: Drawing) -> None:
    heads = {name: box for name, box in tall.boxes.items() if ".h" in name}
    rows = {name.partition(".")[0]: set[float]() for name in heads}
    columns = {name.partition(".")[2]: set[float]() for name in heads}
    for name, box in heads.items():
        rows[name.partition(".")[0]].add(box.top)
        columns[name.partition(".")[2]].add((box.left + box.right) / 2)
    assert all(len(tops) == 1 for tops in rows.values())
    assert all(max(middles) - min(middles) < 0.2 for middles in columns.values())
    by_layer = [next(iter(rows[f"a{layer}"])) for layer in range(12)]
    assert by_layer == sorted(by_layer, reverse=True)


def test_the_mlps_the_input_and_the_logits_share_a_column(tall: Drawing) -> None:
    spine = [box for name, box in tall.boxes.items() if ".h" not in name]
    middles = [(box.left + box.right) / 2 for box in spine]
    assert max(middles) - min(middles) < 0.2


def test_every_edge_leaves_the_top_of_its_sender_and_enters_under_its_port(tall: Drawing) -> None:
    for curve in tall.curves:
        edge = parse_edge(curve.name)
        sender, target = tall.boxes[edge.sender], tall.boxes[edge.receiver.partition("<")[0]]
        (x0, y0), (x1, y1) = curve.points[0], curve.points[-1]
        assert sender.left < x0 < sender.right
        assert y0 == pytest.approx(sender.top, abs=0.2)
        assert y1 == pytest.approx(target.bottom, abs=0.2)
        port = port_of(edge.receiver)
        if port:
            (place,) = [at for words, at in tall.own_texts[edge.receiver.partition("<")[0]] if words == port]
            assert x1 == pytest.approx((place.left + place.right) / 2, abs=0.2)


def test_a_small_circuit_makes_a_small_picture() -> None:
    small, large = drawn(random_circuit(12, 12, 20)), drawn(random_circuit(12, 12, 300))
    assert small.page.right < 0.7 * large.page.right
    assert small.page.bottom < 0.7 * large.page.bottom


@given(st.integers(0, 3))
def test_an_empty_circuit_is_a_picture_too(n_layers: int) -> None:
    drawing = drawn(Circuit.empty(transformer_graph(n_layers, 2)))
    assert drawing.clashes() == []
    assert not drawing.boxes
    assert "This circuit has no edges." in [words for words, _ in drawing.texts]
