"""How nodes and edges are spelled.

`a0.h1->a3.h2<q>@cls` is sender `a0.h1`, receiver `a3.h2<q>`, group `cls`. The spelling is that of the EAP-IG
and MIB files (Hanna et al. 2024, arXiv:2403.17806; Mueller et al. 2025, arXiv:2504.13151), so circuits move
between tools; only the `@group` ending is our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from circuitvit.errors import NameNotFoundError, OptionError, unknown_name

_SENDER = r"[^\s<>@]+"
_RECEIVER = r"[^\s<>@]+(?:<\w+>)?"
_GROUP = r"\S+"
_EDGE = re.compile(rf"\s*({_SENDER})\s*->\s*({_RECEIVER})\s*(?:@({_GROUP}))?\s*")
_SPELLINGS = {"sender": _SENDER, "receiver": _RECEIVER, "token group": _GROUP}


class Edge(NamedTuple):
    """One edge by the names of its ends; `group` is "" where the graph has a single token group."""

    sender: str
    receiver: str
    group: str = ""

    def __str__(self) -> str:
        return edge_name(*self)


def edge_name(sender: str, receiver: str, group: str = "") -> str:
    """The name of an edge.

    Example:
        >>> edge_name("a0.h1", "a3.h2<q>", "cls")
        'a0.h1->a3.h2<q>@cls'
    """
    return f"{sender}->{receiver}@{group}" if group else f"{sender}->{receiver}"


def parse_edge(name: str) -> Edge:
    """The parts of an edge's name; spaces around the arrow are allowed.

    Raises:
        NameNotFoundError: if `name` is not spelled like an edge.

    Example:
        >>> parse_edge("a0.h1 -> a3.h2<q>")
        Edge(sender='a0.h1', receiver='a3.h2<q>', group='')
    """
    match = _EDGE.fullmatch(name)
    if match is None:
        raise NameNotFoundError(
            f"{name!r} is not an edge: write sender->receiver, such as 'a0.h1->a3.h2<q>' or 'm0->logits'"
        )
    return Edge(match[1], match[2], match[3] or "")


def check_name(kind: str, name: str) -> None:
    """Refuse a "sender", "receiver" or "token group" that could not be read back from an edge's name.

    Characters that do not print are refused too: two names that look alike must be alike.

    Raises:
        OptionError: if the name is misspelled.

    Example:
        >>> check_name("receiver", "a3.h2<q>")
    """
    if not re.fullmatch(_SPELLINGS[kind], name) or not name.isprintable():
        raise OptionError(
            f"{name!r} cannot name a {kind}: use visible characters, without spaces, <, > and @"
        )


def named(kind: str, patterns: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The known names that some patterns mean, in which `*` stands for anything and brackets for themselves.

    Args:
        kind: of thing, for the error.
        patterns: one or several.
        known: names, in the order of the result.

    Raises:
        NameNotFoundError: for a pattern that means none.

    Example:
        >>> named("node", ["m1.n*"], ["m1.n3", "m1.rest", "m1.n17"])
        ('m1.n3', 'm1.n17')
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        own = {name for name in known if fnmatchcase(name, pattern.replace("[", "[[]"))}
        if not own:
            raise unknown_name(kind, pattern, known)
        found |= own
    return tuple(name for name in known if name in found)


def node_of(receiver: str) -> str:
    """The node that a receiver belongs to.

    Example:
        >>> node_of("a3.h2<q>")
        'a3.h2'
    """
    return receiver.partition("<")[0]


def port_of(receiver: str) -> str:
    """Which of its node's inputs a receiver is: "q", "k", "v", or "" for a node with one input.

    Example:
        >>> port_of("a3.h2<q>"), port_of("m3")
        ('q', '')
    """
    return receiver.partition("<")[2].rstrip(">")
