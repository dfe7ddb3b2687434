"""Patterns: each row of the module's table, and refusals that say which part is wrong."""

from __future__ import annotations

import pytest

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.graph import parse_edge
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification import select_edges
from circuitvit.verification.null import edges_of_same_kind

GRAPH = transformer_graph(3, 2)


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("a2.h1 -> logits", lambda edge: (edge.sender, edge.receiver) == ("a2.h1", "logits")),
        ("a2.*<v> -> logits", lambda edge: edge.sender.startswith("a2.") and edge.receiver == "logits"),
        ("m0 -> a*.*<v>", lambda edge: edge.sender == "m0" and edge.receiver.endswith("<v>")),
        ("a2.h0<k>", lambda edge: edge.receiver == "a2.h0<k>"),
        ("a1.h1", lambda edge: edge.sender == "a1.h1"),
        ("m0", lambda edge: edge.sender == "m0"),
        ("logits", lambda edge: edge.receiver == "logits"),
        ("* -> a1.h0", lambda edge: edge.receiver.startswith("a1.h0<")),
        ("*", lambda edge: True),
    ],
)
def test_a_pattern_names_exactly_its_edges(pattern: str, wanted: object) -> None:
    expected = [name for name in GRAPH.edges if wanted(parse_edge(name))]  # type: ignore[operator]
    assert expected
    assert list(select_edges(GRAPH, pattern)) == expected


def test_patterns_and_circuits_add_up_and_groups_select() -> None:
    one = cv.Circuit.from_edges(GRAPH, ["input->m2"])
    assert list(select_edges(GRAPH, [one, "m2->logits"])) == ["input->m2", "m2->logits"]
    grouped = GRAPH.with_groups(("cls", "patch"))
    assert list(select_edges(grouped, "m2 -> logits@cls")) == ["m2->logits@cls"]
    assert len(select_edges(grouped, "m2 -> logits")) == 2


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a9.h1 -> logits", "sender 'a9.h1'"),
        ("m0 -> logit", "did you mean 'logits'"),
        ("m2 -> m0", "none of these senders comes before"),
        ("m0 -> m1@dog", "token group 'dog'"),
        ("attention", "unknown receiver 'attention'"),
    ],
)
def test_a_pattern_without_edges_is_refused(pattern: str, message: str) -> None:
    with pytest.raises(NameNotFoundError, match=message):
        select_edges(GRAPH, pattern)
    with pytest.raises(OptionError, match="needs edges"):
        select_edges(GRAPH, [])


def test_random_edges_are_of_the_same_kind_and_others() -> None:
    own = select_edges(GRAPH, ["a2.h1 -> logits", "m0 -> m1"])
    drawn = edges_of_same_kind(own, 5, seed=1)
    assert len(drawn) == len(set(drawn)) == 5
    for each in drawn:
        senders = sorted(
            (GRAPH.stage_of_node[parse_edge(name).sender].kind, parse_edge(name).receiver[0]) for name in each
        )
        assert senders == [("attention", "l"), ("mlp", "m")]
        assert not len(each & own)
    assert len(edges_of_same_kind(own, 1000)) == 5 * 2  # five other heads, two other pairs of MLPs
    assert edges_of_same_kind(select_edges(GRAPH, "*"), 5) == []
