"""The graph of a model: how many edges, in which order, under which names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.graph import Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.graph.strategies import graphs


def edges_by_hand(n_layers: int, n_heads: int) -> int:
    """Attention of layer l reads from input and l blocks; its MLP reads from the heads of its layer too."""
    return sum(
        3 * n_heads * (1 + layer * (n_heads + 1)) + 1 + layer * (n_heads + 1) + n_heads
        for layer in range(n_layers)
    ) + (1 + n_layers * (n_heads + 1))


@pytest.mark.parametrize(
    ("n_layers", "n_heads", "edges"), [(12, 3, 2845), (4, 4, 479), (12, 12, 32491), (1, 1, 8)]
)
def test_a_transformer_has_the_number_of_edges_that_counting_by_hand_gives(
    n_layers: int, n_heads: int, edges: int
) -> None:
    graph = transformer_graph(n_layers, n_heads)
    assert graph.n_edges == len(graph.edges) == edges == edges_by_hand(n_layers, n_heads)
    assert len(graph.senders) == 1 + n_layers * (n_heads + 1)
    assert len(graph.receivers) == 1 + n_layers * (3 * n_heads + 1)


def test_each_token_group_has_edges_of_its_own() -> None:
    graph = transformer_graph(2, 2)
    assert graph.with_groups(("cls", "patch")).n_edges == 2 * graph.n_edges


def test_edges_are_ordered_by_sender_then_receiver_then_group() -> None:
    graph = transformer_graph(1, 1).with_groups(("cls", "patch"))
    assert graph.edges[:4] == (
        "input->a0.h0<q>@cls",
        "input->a0.h0<q>@patch",
        "input->a0.h0<k>@cls",
        "input->a0.h0<k>@patch",
    )
    assert graph.edges[-2:] == ("m0->logits@cls", "m0->logits@patch")


def test_nodes_are_in_running_order_with_the_logits_last() -> None:
    assert transformer_graph(2, 2).nodes == (
        "input",
        "a0.h0",
        "a0.h1",
        "m0",
        "a1.h0",
        "a1.h1",
        "m1",
        "logits",
    )


def test_heads_of_a_layer_do_not_feed_each_other_but_do_feed_their_mlp() -> None:
    graph = transformer_graph(2, 2)
    assert "a0.h0->a0.h1<q>" not in graph
    assert "a0.h0->m0" in graph
    assert "a1.h0->a0.h0<q>" not in graph


def test_in_a_parallel_block_heads_do_not_feed_the_mlp_beside_them() -> None:
    graph = transformer_graph(2, 2, parallel=True)
    assert "a0.h0->m0" not in graph
    assert "a0.h0->m1" in graph
    assert graph.n_edges == transformer_graph(2, 2).n_edges - 2 * 2


def test_an_edge_needs_sender_and_receiver_on_the_same_stream() -> None:
    graph = Graph(
        (
            StageNodes("input", "input", 0, senders=("input",)),
            StageNodes("side", "mlp", 0, senders=("s0",), receivers=("s0",), writes_to="side"),
            StageNodes("main", "mlp", 1, senders=("m1",), receivers=("m1",)),
            StageNodes("reader", "readout", 2, receivers=("side_logits",), reads_from="side"),
            StageNodes("readout", "readout", 2, receivers=("logits",)),
        )
    )
    assert set(graph.edges) == {"input->s0", "input->m1", "input->logits", "m1->logits", "s0->side_logits"}


@given(graphs())
def test_index_and_name_of_every_edge_are_inverse(graph: Graph) -> None:
    mask = np.zeros(graph.shape, dtype=bool)
    for name in graph.edges:
        mask[graph.edge_index(name)] = True
        assert name in graph
    assert np.array_equal(mask, graph.edge_mask)
    assert len(set(graph.edges)) == graph.n_edges


@given(graphs())
def test_slices_and_stages_of_senders_and_receivers_agree(graph: Graph) -> None:
    for place, stage in enumerate(graph.stages):
        assert graph.senders[graph.sender_slices[place]] == stage.senders
        assert graph.receivers[graph.receiver_slices[place]] == stage.receivers
        assert set(graph.sender_stages[graph.sender_slices[place]]) <= {place}
        assert set(graph.receiver_stages[graph.receiver_slices[place]]) <= {place}


def test_the_mask_of_edges_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        transformer_graph(1, 1).edge_mask[0, 0, 0] = False


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("a0.h9->m1", "unknown sender 'a0.h9': did you mean 'a0.h"),
        ("input->a1.h1<w>", "unknown receiver 'a1.h1<w>': did you mean 'a1.h1<"),
        ("m1->a0.h0<q>", "unknown edge 'm1->a0.h0<q>': did you mean"),
        ("input->m0@cls", "unknown token group 'cls'"),
        ("input=>m0", "write sender->receiver"),
        ("", "write sender->receiver"),
    ],
)
def test_an_unknown_edge_is_refused_and_the_nearest_one_suggested(name: str, suggestion: str) -> None:
    with pytest.raises(NameNotFoundError, match=re.escape(suggestion)):
        transformer_graph(2, 2).edge_index(name)
    assert name not in transformer_graph(2, 2)


def test_a_graph_with_several_token_groups_wants_the_group_named() -> None:
    graph = transformer_graph(1, 1).with_groups(("cls", "patch"))
    with pytest.raises(NameNotFoundError, match="unknown token group ''"):
        graph.edge_index("input->m0")


@pytest.mark.parametrize(
    "name", ["a b", "", "x<q>", "x->y", "x@y", "x\n", "x\x00", "x\u202e", "x\u200b", "\ud800"]
)
def test_a_node_whose_name_could_not_be_read_back_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="cannot name a sender"):
        Graph((StageNodes("input", "input", 0, senders=(name,)),))


@pytest.mark.parametrize("group", ["", "two words", "x\x7f", "\u2066x"])
def test_a_token_group_whose_name_could_not_be_read_back_is_refused(group: str) -> None:
    with pytest.raises(OptionError, match="cannot name a token group"):
        transformer_graph(1, 1).with_groups(("cls", group))


def test_two_nodes_of_one_name_are_refused() -> None:
    with pytest.raises(OptionError, match="two senders of the graph are called 'x'"):
        Graph((StageNodes("one", "input", 0, senders=("x",)), StageNodes("two", "input", 0, senders=("x",))))


def test_a_graph_without_token_groups_is_refused() -> None:
    with pytest.raises(OptionError, match="at least one token group"):
        transformer_graph(1, 1).with_groups(())


@given(graphs(), st.data())
def test_what_a_receiver_feeds_are_senders_of_its_own_stage(graph: Graph, data: st.DataObject) -> None:
    receiver = data.draw(st.integers(0, len(graph.receivers) - 1))
    for sender, _ in graph.fed(receiver, 0):
        assert graph.sender_stages[sender] == graph.receiver_stages[receiver]
