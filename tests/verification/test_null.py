"""Random connected circuits: what is matched, uniformity where it can be counted, and honest refusals."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification.null import (
    complement_circuits,
    connected_circuits,
    random_path,
    relabelled_circuits,
    stage_profile,
)


@given(st.integers(0, 10_000), st.booleans())
def test_size_profile_and_connectedness_are_those_of_the_circuit(seed: int, grouped: bool) -> None:
    graph = transformer_graph(2, 2)
    graph = graph.with_groups(("cls", "patch")) if grouped else graph
    kept = np.random.default_rng(seed).random(graph.shape) < 0.4
    circuit = cv.Circuit(graph, kept).pruned()
    for each in connected_circuits(circuit, 3, seed, steps=50):
        assert each.pruned() == each
        assert np.array_equal(stage_profile(each), stage_profile(circuit))


def test_the_walk_is_uniform_where_all_circuits_can_be_listed() -> None:
    graph = transformer_graph(1, 2)
    circuit = cv.Circuit.from_edges(graph, ["input->a0.h0<v>", "a0.h0->logits", "input->logits"])
    profile = stage_profile(circuit)
    possible = []
    for edges in combinations(graph.edges, 3):
        each = cv.Circuit.from_edges(graph, edges)
        if each.pruned() == each and np.array_equal(stage_profile(each), profile):
            possible.append(each)
    counts = Counter(connected_circuits(circuit, 600, seed=3, steps=60))
    assert set(counts) == set(possible)
    expected = 600 / len(possible)
    statistic = sum((counts[each] - expected) ** 2 / expected for each in possible)
    assert statistic < 2.5 * len(possible)


def test_the_same_seed_gives_the_same_circuits() -> None:
    circuit = cv.Circuit.from_edges(transformer_graph(2, 4), ["input->a1.h0<v>", "a1.h0->logits"])
    assert connected_circuits(circuit, 4, 1) == connected_circuits(circuit, 6, 1)[:4]
    assert connected_circuits(circuit, 4, 1) != connected_circuits(circuit, 4, 2)
    assert connected_circuits(cv.Circuit.empty(circuit.graph), 2) == (cv.Circuit.empty(circuit.graph),) * 2
    with pytest.raises(OptionError, match="at least 0"):
        connected_circuits(circuit, -1)


def test_token_groups_are_matched_and_a_full_stage_stays_full() -> None:
    graph = transformer_graph(2, 2).with_groups(("cls", "patch"))
    circuit = cv.Circuit.from_edges(graph, ["input->logits@cls", "input->m1@cls", "m1->logits@cls"])
    assert all(edge.endswith("@cls") for each in connected_circuits(circuit, 5) for edge in each)
    assert set(connected_circuits(cv.Circuit.full(graph), 3)) == {cv.Circuit.full(graph)}


def test_like_nodes_of_a_stage_change_places_and_others_do_not() -> None:
    """Both heads of a layer are as likely to be drawn, from a circuit that has one of them."""
    graph = transformer_graph(1, 2)
    circuit = cv.Circuit.from_edges(graph, ["input->a0.h0<v>", "a0.h0->logits"])
    drawn = connected_circuits(circuit, 600, steps=1)
    heads = Counter(node.partition("->")[0] for each in drawn for node in each if node.endswith("logits"))
    assert 240 < heads["a0.h0"] < 360
    assert heads["a0.h0"] + heads["a0.h1"] == 600


@given(st.integers(0, 1000))
def test_relabelled_circuits_are_the_circuit_by_other_heads(seed: int) -> None:
    graph = transformer_graph(2, 3)
    circuit = Circuit(graph, np.random.default_rng(seed).random(graph.shape) < 0.2)

    def by_layer(each: Circuit) -> Counter[tuple[str, str]]:
        """Edges with the heads' numbers left out."""
        return Counter(tuple(re.sub(r"\.h\d", "", end) for end in edge.split("->")) for edge in each)

    def shapes(each: Circuit) -> Counter[tuple[str, ...]]:
        """For each head, what it hears and whom it tells, whoever it is."""
        heads = {re.match(r"a\d\.h\d", node).group() for node in graph.nodes if ".h" in node}  # type: ignore[union-attr]
        about = {head: [edge for edge in each if head in edge] for head in heads}
        return Counter((head[:2], str(len(edges))) for head, edges in about.items())

    found = relabelled_circuits(circuit, 5, seed)
    assert len(found) == 5
    for each in found:
        assert by_layer(each) == by_layer(circuit)
        assert shapes(each) == shapes(circuit)
    assert found == relabelled_circuits(circuit, 5, seed)


def test_circuits_that_no_other_labels_change_have_none() -> None:
    assert relabelled_circuits(Circuit.full(transformer_graph(2, 3)), 5) == ()
    assert relabelled_circuits(Circuit.from_edges(transformer_graph(2, 1), ["a0.h0->logits"]), 5) == ()


def test_they_say_where_they_came_from() -> None:
    found = Provenance(model="vit", weights="abc", task="cats", method="eap")
    circuit = cv.Circuit.from_edges(transformer_graph(1, 1), ["input->logits"], found)
    (drawn,) = connected_circuits(circuit, 1, seed=5)
    assert drawn.provenance == Provenance("vit", "abc", method="random-connected", seed=5)


@given(st.integers(0, 10_000))
def test_circuits_of_the_rest_are_live_disjoint_and_no_smaller(seed: int) -> None:
    graph = transformer_graph(2, 2)
    circuit = cv.Circuit(graph, np.random.default_rng(seed).random(graph.shape) < 0.2).pruned()
    for each in complement_circuits(circuit, 3, seed):
        assert len(each) >= len(circuit)
        assert not len(each & circuit)
        assert each.pruned() == each


def test_too_little_left_is_refused() -> None:
    full = cv.Circuit.full(transformer_graph(1, 1))
    with pytest.raises(OptionError, match="nothing of its size"):
        complement_circuits(full, 1)


@given(st.integers(0, 10_000))
def test_a_random_path_is_one_path(seed: int) -> None:
    graph = transformer_graph(3, 2).with_groups(("cls", "patch"))
    path = cv.Circuit(graph, random_path(graph, np.random.default_rng(seed)))
    assert path.pruned() == path
    assert [len(each) for each in path.paths()] == [len(path)]
