"""Classes by name: what a user calls a class, as an index into the logits, and back to a short label.

ImageNet's classes have several names each ("tabby, tabby cat"), some names are shared by two classes
("crane" is a bird and a machine), and WordNet has an identifier for every one ("n02123045") and for what they
are kinds of: `group("cat")` is all cats, and may be written "group:cat" wherever a class is named.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from circuitvit.errors import NameNotFoundError, OptionError, unknown_name
from circuitvit.models import Model
from circuitvit.tasks.kinds import Kind, kind_of, listed, names_of, taken_for
from circuitvit.tasks.wordnet import folded

PREFIX = "group:"


@dataclass(frozen=True)
class ClassGroup:
    """Classes that belong together; which of a model's own these are is found when the group is used.

    Attributes:
        name: a word, whose kinds are meant; or what the given classes are to be called.
        classes: by index, name or WordNet id; None for all that are a kind of what the name says.
    """

    name: str
    classes: tuple[int | str, ...] | None = None

    def members(self, model: Model) -> dict[int, str]:
        """The classes of a model that belong to the group, by index, with short names.

        Raises:
            NameNotFoundError: if there is none.
            OptionError: if the name has several meanings that the model has classes of.

        Example:
            >>> import circuitvit as cv
            >>> cv.group("animal").members(cv.load("catdog-tiny"))
            {0: 'cat', 1: 'dog'}
        """
        return {index: class_label(model, index) for index in class_indices(model, self)}

    def __str__(self) -> str:
        return f"{PREFIX}{self.name}"


ClassSpec = int | str | ClassGroup | Sequence[int | str | ClassGroup]
"""A class by index or name, a group, or a set of these."""


def group(name: str, classes: Sequence[int | str] | None = None) -> ClassGroup:
    """All classes of a kind, such as all cats: wherever a class, or a set of classes, can be named.

    Kinds are those of WordNet, the tree that ImageNet's classes were taken from. Of other models' classes
    the names are looked up in it. The logit of a group is that of any set of classes: the log of the summed
    exponentials, so that a difference is the log-odds of "one of these" against "one of those".

    Args:
        name: a word in any case, in the singular or the plural ("cat", "sea bird"); a WordNet id, such as
            "n02121620", where a word has several meanings; or, with `classes`, what they are to be called.
        classes: the members themselves.

    Raises:
        OptionError: for a name that is no text or empty, or no classes.

    Example:
        >>> import circuitvit as cv
        >>> cv.logit_diff(cv.group("cat"), cv.group("dog")).name
        'logit_diff'
        >>> cv.group("pets", ["cat", "dog"]).members(cv.load("catdog-tiny"))
        {0: 'cat', 1: 'dog'}
    """
    word: object = name
    if not isinstance(word, str) or not word.strip():
        raise OptionError(f"a group has a name, such as 'cat', not {word!r}")
    given: object = classes
    if given is not None and (isinstance(given, str) or not isinstance(given, Sequence) or not given):
        raise OptionError(f"the members of a group are a list of classes, not {given!r}")
    return ClassGroup(name.strip().removeprefix(PREFIX).strip(), None if classes is None else tuple(classes))


def as_group(wanted: object) -> ClassGroup | None:
    """The group that is meant by one, or by a text such as "group:cat"; None for anything else."""
    if isinstance(wanted, ClassGroup):
        return wanted
    if isinstance(wanted, str) and wanted.strip().casefold().startswith(PREFIX):
        return group(wanted.strip()[len(PREFIX) :])
    return None


def class_index(model: Model, wanted: int | str | ClassGroup) -> int:
    """The place of a class among the logits.

    Args:
        model: whose classes are meant.
        wanted: an index, also as text ("281"); a class's whole name or any of its comma-separated synonyms,
            in upper or lower case, with spaces or underscores; or a WordNet id, for ImageNet models. A name
            goes before an index, so that a class called "7" is found. A group will do that has one class.

    Raises:
        NameNotFoundError: if there is no such class; the message suggests the group of that name, or the
            nearest.
        OptionError: if the index is out of range, several classes go by the name or are the group's, or the
            model's classes have no names.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> class_index(model, "Dog"), class_index(model, 1)
        (1, 1)
    """
    if isinstance(wanted, ClassGroup):
        return _single(model, wanted)
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
    if (meant := as_group(name)) is not None:
        return _single(model, meant)
    if name.removeprefix("-").isdecimal():
        return _checked(model, int(name))
    if model.classes is None:
        raise OptionError(
            f"{model.name} has no class names, so {name!r} cannot be found: give an index from 0 to "
            f"{model.n_logits - 1}, or name the classes when loading: load(..., classes=[...])"
        )
    if model.prompts:
        raise _unknown_prompt(model.prompts, name)
    _suggest_group(model, name)
    raise unknown_name("class", name, dict.fromkeys(name for names in names_of(model) for name in names))


def class_indices(model: Model, wanted: ClassSpec) -> tuple[int, ...]:
    """The places of a class, or of a set of classes, among the logits; each once, in the order given.

    Raises:
        NameNotFoundError, OptionError: as `class_index`, and for an empty set.

    Example:
        >>> import circuitvit as cv
        >>> class_indices(cv.load("catdog-tiny"), ["dog", "cat", 1])
        (1, 0)
    """
    if not isinstance(wanted, Sequence) or isinstance(wanted, str):
        return _members(model, wanted)
    if not wanted:
        raise OptionError("an empty set of classes has no logit")
    return tuple(dict.fromkeys(index for each in wanted for index in _members(model, each)))


def class_or_kind(model: Model, wanted: ClassSpec) -> ClassSpec:
    """What is meant by the name of a class or, where the model has no class of that name, of a kind.

    So that a folder called "cats" may hold all cats of ImageNet.

    Raises:
        NameNotFoundError, OptionError: as `class_indices`, where it is neither.

    Example:
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> class_or_kind(model, "cat"), str(class_or_kind(model, "animals"))
        ('cat', 'group:animals')
    """
    try:
        class_indices(model, wanted)
    except NameNotFoundError as error:
        if not isinstance(wanted, str):
            raise
        meant = ClassGroup(wanted.strip())
        try:
            class_indices(model, meant)
        except (NameNotFoundError, OptionError):
            raise error from None
        return meant
    return wanted


def opposed(
    model: Model, target: ClassSpec, foil: ClassSpec | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The places of a target and of its foil among the logits; none for no foil.

    Raises:
        NameNotFoundError: for an unknown class.
        OptionError: as `class_index`, and if the two share a class.

    Example:
        >>> import circuitvit as cv
        >>> opposed(cv.load("catdog-tiny"), "cat", "dog")
        ((0,), (1,))
    """
    wanted, others = class_indices(model, target), () if foil is None else class_indices(model, foil)
    if shared := sorted({*wanted}.intersection(others)):
        raise OptionError(f"target and foil share {classes_label(model, shared)}: name others")
    return wanted, others


