"""Every error this library raises on purpose: one base class and a few kinds.

The message names the offending thing and the way out of it, so that nobody has to read a traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CircuitViTError(Exception):
    """Base class: `except CircuitViTError` catches everything the library refuses on purpose."""


class ModelError(CircuitViTError):
    """A model that cannot be loaded or gives unusable numbers: a misfitting checkpoint, NaN weights."""


class UnsupportedModelError(ModelError):
    """A model that cannot be decomposed; the message names the module and the switch in the way."""


class DataError(CircuitViTError):
    """Images, pairs or metrics that cannot be used: unreadable, mismatched, or without any effect."""


class FileError(CircuitViTError):
    """A file that cannot be read or written, or whose content is not what it should be."""


class OptionError(CircuitViTError):
    """An argument that makes no sense; the message says which values do."""


class NameNotFoundError(CircuitViTError, KeyError):
    """A node, edge, class, method or model that does not exist; the message suggests the nearest.

    It is a `KeyError` too, because names are looked up with square brackets.
    """

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> NameNotFoundError:
    """The error for a `name` that is none of the `known` ones, with up to three near misses.

    Example:
        >>> str(unknown_name("method", "epa", ["eap", "exact"]))
        "unknown method 'epa': did you mean 'eap'?"
    """
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    near = [lowered[hit] for hit in difflib.get_close_matches(name.lower(), list(lowered), n=3, cutoff=0.6)]
    if near:
        hint = f"did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    elif len(known) <= 20:
        hint = f"choose from {', '.join(known)}"
    else:
        hint = f"there are {len(known)}, such as {', '.join(known[:3])}"
    return NameNotFoundError(f"unknown {kind} {name!r}: {hint}")
