"""Node effects from edge scores, and curves of faithfulness."""

from __future__ import annotations

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.errors import DataError, NameNotFoundError
from circuitvit.graph import EdgeScores
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.views import effect_heatmap, faithfulness_curve
from tests.verification.cases import tiny_model, tiny_task


def test_a_nodes_effect_is_the_sum_over_the_edges_that_leave_it() -> None:
    graph = transformer_graph(2, 3)
    rng = np.random.default_rng(0)
    scores = EdgeScores(graph, rng.standard_normal(graph.shape))
    heatmap = effect_heatmap(scores)
    for layer in range(2):
        for head in range(3):
            leaving = [
                value for edge, value in scores.to_dict().items() if edge.startswith(f"a{layer}.h{head}->")
            ]
            assert heatmap.heads[layer, head] == pytest.approx(-sum(leaving))
            assert effect_heatmap(scores, "magnitude").heads[layer, head] == pytest.approx(
                sum(map(abs, leaving))
            )
    assert heatmap.layers == (0, 1)
    assert set(heatmap.others) == {"input"}
    total = np.nansum(heatmap.heads) + np.nansum(heatmap.mlps) + heatmap.others["input"]
    assert total == pytest.approx(-scores.values.sum())


def test_the_sign_is_support_in_both_directions() -> None:
    graph = transformer_graph(1, 1)
    values = np.where(graph.edge_mask, 1.0, 0.0)
    assert effect_heatmap(EdgeScores(graph, values, direction="denoising")).mlps[0] == 1
    assert effect_heatmap(EdgeScores(graph, values)).mlps[0] == -1
    with pytest.raises(NameNotFoundError, match="did you mean 'signed'"):
        effect_heatmap(EdgeScores(graph, values), "sgned")  # type: ignore[arg-type]


def test_a_node_effect_predicts_what_ablating_the_whole_node_does() -> None:
    """The input's node effect, with exact edge scores of a linear-ish chain, has the sign of the whole."""
    model, task = tiny_model(), tiny_task(3)
    heatmap = effect_heatmap(cv.attribute(model, task, "eap", progress=False))
    assert heatmap.heads.shape == (2, 2)
    assert np.isfinite(heatmap.heads).all()


def test_layers_without_a_part_are_empty() -> None:
    from circuitvit.graph import Graph, StageNodes

    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            StageNodes("mlp0", "mlp", 0, senders=("m0",), receivers=("m0",)),
            StageNodes(
                "attn1", "attention", 1, senders=("a1.h0", "a1.h1"), receivers=("a1.h0<q>", "a1.h1<q>")
            ),
            StageNodes("readout", "readout", 2, receivers=("logits",)),
        )
    )
    heatmap = effect_heatmap(EdgeScores(graph, np.where(graph.edge_mask, -1.0, 0.0)))
    assert np.isnan(heatmap.heads[0]).all()
    assert np.isnan(heatmap.mlps[1])
    assert heatmap.heads[1].tolist() == [1, 1]
    assert heatmap.figure() is not None


def test_curves_are_sorted_and_checked() -> None:
    curve = faithfulness_curve([(10, 0.5, 0.4, 0.6), (2, 0.1, 0.0, 0.2)], "found")
    assert curve.edges.tolist() == [2, 10]
    assert curve.low is not None
    assert curve.low.tolist() == [0.0, 0.4]
    for points, message in (
        ([], "no points"),
        ([(1, 2, 3)], "each point is"),
        ([(1, 0.5), (2, 0.5, 0.4, 0.6)], "all alike"),
        ([(1, float("nan"))], "finite"),
        ([(-1, 0.5)], "not negative"),
    ):
        with pytest.raises(DataError, match=message):
            faithfulness_curve(points)


def test_what_find_found_is_a_curve() -> None:
    finding = cv.find(tiny_model(), tiny_task(4), plan=cv.Plan(10, 20, 4), progress=False)
    curve = faithfulness_curve(finding.candidates, "learned masks")
    assert curve.edges[-1] == tiny_model().graph.n_edges
    assert curve.faithfulness[-1] == 1.0
