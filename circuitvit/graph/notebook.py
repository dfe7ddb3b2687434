"""What a notebook shows of a result: a title, a few facts, a small table. Names in it are never markup."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitvit.graph.circuit import Circuit
    from circuitvit.graph.scores import EdgeScores
    from circuitvit.graph.topology import Graph

MOST_EDGES = 150
"""Edges in the diagram of a circuit, the strongest; more make a notebook heavy and no wiser."""

_BOX = "font-size:90%;line-height:1.45;margin:.2em 0"
_TITLE = "font-weight:600;margin-bottom:.25em"
_CELL = "padding:.05em .8em .05em 0;text-align:left;border:0"


def cell(text: object) -> str:
    """Text made harmless: escaped, and without control and direction marks.

    Example:
        >>> cell("<b>a\\u202eb</b>")
        '&lt;b&gt;a b&lt;/b&gt;'
    """
    signs = (" " if unicodedata.category(sign) in ("Cc", "Cf") else sign for sign in str(text))
    return escape("".join(signs))


def card(title: object, rows: Iterable[Sequence[object]], more: str = "") -> str:
    """A title over a table without a heading; cells that are `Markup` stay as they are, all others are text.

    Args:
        title: text.
        rows: of cells.
        more: markup below, as from this module.
    """
    lines = "".join(f"<tr>{''.join(_table_cell(each) for each in row)}</tr>" for row in rows)
    table = f'<table style="border-collapse:collapse;margin:0">{lines}</table>' if lines else ""
    return f'<div style="{_BOX}"><div style="{_TITLE}">{cell(title)}</div>{table}{more}</div>'


class Markup(str):
    """Markup that this module has made."""

    __slots__ = ()


def bar(share: float, positive: bool) -> Markup:
    """A bar as long as its share of the longest, in the colour of what supports or opposes.

    Example:
        >>> bar(0.5, positive=True)[:5]
        '<div '
    """
    colour = "#0072B2" if positive else "#D55E00"
    width = 8 * min(max(share, 0.0), 1.0)
    style = f"background:{colour};height:.7em;width:{width:.2f}em;margin-left:.2em"
    return Markup(f'<div style="{style}"></div>')


def _table_cell(content: object) -> str:
    text = content if isinstance(content, Markup) else cell(content)
    return f'<td style="{_CELL}">{text}</td>'


# -- what belongs to edges ---------------------------------------------------------------------------


def of_graph(graph: Graph) -> str:
    """A graph: how many nodes of each kind, in how many layers, and its edges."""
    kinds: dict[str, int] = {}
    for stage in graph.stages:
        kinds[stage.kind] = kinds.get(stage.kind, 0) + len(stage.senders or stage.receivers)
    rows: list[tuple[object, ...]] = [(kind, f"{count:,}") for kind, count in kinds.items()]
    if len(graph.groups) > 1:
        rows.append(("token groups", ", ".join(graph.groups)))
    return card(f"Graph with {graph.n_edges:,} edges", [*rows, ("receivers", f"{len(graph.receivers):,}")])


def of_scores(scores: EdgeScores, k: int = 10) -> str:
    """Scores: the strongest edges with bars, blue for those that support the behaviour."""
    strongest = scores.strongest(k)
    largest = max((abs(score) for _, score in strongest), default=0.0) or 1.0
    helps = -1.0 if scores.direction == "noising" else 1.0
    rows = [
        (name, f"{score:+.4g}", bar(abs(score) / largest, score * helps > 0), _side(score * helps))
        for name, score in strongest
    ]
    title = f"{scores.method or 'Scores'} of {len(scores):,} edges, {scores.direction}; the strongest"
    return card(title, rows)


def of_circuit(circuit: Circuit, drawing: str) -> str:
    """A circuit: its size, where it came from, and its drawing as SVG.

    The drawing is an image of its own, so that its styles touch nothing else and no script in it would run.
    """
    origin = circuit.provenance
    rows = [
        ("edges", f"{len(circuit):,} of {circuit.graph.n_edges:,} ({circuit.density:.1%})"),
        ("nodes", f"{len(circuit.nodes)} of {len(circuit.graph.nodes)}"),
        *((name, text) for name, text in (("found by", origin.method), ("task", origin.task)) if text),
    ]
    data = base64.b64encode(drawing.encode()).decode()
    image = (
        f'<img alt="Diagram of the circuit" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
    )
    return card(f"Circuit of {origin.model or 'a model'}", rows, image if drawing else "")


def _side(support: float) -> str:
    return "supports" if support > 0 else "opposes" if support < 0 else ""
