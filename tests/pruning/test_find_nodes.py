"""Circuits of nodes: they carry the behaviour, no node can be spared, and every edge among them is there."""

from __future__ import annotations

import pytest

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from tests.rightness import CLEAN, CORRUPT, METRIC, MICRO, VisionTransformer, finished, micro

BAND = (0.8, 1.2)


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(CLEAN, CORRUPT, metric=METRIC)


def faithfulness(model: cv.Model, task: cv.Task, nodes: set[str]) -> float:
    """Of the nodes with all edges among them, by runs of their own."""
    edges = [
        edge
        for edge in model.graph.edges
        if edge.split("->")[0] in nodes and edge.split("->")[1].split("<")[0] in {*nodes, "logits"}
    ]
    circuit = cv.Circuit(model.graph, model.graph.mask_of(edges))
    clean, empty, kept = (
        cv.run(model, task, which)
        for which in (
            cv.Circuit(model.graph, model.graph.edge_mask),
            cv.Circuit(model.graph, model.graph.mask_of([])),
            circuit,
        )
    )
    of = [float((each[:, 0] - each[:, 1]).mean()) for each in (clean, empty, kept)]
    return (of[2] - of[1]) / (of[0] - of[1])


@pytest.mark.parametrize("fine", [False, True], ids=["coarse", "neurons"])
def test_no_single_node_can_be_spared(task: cv.Task, fine: bool) -> None:
    model = cv.wrap(micro())
    if fine:
        model = cv.refine_nodes(model, {"m0": cv.neurons([1, 5]), "m1": cv.neurons([0, 7, 30])})
    found = cv.find_nodes(model, task, band=BAND, progress=False)
    nodes = {name for name in found.circuit.nodes if name != "logits"} | {"input"}
    assert found.minimal
    assert faithfulness(model, task, nodes) == pytest.approx(found.faithfulness, abs=1e-9)
    assert BAND[0] <= found.faithfulness <= BAND[1]
    for node in nodes - {"input"}:
        assert not BAND[0] <= faithfulness(model, task, nodes - {node}) <= BAND[1], f"{node} can be spared"


def test_nodes_that_are_to_be_taken_last_are_kept_only_where_others_do_not_do(task: cv.Task) -> None:
    module = finished(VisionTransformer(**MICRO), seed=4)
    model = cv.refine_nodes(cv.wrap(module), {"m1": cv.neurons(range(40))})
    units = {node for node in model.graph.senders if node != "m1.rest"}
    assert BAND[0] <= faithfulness(model, task, units) <= BAND[1], "units alone are enough"
    scores = cv.attribute_nodes(model, task, "atp", progress=False)
    by_score = cv.find_nodes(model, task, scores=scores, band=BAND, progress=False)
    assert "m1.rest" in by_score.circuit.nodes
    for given in (scores, None):
        found = cv.find_nodes(model, task, scores=given, last="*.rest", band=BAND, progress=False)
        assert "m1.rest" not in found.circuit.nodes
    assert len(found.circuit.nodes) <= len(by_score.circuit.nodes)


def test_what_it_cannot_do_is_said(task: cv.Task) -> None:
    model = cv.wrap(micro())
    with pytest.raises(DataError, match="no number of the strongest nodes has a faithfulness of 5 to 6"):
        cv.find_nodes(model, task, band=(5.0, 6.0), progress=False)
    with pytest.raises(OptionError, match="from low to high"):
        cv.find_nodes(model, task, band=(1.1, 0.9), progress=False)
    for band in (0.9, "ab", (0.8, 0.9, 1.2)):
        with pytest.raises(OptionError, match="a band is two numbers"):
            cv.find_nodes(model, task, band=band, progress=False)  # type: ignore[arg-type]
    edges = cv.attribute(model, task, "eap", progress=False)
    with pytest.raises(OptionError, match="scores are of nodes, by attribute_nodes, not EdgeScores"):
        cv.find_nodes(model, task, scores=edges, progress=False)  # type: ignore[arg-type]
    other = cv.attribute_nodes(cv.wrap(micro(depth=1)), task, "atp", progress=False)
    with pytest.raises(OptionError, match="of another graph"):
        cv.find_nodes(model, task, scores=other, progress=False)
    with pytest.raises(NameNotFoundError, match="unknown node"):
        cv.find_nodes(model, task, last="*.rest", progress=False)
    few = cv.find_nodes(model, task, band=BAND, max_runs=4, progress=False)
    assert not few.minimal
