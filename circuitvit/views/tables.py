"""Tables of symbols as text and as a page, for what figures cannot show: matplotlib has no colour emoji."""

from __future__ import annotations

import base64
import io
import unicodedata
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; color: #1f2328; background: #fff }
main { display: flex; flex-wrap: wrap; gap: 1.2rem }
figure { margin: 0 } figcaption { margin-bottom: .3rem; color: #57606a }
table { border-collapse: collapse; width: 22rem; height: 22rem; table-layout: fixed;
        background-size: 100% 100% }
td { padding: 0; text-align: center; overflow: hidden; font-size: .62rem; line-height: 1;
     background: rgb(255 255 255 / 45%) }
td.symbol { font-size: 1.05rem }
"""


def plain(text: str) -> str:
    """Text without control and direction marks, which could hide or turn around what stands beside it.

    Example:
        >>> plain("a\\u202eb\\nc")
        'a b c'
    """
    kept = (" " if unicodedata.category(sign) in ("Cc", "Cf", "Zl", "Zp") else sign for sign in text)
    return " ".join("".join(kept).split())


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned lines of text.

    Example:
        >>> print(as_text([["cat", "dog"], ["a", "b"]]))
        cat dog
        a   b
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    widths = [max(_columns(row[place]) for row in cells) for place in range(len(cells[0]))]
    lines = (
        " ".join(cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        for row in cells
    )
    return "\n".join(line.rstrip() for line in lines)


def as_page(
    title: str,
    grids: Sequence[tuple[str, Sequence[Sequence[str]]]],
    shares: Sequence[NDArray[np.float32]],
    picture: NDArray[np.uint8] | None,
) -> str:
    """A self-contained page: each grid of symbols as a table, its cells as strong as their shares.

    Args:
        title: of the page.
        grids: a caption and rows of symbols each.
        shares: `(row, column)` for each grid, 0 to 1.
        picture: to lie behind every table, `(height, width, 3)`.
    """
    behind = ""
    if picture is not None:
        data = base64.b64encode(png_of(picture)).decode()
        behind = f"<style>table {{ background-image: url('data:image/png;base64,{data}') }}</style>"
    figures = "\n".join(
        f"<figure><figcaption>{escape(plain(caption))}</figcaption>{_table(rows, share)}</figure>"
        for (caption, rows), share in zip(grids, shares, strict=True)
    )
    name = escape(plain(title))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        f"<style>{_STYLE}</style>{behind}</head>\n<body><h1>{name}</h1>\n<main>{figures}</main></body></html>\n"
    )


def png_of(picture: NDArray[np.uint8]) -> bytes:
    """A picture `(height, width, 3)` as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(file, "PNG", optimize=True)
    return file.getvalue()


def _table(rows: Sequence[Sequence[str]], shares: NDArray[np.float32]) -> str:
    lines = []
    for row, values in zip(rows, shares, strict=True):
        cells = "".join(_cell(plain(cell), float(share)) for cell, share in zip(row, values, strict=True))
        lines.append(f"<tr>{cells}</tr>")
    return f"<table>{''.join(lines)}</table>"


def _cell(text: str, share: float) -> str:
    kind = ' class="symbol"' if len(text) <= 2 else ""
    hover = escape(f"{text} {share:.0%}")
    return f'<td{kind} title="{hover}" style="opacity:{0.45 + 0.55 * share:.2f}">{escape(text)}</td>'


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)
