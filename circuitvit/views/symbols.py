"""A symbol for each class: from the user's own table, or found in the names of classes.

No table of emoji comes with the library. Unicode itself says what its pictures show, and Python knows those
names: a class with "cat" among the words of its names gets the character called CAT FACE.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from circuitvit.models import Model
from circuitvit.tasks.classes import class_index

_PICTURES = range(0x1F300, 0x1FB00)
"""Where Unicode keeps pictures; letters and arrows elsewhere have names with everyday words in them too."""


def class_symbols(model: Model, table: Mapping[str | int, str] | None = None) -> dict[int, str]:
    """Symbols by class index, for `LogitLens.table` and its figures.

    Args:
        model: whose classes.
        table: a symbol for each class, by name, WordNet id or index (also as text, as in JSON). Without a
            table symbols are made from the words of the class names, for as many classes as have one.

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
        return {class_index(model, name): str(symbol) for name, symbol in table.items()}
    found = {index: _picture_of(names) for index, names in enumerate(model.classes or ())}
    return {index: symbol for index, symbol in found.items() if symbol}


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
