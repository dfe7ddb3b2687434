"""Random circuits: the size, the profile, the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.verification import layer_profile, random_circuits
from tests.graph.strategies import circuits


@given(circuits(), st.integers(0, 3))
def test_size_and_profile_are_those_of_the_pruned_circuit(circuit: Circuit, seed: int) -> None:
    live = circuit.pruned()
    into = [live.kept[:, receivers].sum(axis=(0, 1)) for receivers in circuit.graph.receiver_slices]
    for drawn in random_circuits(circuit, 3, seed):
        found = [drawn.kept[:, receivers].sum(axis=(0, 1)) for receivers in circuit.graph.receiver_slices]
        assert len(drawn) == len(live)
        assert np.array_equal(found, into)
        assert np.array_equal(layer_profile(circuit), into)


def test_the_order_is_fixed_by_the_seed_and_the_first_do_not_depend_on_the_number() -> None:
    graph = transformer_graph(3, 2)
    circuit = Circuit(graph, np.random.default_rng(0).random(graph.shape) < 0.3)
    five = random_circuits(circuit, 5, seed=7)
    assert random_circuits(circuit, 3, seed=7) == five[:3]
    assert len(set(five)) == 5
    assert random_circuits(circuit, 5, seed=8) != five


def test_every_edge_of_a_stage_is_as_likely_as_any_other() -> None:
    graph = transformer_graph(1, 2)
    circuit = Circuit.from_edges(graph, ["input->a0.h0<v>", "a0.h0->logits"])
    drawn = random_circuits(circuit, 2000)
    counts = np.sum([each.kept for each in drawn], axis=0)[..., 0]
    into_heads = counts[0, graph.receiver_slices[1]]  # 6 edges from the input
    into_logits = counts[:, -1]  # input, two heads, MLP
    assert np.abs(into_heads / 2000 - 1 / 6).max() < 0.035  # four standard deviations
    assert np.abs(into_logits / 2000 - 1 / 4).max() < 0.04


def test_empty_and_full_circuits_have_only_themselves() -> None:
    graph = transformer_graph(2, 2)
    assert set(random_circuits(Circuit.empty(graph), 3)) == {Circuit.empty(graph)}
    assert set(random_circuits(Circuit.full(graph), 3)) == {Circuit.full(graph)}


def test_token_groups_are_matched() -> None:
    graph = transformer_graph(2, 2).with_groups(("cls", "patch"))
    circuit = Circuit.from_edges(graph, ["input->logits@cls", "input->m1@cls", "m1->logits@cls"])
    assert all(edge.endswith("@cls") for each in random_circuits(circuit, 5) for edge in each)


def test_they_say_where_they_came_from() -> None:
    graph = transformer_graph(1, 1)
    found = Provenance(model="vit", weights="abc", task="cats", method="eap")
    circuit = Circuit.from_edges(graph, ["input->logits"], found)
    (drawn,) = random_circuits(circuit, 1, seed=5)
    assert drawn.provenance == Provenance("vit", "abc", method="random", parameters={"asked": 1}, seed=5)


@pytest.mark.parametrize(("n", "seed"), [(-1, 0), (1, -1)])
def test_numbers_below_zero_are_refused(n: int, seed: int) -> None:
    with pytest.raises(OptionError, match="0 or more"):
        random_circuits(Circuit.full(transformer_graph(1, 1)), n, seed)
