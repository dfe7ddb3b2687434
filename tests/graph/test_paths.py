"""Dead edges and paths, compared with an exhaustive search by networkx."""

from __future__ import annotations

import networkx as nx
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.graph import Circuit, Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import all_paths, circuits, port_graph


def live_by_search(circuit: Circuit) -> set[str]:
    """Names of the edges that can be reached from a source and from which a readout can be reached."""
    flow, sources, readouts = port_graph(circuit)
    heard = sources.union(*(nx.descendants(flow, source) for source in sources))
    leading = readouts.union(*(nx.ancestors(flow, readout) for readout in readouts))
    return {
        name for start, stop, name in flow.edges(data="name") if name and start in heard and stop in leading
    }


@given(circuits())
def test_pruning_leaves_exactly_the_edges_on_a_path(circuit: Circuit) -> None:
    assert set(circuit.pruned()) == live_by_search(circuit)


@given(circuits())
def test_pruning_twice_changes_nothing_more(circuit: Circuit) -> None:
    pruned = circuit.pruned()
    assert pruned <= circuit
    assert pruned.pruned() == pruned


@given(circuits())
def test_paths_are_those_that_exhaustive_search_finds(circuit: Circuit) -> None:
    found = list(circuit.paths())
    assert sorted(found) == sorted(all_paths(circuit))
    assert len(set(found)) == len(found)


@given(circuits())
def test_the_edges_on_paths_are_the_live_ones(circuit: Circuit) -> None:
    assert {name for path in circuit.paths() for name in path} == set(circuit.pruned())


@given(circuits(st.just(transformer_graph(2, 1))))
def test_in_a_plain_transformer_paths_are_those_between_nodes(circuit: Circuit) -> None:
    network = circuit.to_networkx()
    if {"input", "logits"} <= set(network):
        between = {
            tuple(key for *_, key in path) for path in nx.all_simple_edge_paths(network, "input", "logits")
        }
        assert set(circuit.paths()) == between
    else:
        assert not list(circuit.paths())


def two_groups() -> Graph:
    return transformer_graph(1, 1).with_groups(("cls", "patch"))


def test_a_key_carries_what_it_reads_to_all_tokens() -> None:
    circuit = Circuit.from_edges(two_groups(), ["input->a0.h0<k>@patch", "a0.h0->logits@cls"])
    assert circuit.pruned() == circuit
    assert list(circuit.paths()) == [("input->a0.h0<k>@patch", "a0.h0->logits@cls")]


def test_a_query_acts_only_at_its_own_tokens() -> None:
    circuit = Circuit.from_edges(two_groups(), ["input->a0.h0<q>@patch", "a0.h0->logits@cls"])
    assert len(circuit.pruned()) == 0
    assert not list(circuit.paths())


def test_a_key_shared_by_two_heads_leads_to_both() -> None:
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            StageNodes("attn", "attention", 0, senders=("h0", "h1"), receivers=("g0<k>",), feeds=((0, 1),)),
            StageNodes("readout", "readout", 1, receivers=("logits",)),
        )
    )
    circuit = Circuit.from_edges(graph, ["input->g0<k>", "h0->logits", "h1->logits"])
    assert list(circuit.paths()) == [("input->g0<k>", "h0->logits"), ("input->g0<k>", "h1->logits")]


def test_an_empty_circuit_has_no_path() -> None:
    assert not list(Circuit.empty(transformer_graph(1, 1)).paths())


def test_paths_come_one_by_one_however_many_there_are() -> None:
    paths = Circuit.full(transformer_graph(12, 3)).paths()
    assert next(paths)[0] == "input->a0.h0<q>"
