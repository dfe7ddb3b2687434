"""Random graphs and circuits for property tests, and a second opinion on what is connected to what."""

from __future__ import annotations

from itertools import pairwise, product

import networkx as nx
import numpy as np
from hypothesis import strategies as st

from circuitvit.graph import Circuit, EdgeScores, Graph, StageNodes, parse_edge

GROUPS = st.sampled_from([("all",), ("cls", "patch"), ("cls", "reg", "patch")])


@st.composite
def graphs(
    draw: st.DrawFn, groups: st.SearchStrategy[tuple[str, ...]] = GROUPS, max_stages: int = 3
) -> Graph:
    """A graph of a few stages with arbitrary feeds (shared keys, dead receivers) and token mixing."""
    stages = [
        StageNodes("input", "input", 0, senders=tuple(f"in{i}" for i in range(draw(st.integers(1, 2)))))
    ]
    for place in range(draw(st.integers(1, max_stages))):
        n_senders = draw(st.integers(1, 2))
        receivers = tuple(f"n{place}.r{index}<q>" for index in range(draw(st.integers(1, 3))))
        fed = st.lists(st.integers(0, n_senders - 1), max_size=n_senders, unique=True).map(tuple)
        stages.append(
            StageNodes(
                f"stage{place}",
                "attention",
                place,
                senders=tuple(f"n{place}.s{index}" for index in range(n_senders)),
                receivers=receivers,
                feeds=tuple(draw(fed) for _ in receivers),
                mixes=tuple(draw(st.booleans()) for _ in receivers),
            )
        )
    readouts = tuple(f"out{index}" for index in range(draw(st.integers(1, 2))))
    stages.append(StageNodes("readout", "readout", len(stages), receivers=readouts))
    return Graph(tuple(stages), draw(groups))


@st.composite
def circuits(draw: st.DrawFn, graph: st.SearchStrategy[Graph] | None = None) -> Circuit:
    """Any set of edges of a random graph."""
    own = draw(graphs() if graph is None else graph)
    chosen = draw(st.lists(st.booleans(), min_size=own.n_edges, max_size=own.n_edges))
    return Circuit.from_edges(own, [name for name, kept in zip(own.edges, chosen, strict=True) if kept])


@st.composite
def scored(draw: st.DrawFn, graph: st.SearchStrategy[Graph] | None = None) -> EdgeScores:
    """Scores of a random graph, all of different magnitude."""
    own = draw(graphs() if graph is None else graph)
    order = draw(st.permutations(range(1, own.n_edges + 1)))
    signs = draw(st.lists(st.sampled_from([-1, 1]), min_size=own.n_edges, max_size=own.n_edges))
    values = np.zeros(own.shape)
    values[own.edge_mask] = np.array(order) * np.array(signs)
    return EdgeScores(own, values, "random")


def port_graph(
    circuit: Circuit,
) -> tuple[nx.DiGraph[tuple[str, ...]], set[tuple[str, ...]], set[tuple[str, ...]]]:
    """What flows where, said literally with networkx: `("out", sender, group)` and `("in", receiver, group)`.

    Returns:
        The directed graph, its sources and its readouts.
    """
    graph = circuit.graph
    flow: nx.DiGraph[tuple[str, ...]] = nx.DiGraph()
    for name in circuit:
        edge = parse_edge(name)
        group = edge.group or graph.groups[0]
        flow.add_edge(("out", edge.sender, group), ("in", edge.receiver, group), name=name)
    for stage in graph.stages:
        for receiver, fed, mixing in zip(stage.receivers, stage.feeds or (), stage.mixes or (), strict=True):
            for sender, (before, after) in product(fed, product(graph.groups, repeat=2)):
                if mixing or before == after:
                    flow.add_edge(("in", receiver, before), ("out", stage.senders[sender], after), name="")
    sources = {
        ("out", name, group)
        for stage in graph.stages
        if not stage.receivers
        for name, group in product(stage.senders, graph.groups)
    }
    readouts = {
        ("in", name, group)
        for stage in graph.stages
        if not stage.senders
        for name, group in product(stage.receivers, graph.groups)
    }
    flow.add_nodes_from(sources | readouts)
    return flow, sources, readouts


def all_paths(circuit: Circuit) -> list[tuple[str, ...]]:
    """Every path from a source to a readout as edge names, by exhaustive search."""
    flow, sources, readouts = port_graph(circuit)
    found = []
    for source, readout in product(sorted(sources), sorted(readouts)):
        for path in nx.all_simple_paths(flow, source, readout):
            names = (flow.edges[step]["name"] for step in pairwise(path))
            found.append(tuple(name for name in names if name))
    return found
