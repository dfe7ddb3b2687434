"""Symbols for classes, and tables of them as text and as a page: figures cannot show colour emoji.

Symbols are the user's own, or found in the names of classes. There is no table of emoji: Unicode itself says
what its pictures show. A class with "cat" in its name gets the character called CAT FACE.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from importlib.resources import files

import jinja2
import numpy as np
from numpy.typing import NDArray

from circuitvit.export.svg import image_uri
from circuitvit.export.written import is_written
from circuitvit.graph.files import clean
from circuitvit.models import Model
from circuitvit.tasks.classes import ClassGroup, class_indices

_PICTURES = range(0x1F300, 0x1FB00)
"""Where Unicode keeps pictures; letters and arrows elsewhere have names with everyday words in them too."""

Table = Sequence[Sequence[str]]


def class_symbols(model: Model, table: Mapping[str | int | ClassGroup, str] | None = None) -> dict[int, str]:
    """Symbols by class index, for `LogitLens.table` and its figures.

    Args:
        model: whose classes.
        table: a symbol for each class, by name, WordNet id or index (also as text, as in JSON), or for each
            group of them ("group:dog"); where a class has several, the last counts. Without a table symbols
            are made from the words of the class names, for as many classes as have one.

    Raises:
        NameNotFoundError: for an unknown class in the table.

    Example:
        >>> import circuitvit as cv
        >>> class_symbols(cv.load("catdog-tiny"))[1] == "\\N{DOG FACE}"
        True
        >>> class_symbols(cv.load("catdog-tiny"), {"cat": "C", 1: "D"})
        {0: 'C', 1: 'D'}
    """
    if table is not None:
        return {index: str(symbol) for name, symbol in table.items() for index in class_indices(model, name)}
    found = {index: _picture_of(names) for index, names in enumerate(model.classes or ())}
    return {index: symbol for index, symbol in found.items() if symbol}


def as_text(table: Table) -> str:
    """Rows of cells as aligned lines of text; emoji count as two columns wide.

    Example:
        >>> print(as_text([["cat", "dog"], ["a", "b"]]))
        cat dog
        a   b
    """
    rows = [[clean(cell) for cell in row] for row in table]
    widths = [max(map(_columns, column)) for column in zip(*rows, strict=True)]
    padded = (
        (cell + " " * (width - _columns(cell)) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(" ".join(row).rstrip() for row in padded)


def as_page(
    title: str, tables: Sequence[tuple[str, Table, NDArray[np.float32]]], picture: NDArray[np.uint8] | None
) -> str:
    """A page without scripts that needs no other file: the cells of each table are as strong as their shares.

    Args:
        title: of the page.
        tables: a caption, rows of symbols, and shares `(row, column)` from 0 to 1, each.
        picture: to lie behind every table, `(height, width, 3)`; the words of a sentence stand beside it.
    """
    source = files("circuitvit.views").joinpath("lens.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, trim_blocks=True, keep_trailing_newline=True).from_string(
        source
    )
    cells = [
        (
            clean(caption),
            [list(zip(map(clean, row), share, strict=True)) for row, share in zip(rows, shares, strict=True)],
        )
        for caption, rows, shares in tables
    ]
    behind = None if picture is None else image_uri(np.ascontiguousarray(picture))
    beside = picture is not None and all(is_written(picture, share.shape) for _, _, share in tables)
    return page.render(title=clean(title), tables=cells, picture=behind, written=beside)


# -- inside --------------------------------------------------------------------------------------


def _picture_of(names: str) -> str:
    """The picture named by a word of a class's names, later words first: a tiger cat is a cat."""
    for synonym in names.split(","):
        for word in reversed(re.findall(r"[a-z]+", synonym.lower())):
            for name in (f"{word} FACE", word):
                try:
                    character = unicodedata.lookup(name)
                except KeyError:
                    continue
                if len(character) == 1 and ord(character) in _PICTURES:
                    return character
    return ""


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(sign) in "WF" else 1 for sign in text)
