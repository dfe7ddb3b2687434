"""Which of a model's classes are a kind of something, by WordNet: all cats, all vehicles.

Where a model knows its classes' WordNet identifiers, as models of ImageNet do, that is a fact. Of other
models the names of the classes are looked up: a name with several meanings counts as what it commonly stands
for ("horse" is the animal, no gymnast's), and where that is not clear ("crane") and matters, the group is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from circuitvit.errors import NameNotFoundError, OptionError, unknown_name
from circuitvit.models import Model
from circuitvit.tasks.wordnet import folded, tree

Named = Callable[[int], str]
"""A class's short name, by its index."""

LISTED = 3

ALIKE = 0.9
"""A thousand names are ImageNet's if this share of them, each in its place, is."""


@dataclass(frozen=True)
class Kind:
    """Some of a model's classes.

    Attributes:
        synset: what they are kinds of; None where they go by the name alone.
        members: the classes, in order.
    """

    synset: str | None
    members: tuple[int, ...]


def kind_of(model: Model, word: str, named: Named) -> Kind:
    """The classes that are kinds of what a word means.

    Args:
        model: whose classes count.
        word: a word of WordNet's, in any case and number, or an identifier; or the name of a class.
        named: how classes are called in messages.

    Raises:
        NameNotFoundError: if no class is one; the message suggests near words that have some.
        OptionError: if several meanings of the word have classes, or it is not clear what a class is.
    """
    _refuse_nameless(model, word)
    senses, places = tree().senses(word), meanings(model)
    found = {sense: members for sense in senses if (members := _below(places, sense))}
    likely = [each for each in tree().likeliest(word, tuple(found)) if each in found]
    if len({found[each] for each in likely}) > 1:
        said = "; ".join(f"{tree().said(each)}: {listed(found[each], named)}" for each in likely)
        raise OptionError(
            f"group:{word} has several meanings that {model.name} has classes of: {said}. Write "
            f"the identifier in place of the word, such as group:{likely[0]}"
        )
    if not likely:
        return _by_name(model, word, senses, named)
    _refuse_unclear(model, word, likely, named)
    return Kind(likely[0], found[likely[0]])


def meanings(model: Model) -> tuple[tuple[str, ...], ...]:
    """What each class may be, as WordNet's identifiers: one where it is known, none where WordNet has no such
    word.
    """
    if model.synsets is not None:
        return tuple((each,) for each in model.synsets)
    return _looked_up(model.classes or ())


def words_of(model: Model) -> list[str]:
    """All words that are groups of this model, those of many classes last."""
    count: dict[str, int] = {}
    for place in meanings(model):
        for synset in frozenset[str]().union(*map(tree().above, place)):
            count[synset] = count.get(synset, 0) + 1
    return list(
        dict.fromkeys(name for each in sorted(count, key=count.__getitem__) for name in tree().names[each])
    )


def taken_for(model: Model, members: Sequence[int]) -> list[str]:
    """What the names of classes were taken for, where a model does not know what its classes are."""
    places, names = meanings(model), model.classes or ()
    if model.synsets is not None or places == tuple((each,) for each in tree().imagenet):
        return []
    return [f"{names[index]}: {tree().said(places[index][0])}" for index in members if places[index]]


def listed(members: Sequence[int], named: Named) -> str:
    """The first few of some classes."""
    more = ", ..." if len(members) > LISTED else ""
    return ", ".join(map(named, members[:LISTED])) + more


def around(model: Model, kind: Kind) -> tuple[dict[str, int], dict[str, int]]:
    """What lies around a group: what it is a kind of, nearest first, and the smaller groups in it; each with
    the number of the model's classes that are of it.
    """
    if kind.synset is None:
        return {}, {}
    places, above = meanings(model), tree().above
    over = sorted(above(kind.synset) - {kind.synset}, key=lambda each: (-len(above(each)), each))
    inside = {each for member in kind.members for place in places[member] for each in above(place)}
    under = sorted(
        (each for each in inside if each != kind.synset and kind.synset in above(each)),
        key=lambda each: (len(above(each)), each),
    )
    smaller = {each: len(_below(places, each)) for each in under}
    return (
        {each: len(_below(places, each)) for each in over},
        {each: count for each, count in smaller.items() if 1 < count < len(kind.members)},
    )


# -- inside --------------------------------------------------------------------------------------


def _below(places: Sequence[tuple[str, ...]], synset: str) -> tuple[int, ...]:
    """The classes that are, or may be, a kind of something."""
    above = tree().above
    return tuple(index for index, place in enumerate(places) if any(synset in above(each) for each in place))


def _by_name(model: Model, word: str, senses: Sequence[str], named: Named) -> Kind:
    """The classes that are called so, whatever WordNet knows of it."""
    forms = tree().forms(word)
    members = tuple(
        index for index, names in enumerate(names_of(model)) if any(folded(each) in forms for each in names)
    )
    if members:
        return Kind(None, members)
    own = listed(range(model.n_logits), named)
    if senses:
        raise NameNotFoundError(f"none of the classes of {model.name} is a kind of {word!r}; they are {own}")
    known = words_of(model)
    if not known:
        raise NameNotFoundError(
            f"WordNet knows neither {word!r} nor the classes of {model.name} ({own}): name the members"
        )
    raise unknown_name("group", word, known)


def _refuse_nameless(model: Model, word: str) -> None:
    if model.classes is None and model.synsets is None:
        raise OptionError(
            f"{model.name} has no class names, so group:{word} cannot be found: name the classes when "
            "loading, classes=[...], or give indices"
        )


def _refuse_unclear(model: Model, word: str, senses: Sequence[str], named: Named) -> None:
    """Refuse a group of which a class may be a member or not."""
    for index, place in enumerate(meanings(model)):
        inside = [each for each in place if tree().above(each).intersection(senses)]
        if inside and len(inside) < len(place):
            said = " or ".join(tree().said(each) for each in place)
            raise OptionError(
                f"group:{word}: it is not clear whether the class {named(index)!r} of {model.name} is one: "
                f"it may be {said}. Name the members instead, one by one"
            )


@lru_cache(maxsize=8)
def _looked_up(classes: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """What classes may be, by their names; ImageNet's thousand are known by their order."""
    imagenet = tree().imagenet
    if len(classes) == len(imagenet):
        alike = [synset in _meant(names, every=True) for names, synset in zip(classes, imagenet, strict=True)]
        if sum(alike) >= ALIKE * len(imagenet):
            return tuple((each,) for each in imagenet)
    return tuple(map(_meant, classes))


def _meant(names: str, every: bool = False) -> tuple[str, ...]:
    """What a class may be: all that its synonyms can mean, where they agree on something only that."""
    known = [(name, senses) for name in synonyms(names) if (senses := tree().senses(name))]
    if not known:
        return ()
    if every:
        return tuple(sense for _, senses in known for sense in senses)
    common = tuple(each for each in known[0][1] if all(each in senses for _, senses in known))
    return tree().likeliest(known[0][0], common or known[0][1])


def names_of(model: Model) -> tuple[tuple[str, ...], ...]:
    """The names that each class goes by: a prompt by itself, with its commas; all others by synonyms."""
    return _divided(model.classes or (), bool(model.prompts))


@lru_cache(maxsize=8)
def _divided(classes: tuple[str, ...], prompts: bool) -> tuple[tuple[str, ...], ...]:
    return tuple((names,) if prompts else tuple(synonyms(names)) for names in classes)


def synonyms(names: str) -> list[str]:
    """The names of a class, which are divided by commas."""
    return [synonym for part in names.split(",") if (synonym := part.strip())]
