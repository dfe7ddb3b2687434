"""DOT source: the same picture for Graphviz, with every name quoted safely."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from typing import Any

import pytest

from circuitvit.export import dot_of, picture_of
from circuitvit.graph import Circuit, Graph, Provenance, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_circuit, random_scores
from tests.export.test_svg import HOSTILE

needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="the Graphviz program dot is not installed"
)
CIRCUIT = random_circuit(4, 2, 30)


def parsed(source: str) -> dict[str, Any]:
    """What Graphviz itself understands of a source, places included."""
    done = subprocess.run(["dot", "-Tjson"], input=source.encode(), capture_output=True, check=True)
    assert done.stderr == b""
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def test_every_edge_of_the_circuit_is_there_with_its_port() -> None:
    source = dot_of(picture_of(CIRCUIT)).source
    visible = [line for line in source.splitlines() if "->" in line and "invis" not in line]
    assert len(visible) == 30
    for name in CIRCUIT:
        sender, _, receiver = name.partition("->")
        node, _, port = receiver.rstrip(">").partition("<")
        end = f'"{node}":port_{port}:s' if port else f"{node}:s"
        start = f'"{sender}":n' if "." in sender else f"{sender}:n"
        assert any(line.strip().startswith(f"{start} -> {end} [") for line in visible), name


def test_colours_and_widths_are_those_of_the_svg() -> None:
    picture = picture_of(CIRCUIT)
    source = dot_of(picture).source
    for edge in picture.edges:
        assert f'color="{edge.look.colour}' in source
        assert f"penwidth={edge.look.width:.2f}" in source


def test_only_nodes_of_the_circuit_are_there() -> None:
    source = dot_of(
        picture_of(Circuit.from_edges(transformer_graph(2, 2), ["input->m1", "m1->logits"]))
    ).source
    assert "m1" in source
    assert "m0" not in source
    assert "a0.h0" not in source


def test_the_same_circuit_gives_the_same_source() -> None:
    assert dot_of(picture_of(CIRCUIT)).source == dot_of(picture_of(random_circuit(4, 2, 30))).source


@pytest.mark.dot
@needs_dot
def test_graphviz_puts_the_input_below_and_every_stage_on_a_rank_of_its_own() -> None:
    content = parsed(dot_of(picture_of(CIRCUIT)).source)
    height = {node["name"]: float(node["pos"].split(",")[1]) for node in content["objects"] if "pos" in node}
    rows: dict[int, set[float]] = {}
    stages = {id(stage): row for row, stage in enumerate(CIRCUIT.graph.stages)}
    for name, y in height.items():
        rows.setdefault(stages[id(CIRCUIT.graph.stage_of_node[name])], set()).add(y)
    assert all(len(heights) == 1 for heights in rows.values())
    in_order = [heights.pop() for _, heights in sorted(rows.items())]
    assert in_order == sorted(in_order)


@pytest.mark.dot
@needs_dot
@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_inert(text: str) -> None:
    made = Provenance(text, text, text, text)
    picture = picture_of(CIRCUIT.with_provenance(made), title=text)
    plain, spoiled = parsed(dot_of(picture_of(CIRCUIT)).source), parsed(dot_of(picture).source)
    for kind in ("objects", "edges"):
        assert len(spoiled[kind]) == len(plain[kind])


NAMES = ("a:b", 'q"uote', "back\\slash\\", "\\N\\G", "node", "{record|bar}", "&amp;", "日本", "; x", "]", "#")


@pytest.mark.dot
@needs_dot
def test_names_that_mean_something_in_dot_are_only_names() -> None:
    names = tuple(name.replace(" ", "_") for name in NAMES)
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            StageNodes("heads", "attention", 0, names, tuple(f"{name}<{p}>" for p in "qé" for name in names)),
            StageNodes("mlps", "mlp", 0, tuple(f"{n}2" for n in names), tuple(f"{n}2" for n in names)),
            StageNodes("readout", "readout", 1, receivers=("logits",)),
        )
    )
    content = parsed(dot_of(picture_of(Circuit.full(graph))).source)
    nodes = [node for node in content["objects"] if "pos" in node]
    assert len(nodes) == 2 * len(names) + 2
    assert len([edge for edge in content["edges"] if edge.get("style") != "invis"]) == graph.n_edges
    tips = {node["tooltip"] for node in nodes}
    assert {name.replace("\\", "\\\\") for name in names} <= tips


@pytest.mark.dot
@needs_dot
def test_graphviz_draws_three_hundred_edges() -> None:
    content = parsed(dot_of(picture_of(random_circuit(12, 3, 300))).source)
    assert len([edge for edge in content["edges"] if edge.get("style") != "invis"]) == 300


@pytest.mark.dot
@needs_dot
def test_graphviz_draws_token_groups_and_empty_circuits() -> None:
    graph = transformer_graph(2, 2).with_groups(("cls", "reg", "patch"))
    styles = {
        edge["style"]
        for edge in parsed(dot_of(picture_of(random_scores(graph).connected(60))).source)["edges"]
    }
    assert {"solid", "dashed", "dotted"} <= styles
    assert "This circuit has no edges." in dot_of(picture_of(Circuit.empty(graph))).source
    parsed(dot_of(picture_of(Circuit.empty(graph))).source)


def test_scores_are_optional() -> None:
    source = dot_of(picture_of(replace(CIRCUIT, values=None))).source
    assert len(set(re.findall(r"penwidth=([\d.]+)", source))) == 1
