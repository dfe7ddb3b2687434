"""WordNet above ImageNet's classes: what every class is a kind of, and what a word may mean.

ImageNet's identifiers are those of WordNet 3.0's nouns ("n02123045" is the tabby). `tree.json.gz` holds those
of ImageNet-1k, 12k and 21k and all that lies above them; `python -m bench.wordnet_tree` writes it.

Fellbaum 1998, "WordNet: An Electronic Lexical Database"; Deng et al. 2009, "ImageNet: A large-scale
hierarchical image database". WordNet 3.0 is Copyright 2006 by Princeton University, see LICENSE beside this
file.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from typing import Any

from circuitvit.errors import FileError

FORMAT, VERSION = "circuitvit-wordnet", 1

_ID = {"type": "string", "pattern": "^n[0-9]{8}$"}

SCHEMA = {
    "type": "object",
    "required": ["format", "version", "source", "synsets", "commonest", "plurals", "imagenet"],
    "additionalProperties": False,
    "properties": {
        "format": {"const": FORMAT},
        "version": {"const": VERSION},
        "source": {"type": "string"},
        "synsets": {
            "type": "object",
            "propertyNames": _ID,
            "additionalProperties": {
                "type": "array",
                "prefixItems": [{"type": "string", "minLength": 1}],
                "items": _ID,
                "minItems": 1,
            },
        },
        "commonest": {"type": "object", "additionalProperties": _ID},
        "plurals": {"type": "object", "additionalProperties": {"type": "string", "minLength": 1}},
        "imagenet": {"type": "array", "items": _ID, "minItems": 1000, "maxItems": 1000},
    },
}
"""Of the file. It ships with the package, so the tests check it, and no session spends a second on it."""

ENDINGS = (("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh"), ("ies", "y"),
           ("ves", "f"), ("ves", "fe"), ("s", ""))  # fmt: skip
"""Of regular plurals, and what takes their place."""


@dataclass(frozen=True, eq=False)
class Tree:
    """Nouns and what they are kinds of.

    Attributes:
        names: the words of each synset, the usual one first.
        parents: what it is a kind of, directly; most have one.
        commonest: of words with several senses the one that is by far the most frequent, where there is one.
        plurals: irregular ones.
        imagenet: the synsets of ImageNet-1k's classes, in order.
    """

    names: Mapping[str, tuple[str, ...]]
    parents: Mapping[str, tuple[str, ...]]
    commonest: Mapping[str, str]
    plurals: Mapping[str, str]
    imagenet: tuple[str, ...]
    _above: dict[str, frozenset[str]] = field(default_factory=dict, init=False, repr=False)

    def above(self, synset: str) -> frozenset[str]:
        """All that a synset is a kind of, itself too; nothing for one that is not here.

        Example:
            >>> "n02121620" in tree().above("n02123045")  # a tabby is a cat
            True
        """
        if synset not in self._above:
            up = (self.above(parent) for parent in self.parents.get(synset, ()))
            own = {synset} if synset in self.names else set()
            self._above[synset] = frozenset(own.union(*up))
        return self._above[synset]

    def senses(self, word: str) -> tuple[str, ...]:
        """What a word may mean, in any case, with spaces or underscores, and in the plural too.

        Example:
            >>> tree().senses("Geese") == tree().senses("goose")
            True
        """
        word = folded(word)
        if re.fullmatch(r"n\d{8}", word):
            return (word,) if word in self.names else ()
        return next((self._words[form] for form in self.forms(word) if form in self._words), ())

    def likeliest(self, word: str, senses: tuple[str, ...]) -> tuple[str, ...]:
        """Those of its senses that a word stands for first: the commonest, or those that it is the usual word
        for. Several where that does not settle it.

        Example:
            >>> [tree().names[each] for each in tree().likeliest("cat", tree().senses("cat"))]
            [('cat', 'true cat')]
        """
        forms = self.forms(word)
        common = [self.commonest[form] for form in forms if self.commonest.get(form) in senses]
        usual = [each for each in senses if folded(self.names[each][0]) in forms]
        return tuple(common[:1] or usual or senses)

    def said(self, synset: str) -> str:
        """A synset for people: its words, what it is a kind of, and its identifier."""
        kinds = " and ".join(self.names[parent][0] for parent in self.parents[synset])
        return f"{', '.join(self.names[synset])}{f', a kind of {kinds}' if kinds else ''} ({synset})"

    def forms(self, word: str) -> list[str]:
        """The word as it is compared, and what it may be the plural of."""
        word = folded(word)
        regular = [word.removesuffix(many) + one for many, one in ENDINGS if word.endswith(many)]
        return [word, *([self.plurals[word]] if word in self.plurals else []), *regular]

    @cached_property
    def _words(self) -> dict[str, tuple[str, ...]]:
        found: dict[str, list[str]] = defaultdict(list)
        for synset, names in self.names.items():
            for name in dict.fromkeys(map(folded, names)):
                found[name].append(synset)
        return {name: tuple(synsets) for name, synsets in found.items()}


def folded(name: str) -> str:
    """A name as it is compared: one library writes "Border collie", another "Border_collie"."""
    return name.strip().casefold().replace("_", " ")


@cache
def tree() -> Tree:
    """The tree, read when it is first asked for.

    Raises:
        FileError: if the file is of another version than this code.
    """
    packed = resources.files(__name__).joinpath("tree.json.gz").read_bytes()
    data: dict[str, Any] = json.loads(gzip.decompress(packed))
    if (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise FileError(f"WordNet's tree is not of version {VERSION}: install circuitvit again")
    synsets = data["synsets"]
    return Tree(
        {name: tuple(entry[0].split(", ")) for name, entry in synsets.items()},
        {name: tuple(entry[1:]) for name, entry in synsets.items()},
        data["commonest"],
        data["plurals"],
        tuple(data["imagenet"]),
    )
