"""What a notebook shows of a result: a title, a few facts, a small table. Names in it are never markup."""

from __future__ import annotations

import base64
import unicodedata
from collections.abc import Iterable, Sequence
from html import escape

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


def heading(text: object) -> Markup:
    """The name of a column."""
    return Markup(f'<div style="opacity:.65">{cell(text)}</div>')


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


def image(svg: str) -> str:
    """A drawing as an image of its own: its styles touch nothing else, and no script in it would run."""
    data = base64.b64encode(svg.encode()).decode()
    tag = f'<img alt="Diagram of the circuit" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'
    return tag if svg else ""


def picture(png: bytes, about: str) -> str:
    """A picture in the page itself.

    Args:
        png: the file.
        about: what it shows, for those who do not see it.
    """
    data = base64.b64encode(png).decode()
    return f'<img alt="{cell(about)}" style="max-width:100%" src="data:image/png;base64,{data}">'
