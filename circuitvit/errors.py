"""Every error this library raises on purpose: one base class and a few kinds.

The message names the offending thing and the way out of it, so that nobody has to read a traceback.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Integral, Real


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


class ProcessError(Exception):
    """Another of the processes that share the work has ended; the message says what has been saved.

    Nothing was refused: work that goes on where something cannot be asked must not go on after this.
    """


def check_whole(name: str, value: object, least: int = 1) -> None:
    """Refuse anything but a whole number of at least `least`.

    Raises:
        OptionError: naming what was given.

    Example:
        >>> check_whole("steps", 1.5)
        Traceback (most recent call last):
        ...
        circuitvit.errors.OptionError: steps must be a whole number, not 1.5
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{name} must be a whole number, not {value!r}")
    if int(value) < least:
        raise OptionError(f"{name} must be at least {least}, not {value}")


def check_number(name: str, value: object, above: float = 0.0, below: float = math.inf) -> None:
    """Refuse anything but a number between two others, by default a positive one.

    Raises:
        OptionError: naming what was given.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not above < float(value) < below:
        wanted = f"a number between {above:g} and {below:g}" if below < math.inf else "a positive number"
        wanted = "a finite number" if above == -math.inf and below == math.inf else wanted
        raise OptionError(f"{name} must be {wanted}, not {value!r}")


def counted(n: int, noun: str) -> str:
    """A number of things in words.

    Example:
        >>> counted(1, "pair"), counted(3, "pair")
        ('1 pair', '3 pairs')
    """
    return f"{n} {noun}{'' if n == 1 else 's'}"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> NameNotFoundError:
    """The error for a `name` that is none of the `known` ones, with up to three near misses.

    Example:
        >>> str(unknown_name("method", "epa", ["eap", "exact"]))
        "unknown method 'epa': did you mean 'eap'?"
    """
    known = list(known)
    lowered = {candidate.lower(): candidate for candidate in known}
    wrong = str(name).lower()
    begun = [candidate for candidate in known if candidate.lower().startswith(wrong)] if wrong else []
    close = difflib.get_close_matches(wrong, list(lowered), n=3, cutoff=0.6)
    near = list(dict.fromkeys([*begun[:1], *(lowered[hit] for hit in close)]))[:3]
    if near:
        hint = f"did you mean {' or '.join(repr(candidate) for candidate in near)}?"
    elif len(known) <= 20:
        hint = f"choose from {', '.join(known)}"
    else:
        hint = f"there are {len(known)}, such as {', '.join(known[:3])}"
    return NameNotFoundError(f"unknown {kind} {name!r}: {hint}")
