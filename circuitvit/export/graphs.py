"""A circuit as a graph for other programs: DOT for Graphviz, GraphML for Gephi, Cytoscape, yEd and networkx.

In DOT colours, widths and dashes are those of the SVG; Graphviz decides about places. Every text is given
to the `graphviz` package as data: names never become node identifiers unless they are plain, since a colon
in an identifier means a port there, and labels are escaped for the kind of label they are in.
"""

from __future__ import annotations

import re
from html import escape
from itertools import pairwise
from typing import Any

import graphviz
import networkx as nx

from circuitvit.export import style
from circuitvit.export.picture import DrawnEdge, DrawnNode, Picture
from circuitvit.graph import Circuit
from circuitvit.graph.files import clean

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\Z")
_KEYWORDS = {"node", "edge", "graph", "digraph", "subgraph", "strict"}
_STYLES = ("solid", "dashed", "dotted", "bold")
_PORT_CELL = '<TD PORT="{port}" CELLPADDING="1"><FONT COLOR="{colour}">{name}</FONT></TD>'


def dot_of(picture: Picture) -> graphviz.Digraph:
    """The picture as a graph of the `graphviz` package; `.source` is its text.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> "input:n -> m0:s" in dot_of(picture_of(circuit)).source
        True
    """
    graph = graphviz.Digraph("circuit", graph_attr=_graph_attributes(picture))
    graph.attr("node", fontname="Helvetica", fontsize="11", color=style.INK, fontcolor=style.INK)
    graph.attr("edge", arrowsize="0.5")
    shown = [node for node in picture.nodes if node.present]
    names = {node.name: _identifier(node.name, index) for index, node in enumerate(shown)}
    rows: dict[int, list[DrawnNode]] = {}
    for node in shown:
        rows.setdefault(node.row, []).append(node)
    for row in sorted(rows):
        with graph.subgraph() as rank:
            rank.attr(rank="same")
            for node in rows[row]:
                rank.node(names[node.name], **_node_attributes(node))
    # Invisible edges keep the rows in the order of the model, also where no drawn edge joins two of them.
    for low, high in pairwise(sorted(rows)):
        graph.edge(names[rows[low][0].name], names[rows[high][0].name], style="invis", weight="0")
    for edge in picture.edges:
        head = f"{names[edge.target]}:{_port(edge.port)}:s" if edge.port else f"{names[edge.target]}:s"
        graph.edge(f"{names[edge.sender]}:n", head, **_edge_attributes(edge))
    return graph


def _html(text: str) -> str:
    """Text within an HTML label; a closing bracket is no syntax error only when written as a number."""
    return escape(text).replace("]", "&#93;")


def _graph_attributes(picture: Picture) -> dict[str, str]:
    by_sign = [(style.COLOURS[sign], picture.meaning(sign)) for sign in picture.signs]
    key = [(look.colour, words) for words, look in picture.key] or by_sign
    meanings = [f'<FONT COLOR="{colour}">{_html(words)}</FONT>' for colour, words in key]
    lines = [f"<B>{_html(picture.title)}</B>"] if picture.title else []
    lines += meanings if picture.edges else [picture.emptiness]
    lines += [_html(line) for line in (picture.counts, picture.origin) if line]
    return {
        "rankdir": "BT",
        "splines": "true",
        "ranksep": "0.45",
        "nodesep": "0.3",
        "fontname": "Helvetica",
        "fontsize": "11",
        "fontcolor": style.INK,
        "labelloc": "b",
        "label": f"<{'<BR/>'.join(lines)}>",
    }


def _identifier(name: str, index: int) -> str:
    """A name that DOT takes as it is, or a numbered one; either way the label says the real name."""
    return name if _PLAIN.match(name) and name.lower() not in _KEYWORDS else f"node {index}"


def _port(port: str) -> str:
    """The name of a port within its node's table, by its letters alone: it is not shown."""
    return "port_" + "".join(
        letter if letter.isascii() and letter.isalnum() else f"_{ord(letter)}" for letter in port
    )


def _node_attributes(node: DrawnNode) -> dict[str, Any]:
    name, said = clean(node.name), graphviz.escape(node.said)
    if node.kind == "head":
        return {"shape": "plain", "label": _head_label(node), "tooltip": said}
    words = graphviz.escape(f"{name}\n{node.label}" if node.label else name)
    look = {"shape": "box", "label": words, "tooltip": said, "height": "0.3"}
    if node.kind == "part":
        return {**look, "style": "filled", "fillcolor": style.PAPER}
    if node.kind == "mlp":
        return {**look, "style": "rounded,filled", "fillcolor": style.MLP_FILL}
    return {**look, "style": "filled", "fillcolor": style.END_FILL, "fontcolor": style.PAPER}


def _head_label(node: DrawnNode) -> str:
    """A table with the name above the inputs; tables are not turned with the graph, so inputs stay below."""
    cells = ""
    for port in node.ports:
        colour = style.INK if port in node.used else style.FAINT
        cells += _PORT_CELL.format(port=_port(port), colour=colour, name=_html(clean(port)) or "-")
    name = f'<TR><TD COLSPAN="{len(node.ports)}"><B>{_html(clean(node.name)) or "-"}</B></TD></TR>'
    if node.label:
        name += f'<TR><TD COLSPAN="{len(node.ports)}">{_html(node.label)}</TD></TR>'
    table = f'<TABLE BORDER="1" CELLBORDER="0" CELLSPACING="0" STYLE="ROUNDED" BGCOLOR="{style.PAPER}">'
    return f"<{table}{name}<TR>{cells}</TR></TABLE>>"


def _edge_attributes(edge: DrawnEdge) -> dict[str, str]:
    look = edge.look
    return {
        "color": f"{look.colour}{round(255 * look.opacity):02X}",
        "penwidth": f"{look.width:.2f}",
        "style": _STYLES[edge.group % len(_STYLES)],
        "tooltip": graphviz.escape(edge.said),
    }


# -- GraphML -------------------------------------------------------------------------------------


def graphml_of(circuit: Circuit, title: str | None = None) -> str:
    """The circuit as the text of a GraphML file.

    Nodes carry `kind` and `layer`; edges are identified by their name and carry `receiver`, `group` and,
    where the circuit has scores, `score`; the graph carries where the circuit came from. Read it back with
    `Circuit.from_networkx(graph, networkx.read_graphml(path))`.

    Example:
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> 'id="m0-&gt;logits"' in graphml_of(circuit)
        True
    """
    network, made = circuit.to_networkx(), circuit.provenance
    about = {"title": title, "model": made.model, "method": made.method, "task": made.task}
    about |= {"library": made.library}
    network.graph.update({key: value for key, value in about.items() if value})
    nodes = [data for _, data in network.nodes(data=True)]
    edges = [data for _, _, data in network.edges(data=True)]
    for data in (network.graph, *nodes, *edges):
        for key, value in data.items():
            if isinstance(value, str):
                data[key] = clean(value)  # XML has no way to write control characters
    return "\n".join(nx.generate_graphml(network, named_key_ids=True)) + "\n"
