"""What notebooks show: harmless whatever names say, with text beside it."""

from __future__ import annotations

import re

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.graph import Circuit, EdgeScores, Graph, Provenance, StageNodes
from tests.verification.cases import some_circuit, tiny_model, tiny_task

HOSTILE = "<script>alert('1')</script>\"&\n\u202ex"
NODE = "<script>x</script>".replace("<", "(").replace(">", ")")


def hostile_graph() -> Graph:
    return Graph(
        (
            StageNodes("input", HOSTILE, 0, senders=("input",)),
            StageNodes("mlp0", "mlp", 0, senders=("m0",), receivers=("m0",)),
            StageNodes("readout", "readout", 1, receivers=("logits",)),
        ),
        groups=("cls", "a&b\"'<i>"),
    )


def assert_inert(html: str) -> None:
    visible = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert "<script" not in visible
    assert "<i>" not in visible
    assert "\u202e" not in visible
    assert "alert('1')" not in visible
    opened = re.findall(r"<(\w+)", visible)
    assert set(opened) <= {"div", "table", "tr", "td", "img"}
    assert opened.count("td") == visible.count("</td>")


def test_graph_scores_and_circuit_are_inert() -> None:
    graph = hostile_graph()
    values = np.where(graph.edge_mask, 0.5, 0.0)
    origin = Provenance(model=HOSTILE, task=HOSTILE, method=HOSTILE)
    for shown in (
        graph,
        EdgeScores(graph, values, method=HOSTILE),
        Circuit(graph, graph.edge_mask, values, provenance=origin),
        Circuit.empty(graph),
    ):
        assert_inert(shown._repr_html_())
        assert repr(shown).startswith(type(shown).__name__)


def test_a_circuit_shows_its_diagram() -> None:
    html = some_circuit()._repr_html_()
    assert_inert(html)
    assert "data:image/svg+xml;base64," in html
    assert "data:image" not in Circuit.empty(tiny_model().graph)._repr_html_()


def test_a_task_is_described_without_its_pixels() -> None:
    task = tiny_task(5)
    assert repr(task).startswith("Task(clean tensor 5 x 3 x 8 x 8, corrupt tensor")
    assert_inert(task._repr_html_())
    hostile = cv.Task(HOSTILE, [HOSTILE] * 3, cv.logit_diff(HOSTILE, 300 * "x"), ablation="mean")
    assert_inert(hostile._repr_html_())
    assert "3 files" in repr(hostile)
    assert "the model's own top class" in repr(cv.Task("cats", "dogs"))
    assert len(repr(hostile)) < 400


@pytest.mark.filterwarnings("ignore")
def test_a_report_shows_its_figures() -> None:
    report = cv.verify(
        tiny_model(), tiny_task(6), some_circuit(), n_random=3, n_bootstrap=100, progress=False
    )
    html = report._repr_html_()
    assert_inert(html)
    assert "faithfulness" in html
    assert "random circuits" in html