def kind(model: Model, wanted: ClassGroup) -> Kind:
    """The classes of a group, and what it was taken for.

    Raises:
        NameNotFoundError, OptionError: as `ClassGroup.members`.
    """
    if wanted.classes is not None:
        return Kind(None, class_indices(model, wanted.classes))
    return kind_of(model, wanted.name, lambda index: class_label(model, index))


def taken_on_trust(model: Model, specs: Sequence[ClassSpec | None]) -> list[str]:
    """What classes were taken for by their names, in groups of a model that does not know what they are."""
    flat = [each for spec in specs for each in (spec if isinstance(spec, (list, tuple)) else (spec,))]
    groups = dict.fromkeys(found for each in flat if (found := as_group(each)) and found.classes is None)
    members = dict.fromkeys(index for each in groups for index in class_indices(model, each))
    return taken_for(model, tuple(members))


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
    shared = model.classes is not None and _firsts(names_of(model))[first] > 1
    return f"{first} (class {index})" if shared else first


def spec_label(model: Model, wanted: ClassSpec) -> str:
    """A short name of what was asked for: a class's, a group's with the number of its classes, or a set's.

    Example:
        >>> import circuitvit as cv
        >>> spec_label(cv.load("catdog-tiny"), cv.group("animal"))
        'animal (2 classes)'
    """
    if isinstance(wanted, Sequence) and not isinstance(wanted, str) and len(wanted) == 1:
        return spec_label(model, wanted[0])
    indices, meant = class_indices(model, wanted), as_group(wanted)
    if meant is None or len(indices) == 1:
        return classes_label(model, indices)
    return f"{meant.name} ({len(indices)} classes)"


