"""Patterns that name many edges at once, so that a claim reads as people say it.

| pattern | edges |
| --- | --- |
| `a11.h1 -> logits` | this one |
| `a9.*<v> -> logits` | all that leave a head of layer 9 for the logits: a port on the left is passed over |
| `m0 -> a*.*<v>` | from the first MLP to every head's value input |
| `a2.h0<k>` | all that enter this receiver |
| `a3.h1` or `m0` | all that *leave* this node: what the rest of the model hears of it |
| `logits` | all that enter the readout, which sends nothing |
| `input -> *@cls` | only those at one token group |
| `*` | every edge |

A name alone means what leaves the node, since "ablate head a3.h1" is said of its output. Ablating all edges
into it (`* -> a3.h1<*>`) is another intervention: the node then computes its reference from reference inputs,
which is its reference output under patch ablation and something else under mean or zero ablation.
`*` and `?` are wildcards as in file names; nothing else has a special meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.errors import NameNotFoundError, OptionError, unknown_name
from circuitvit.graph import Circuit, EdgeMask, Graph, as_circuit, node_of
from circuitvit.graph.circuit import HasCircuit

EdgesLike = str | Circuit | HasCircuit | Path | Sequence[str | Circuit | HasCircuit | Path]
"""What names edges in a claim: one or several patterns, or what means a circuit."""


def select_edges(graph: Graph, patterns: EdgesLike) -> Circuit:
    """The edges that any of the patterns names.

    Args:
        graph: to select from.
        patterns: one or several patterns, circuits, results of searches, or paths (`Path`) of circuit files.

    Raises:
        NameNotFoundError: if a pattern names no edge; the message suggests the nearest name.
        OptionError: if there is no pattern, or a circuit belongs to another graph.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> list(select_edges(transformer_graph(1, 2), ["a0.h1", "a0.*<v> -> logits"]))
        ['a0.h0->logits', 'a0.h1->m0', 'a0.h1->logits']
    """
    several = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    wanted: Any = patterns if several else [patterns]
    if not wanted:
        raise OptionError("a claim needs edges: give a pattern such as 'a11.h1 -> logits' or 'm0'")
    found = Circuit.empty(graph)
    for each in wanted:
        found |= Circuit(graph, edges_of(graph, each)) if isinstance(each, str) else as_circuit(each, graph)
    return found


def edges_of(graph: Graph, pattern: str) -> EdgeMask:
    """The mask `(sender, receiver, group)` of one pattern. See the module's table.

    Raises:
        NameNotFoundError: if it names no edge.
    """
    body, _, group = pattern.strip().partition("@")
    left, arrow, right = (part.strip() for part in body.partition("->"))
    if arrow:
        senders, receivers = _matching(graph.senders, _node(left)), _receivers(graph, right)
    elif body.strip() == "*":
        senders, receivers = _all(graph.senders), _all(graph.receivers)
    elif "<" in left or not _matching(graph.senders, left).any():
        senders, receivers = _all(graph.senders), _receivers(graph, left)
    else:
        senders, receivers = _matching(graph.senders, left), _all(graph.receivers)
    groups = _matching(graph.groups, group) if group else _all(graph.groups)
    mask: EdgeMask = senders[:, None, None] & receivers[None, :, None] & groups & graph.edge_mask
    if not mask.any():
        raise _nothing(graph, pattern, left, right, group, (senders, receivers, groups))
    return mask


def _receivers(graph: Graph, pattern: str) -> NDArray[np.bool_]:
    """A receiver by its whole name, or all of a node's by the name of the node."""
    return _matching(graph.receivers, pattern) | _matching(
        [node_of(name) for name in graph.receivers], pattern
    )


def _node(pattern: str) -> str:
    return re.sub(r"<[^>]*>$", "", pattern)


def _matching(names: Iterable[str], pattern: str) -> NDArray[np.bool_]:
    literal = pattern.replace("[", "[[]")  # brackets are no wildcards here
    return np.array([fnmatchcase(name, literal) for name in names], dtype=bool)


def _all(names: Sequence[str]) -> NDArray[np.bool_]:
    return np.ones(len(names), dtype=bool)


def _nothing(
    graph: Graph,
    pattern: str,
    left: str,
    right: str,
    group: str,
    found: tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]],
) -> NameNotFoundError:
    """Why a pattern names no edge: the part that matches nothing, or an order that the model has not."""
    senders, receivers, groups = found
    if not groups.any():
        return unknown_name("token group", group, graph.groups)
    if not senders.any():
        return unknown_name("sender", left, graph.senders)
    if not receivers.any():
        known = dict.fromkeys((*graph.receivers, *(node_of(name) for name in graph.receivers)))
        return unknown_name("receiver", right or left, known)
    return NameNotFoundError(
        f"{pattern!r} names no edge: none of these senders comes before these receivers in the model"
    )
