"""How edges are spelled."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.errors import NameNotFoundError
from circuitvit.graph import Edge, edge_name, node_of, parse_edge, port_of
from circuitvit.graph.names import check_name

NODES = st.from_regex(r"[a-zA-Z0-9_.\-\"'&;:\\äß木]{1,12}", fullmatch=True)
PORTS = st.sampled_from(["", "<q>", "<k>", "<v>", "<gate>"])
GROUPS = st.one_of(st.just(""), st.from_regex(r"[a-z@<>\-]{1,8}", fullmatch=True))


@given(NODES, NODES, PORTS, GROUPS)
def test_every_edge_that_can_be_written_can_be_read(sender: str, node: str, port: str, group: str) -> None:
    name = edge_name(sender, node + port, group)
    assert parse_edge(name) == Edge(sender, node + port, group)
    assert str(parse_edge(name)) == name


@given(NODES, PORTS)
def test_a_receiver_is_its_node_and_its_port(node: str, port: str) -> None:
    assert node_of(node + port) == node
    assert port_of(node + port) == port.strip("<>")


@given(NODES, PORTS)
def test_names_that_can_be_read_back_are_accepted(node: str, port: str) -> None:
    check_name("sender", node)
    check_name("receiver", node + port)


def test_spaces_around_the_arrow_do_not_matter() -> None:
    assert parse_edge(" a0.h1  ->\ta3.h2<q> @cls ") == Edge("a0.h1", "a3.h2<q>", "cls")


@given(st.text(max_size=40))
def test_any_text_is_either_refused_or_read_for_good(text: str) -> None:
    with suppress(NameNotFoundError):  # any other exception fails the test
        edge = parse_edge(text)
        assert parse_edge(str(edge)) == edge


@pytest.mark.parametrize("name", ["a->", "->b", "a-b", "a->b<>", "a->b c", "a->b@", "a->b@c d", "a->b<q>x"])
def test_near_misses_are_not_taken_for_edges(name: str) -> None:
    with pytest.raises(NameNotFoundError, match="is not an edge: write sender->receiver"):
        parse_edge(name)
