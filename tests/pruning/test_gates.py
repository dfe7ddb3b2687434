"""Gates and what they open: samples with the right odds, unbiased gradients, masks with the right edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuitvit.graph import Graph, node_of, parse_edge
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.pruning.learned import SAMPLERS, gated_units

N = 40_000


def samples(name: str, phi: float, seed: int = 0) -> torch.Tensor:
    return SAMPLERS[name].sample(torch.full((N,), phi), torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return transformer_graph(2, 2)


class TestSamplers:
    @pytest.mark.parametrize("name", list(SAMPLERS))
    @pytest.mark.parametrize("phi", [-6.0, -1.0, 0.0, 2.0])
    def test_gates_lie_in_the_unit_interval_and_are_shut_as_often_as_promised(
        self, name: str, phi: float
    ) -> None:
        gates = samples(name, phi)
        assert gates.min() >= 0
        assert gates.max() <= 1
        promised = float(SAMPLERS[name].open_probability(torch.tensor([phi])))
        found = (gates > 0).float().mean() if name == "hard-concrete" else gates.mean()
        assert float(found) == pytest.approx(promised, abs=0.01)

    @pytest.mark.parametrize("name", list(SAMPLERS))
    def test_log_odds_of_0_are_as_open_as_shut(self, name: str) -> None:
        assert float(samples(name, 0.0).mean()) == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("name", list(SAMPLERS))
    def test_the_same_seed_gives_the_same_gates(self, name: str) -> None:
        assert torch.equal(samples(name, 0.3, seed=5), samples(name, 0.3, seed=5))
        assert not torch.equal(samples(name, 0.3, seed=5), samples(name, 0.3, seed=6))

    def test_gradients_of_ugs_are_unbiased(self) -> None:
        """For a loss that is linear in the gates, E[dL/dphi] is the slope times d theta / d phi."""
        phi = torch.full((N,), 0.7, requires_grad=True)
        (3 * SAMPLERS["ugs"].sample(phi, torch.Generator().manual_seed(0))).sum().backward()
        theta = torch.sigmoid(torch.tensor(0.7))
        assert float(phi.grad.mean()) == pytest.approx(float(3 * theta * (1 - theta)), rel=0.03)


class TestUnits:
    def test_over_edges_every_edge_has_its_own_gate(self, graph: Graph) -> None:
        units = gated_units(graph, "edges")
        values = torch.rand(units.n_gates)
        mask = units.mask(values).numpy()
        assert np.array_equal(mask[graph.edge_mask], values.numpy())
        assert not mask[~graph.edge_mask].any()

    def test_over_nodes_a_shut_gate_takes_all_edges_of_its_node(self, graph: Graph) -> None:
        units = gated_units(graph, "nodes")
        assert units.n_gates == 6  # four heads, two MLPs
        phi = torch.ones(6)
        phi[1] = -1  # a0.h1
        kept = units.kept(phi)
        for name in graph.edges:
            edge = parse_edge(name)
            assert kept[graph.edge_index(name)] == ("a0.h1" not in (edge.sender, node_of(edge.receiver)))

    def test_over_both_an_edge_is_the_product_of_its_gates(self, graph: Graph) -> None:
        units = gated_units(graph, "both")
        gates = torch.rand(units.n_gates)
        index = graph.edge_index("a0.h1->m1")
        own = graph.edges.index("a0.h1->m1")
        heads_and_mlps = ["a0.h0", "a0.h1", "m0", "a1.h0", "a1.h1", "m1"]
        sender, receiver = (graph.n_edges + heads_and_mlps.index(node) for node in ("a0.h1", "m1"))
        expected = gates[own] * gates[sender] * gates[receiver]
        assert float(units.mask(gates)[index]) == pytest.approx(float(expected))

    def test_input_and_logits_are_always_in(self, graph: Graph) -> None:
        kept = gated_units(graph, "nodes").kept(torch.full((6,), -1.0))
        assert list(graph.names_of(kept)) == ["input->logits"]