def classes_label(model: Model, indices: Sequence[int]) -> str:
    """A short name of a set of classes: its first, and how many more there are."""
    more = f" and {len(indices) - 1} more" if len(indices) > 1 else ""
    return class_label(model, indices[0]) + more


def _members(model: Model, wanted: int | str | ClassGroup) -> tuple[int, ...]:
    """The class, or the classes of a group; a class that is itself called "group:..." goes first."""
    meant = as_group(wanted)
    if meant is None or (isinstance(wanted, str) and _named(model, wanted)):
        return (class_index(model, wanted),)
    return kind(model, meant).members


def _single(model: Model, wanted: ClassGroup) -> int:
    """The class of a group that has but one."""
    members = kind(model, wanted).members
    if len(members) > 1:
        some = listed(members, lambda index: class_label(model, index))
        raise OptionError(
            f"one class is meant here, and {wanted} is {len(members)} ({some}): name one of them"
        )
    return members[0]


def _suggest_group(model: Model, name: str) -> None:
    """Refuse a name that is no class, where it is a group of them.

    Raises:
        NameNotFoundError: naming the group and its first members.
        OptionError: if the name has several meanings.
    """
    try:
        found = kind(model, ClassGroup(name)).members
    except NameNotFoundError:
        return
    if len(found) > 1:
        members = listed(found, lambda index: class_label(model, index))
        raise NameNotFoundError(
            f"{name!r} is no single class of {model.name}; it is a group of {len(found)} ({members}): write "
            f"cv.group({name!r}) for all of them"
        )
    raise NameNotFoundError(f"unknown class {name!r}: did you mean {class_label(model, found[0])!r}?")


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


def _first_synonym(model: Model, index: int) -> str:
    if model.classes is None or not 0 <= index < len(model.classes):
        return ""
    return next(iter(names_of(model)[index]), "")


@lru_cache(maxsize=8)
def _firsts(classes: tuple[tuple[str, ...], ...]) -> Counter[str]:
    """How many classes have each first name."""
    return Counter(next(iter(names), "") for names in classes)


@lru_cache(maxsize=8)
def _places(classes: tuple[str, ...], divided: tuple[tuple[str, ...], ...]) -> dict[str, list[int]]:
    """The classes that go by each name, whole or a synonym; those without a name are not called ""."""
    found: dict[str, list[int]] = {}
    for index, (whole, names) in enumerate(zip(classes, divided, strict=True)):
        for name in {*map(folded, (whole, *names))} - {""}:
            found.setdefault(name, []).append(index)
    return found


def _named(model: Model, name: str) -> list[int]:
    """The classes that go by `name`, whole or as a synonym, whatever its case and underscores."""
    return _places(model.classes or (), names_of(model)).get(folded(name), [])


def _unknown_prompt(prompts: Sequence[str], name: str) -> NameNotFoundError:
    """The error for a word, with the prompts that it stands in."""
    found = [prompt for prompt in prompts if folded(name) in folded(prompt).split()]
    if not found:
        return unknown_name("prompt", name, [repr(prompt) for prompt in prompts])
    near = " or ".join(map(repr, found[:3]))
    return NameNotFoundError(f"unknown prompt {name!r}: did you mean {near}? A prompt is named as a whole")


def _with_synset(model: Model, name: str) -> list[int]:
    return [index for index, synset in enumerate(model.synsets or ()) if synset == name.lower()]


def _candidates(model: Model, found: list[int]) -> str:
    names = model.classes or ()
    synsets = [f", {model.synsets[index]}" if model.synsets else "" for index in found]
    return "; ".join(
        f"{index} ({names[index]}{synset})" for index, synset in zip(found, synsets, strict=True)
    )
