"""Classes by name: what a user calls a class, as an index into the logits, and back to a short label.

ImageNet's classes have several names each ("tabby, tabby cat"), some names are shared by two classes
("crane" is a bird and a machine), and WordNet has an identifier for every one ("n02123045").
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

from circuitvit.errors import OptionError, unknown_name
from circuitvit.models import Model

ClassSpec = int | str | Sequence[int | str]
"""A class by index or name, or a set of classes."""


def class_index(model: Model, wanted: int | str) -> int:
    """The place of a class among the logits.

    Args:
        model: whose classes are meant.
        wanted: an index, also as text ("281"); a class's whole name or any of its comma-separated synonyms,
            in upper or lower case, with spaces or underscores; or a WordNet id, for ImageNet models. A name
            goes before an index, so that a class called "7" is found.

    Raises:
        NameNotFoundError: if there is no such class; the message suggests the nearest.
        OptionError: if the index is out of range, several classes go by the name, or the model's classes
            have no names.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> class_index(model, "Dog"), class_index(model, 1)
        (1, 1)
    """
    if not isinstance(wanted, str):
        return _checked(model, wanted)
    name = wanted.strip()
    for found in (_named(model, name), _with_synset(model, name)):
        if len(found) == 1:
            return found[0]
        if found:
            raise OptionError(
                f"several classes are called {name!r}: {_candidates(model, found)}; give the index"
            )
    if name.removeprefix("-").isdecimal():
        return _checked(model, int(name))
    if model.classes is None:
        raise OptionError(
            f"{model.name} has no class names, so {name!r} cannot be found: give an index from 0 to "
            f"{model.n_logits - 1}, or name the classes when loading: load(..., classes=[...])"
        )
    raise unknown_name(
        "class", name, dict.fromkeys(name for names in model.classes for name in _synonyms(names))
    )


def class_indices(model: Model, wanted: ClassSpec) -> tuple[int, ...]:
    """The places of a class, or of a set of classes, among the logits; each once, in the order given.

    Raises:
        NameNotFoundError, OptionError: as `class_index`, and for an empty set.

    Example:
        >>> import circuitvit as cv
        >>> class_indices(cv.load("catdog-tiny"), ["dog", "cat", 1])
        (1, 0)
    """
    if isinstance(wanted, str) or not isinstance(wanted, Sequence):
        return (class_index(model, wanted),)
    if not wanted:
        raise OptionError("an empty set of classes has no logit")
    return tuple(dict.fromkeys(class_index(model, each) for each in wanted))


def class_label(model: Model, index: int) -> str:
    """A short name of a class for people: its first synonym, or "class 7" where it has no name.

    Outputs that are features and no classes are called "feature 7". A name that several classes share is told
    apart: "crane (class 134)".

    Example:
        >>> import circuitvit as cv
        >>> class_label(cv.load("catdog-tiny"), 0)
        'cat'
    """
    first = _first_synonym(model, index)
    if not first:
        return f"{'class' if model.has_classes else 'feature'} {index}"
    shared = sum(_first_synonym(model, other) == first for other in range(model.n_logits)) > 1
    return f"{first} (class {index})" if shared else first


def classes_label(model: Model, indices: Sequence[int]) -> str:
    """A short name of a set of classes: its first, and how many more there are."""
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    return class_label(model, indices[0]) + more


def _checked(model: Model, wanted: int) -> int:
    try:
        index = operator.index(wanted)  # NumPy's and torch's integers too, but no 1.0
    except TypeError as error:
        raise OptionError(f"a class is an index or a name, not {wanted!r}") from error
    if isinstance(wanted, bool):
        raise OptionError(f"a class is an index or a name, not {wanted}")
    if not 0 <= index < model.n_logits:
        raise OptionError(
            f"there is no class {index}: {model.name} has {model.n_logits}, from 0 to {model.n_logits - 1}"
        )
    return index


def _synonyms(names: str) -> list[str]:
    return [synonym for part in names.split(",") if (synonym := part.strip())]


def _first_synonym(model: Model, index: int) -> str:
    if model.classes is None or not 0 <= index < len(model.classes):
        return ""
    return next(iter(_synonyms(model.classes[index])), "")


def _named(model: Model, name: str) -> list[int]:
    """The classes that go by `name`, whole or as a synonym, whatever its case and underscores."""
    folded = _folded(name)
    if not folded:  # classes without a name are not called ""
        return []
    return [
        index
        for index, names in enumerate(model.classes or ())
        if folded in map(_folded, (names, *_synonyms(names)))
    ]


def _folded(name: str) -> str:
    """A name as it is compared: one library writes "Border collie", another "Border_collie"."""
    return name.strip().casefold().replace("_", " ")


def _with_synset(model: Model, name: str) -> list[int]:
    return [index for index, synset in enumerate(model.synsets or ()) if synset == name.lower()]


def _candidates(model: Model, found: list[int]) -> str:
    names = model.classes or ()
    synsets = [f", {model.synsets[index]}" if model.synsets else "" for index in found]
    return "; ".join(
        f"{index} ({names[index]}{synset})" for index, synset in zip(found, synsets, strict=True)
    )
