"""What a circuit is said to carry, as data: edges, and for each of them what may not differ between images.

    Interpretation(
        ["input -> a0.h0<k>", "input -> a0.h0<v>", "a0.h0 -> a1.h0<v>", "a1.h0 -> logits"],
        {"a0.h0": "colour of the cue", "a1.h0": "colour of the cue"},
        labels={"colour of the cue": ["red", "blue", ...]},  # one for each image
    )

A claim names edges by a pattern (see `patterns`), so that a node's name alone means all by which it is heard,
and says in which feature two images have to be equal for one to stand in for the other. Chan et al. 2022,
"Causal scrubbing", call circuit and claims together a hypothesis, and the claims its interpretation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from circuitvit.errors import DataError, NameNotFoundError, OptionError, counted, unknown_name
from circuitvit.graph import Circuit, Graph
from circuitvit.verification.patterns import EdgesLike, edges_of, select_edges

EVERYTHING, NOTHING = "everything", "nothing"
"""What needs no labels: an edge that carries everything is read from the image itself, one that carries
nothing from any image."""

AND = "&"
"""Between names of labels: equal in all of them."""

IMAGE = "image"
"""Labels of this name say which image each row of a table is about."""

Carried = str | Sequence[Any] | np.ndarray | Callable[[int], Any]
"""What an edge carries: names of labels, the labels themselves, or a function of the image's number."""


@dataclass(frozen=True)
class Claim:
    """One claim, with what it says of each image.

    Attributes:
        pattern: which edges of the circuit it is about.
        carries: names of labels, "everything" or "nothing"; for labels of its own "its labels".
        edges: how many edges it decides.
        classes: the different labels.
        members: of every image the number of its label; empty where it has none.
    """

    pattern: str
    carries: str
    edges: int
    classes: tuple[str, ...]
    members: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.pattern} carries {self.carries}"

    @property
    def singles(self) -> tuple[int, ...]:
        """The labels that a single image has, by their numbers."""
        return tuple(np.flatnonzero(np.bincount(self.members) == 1).tolist()) if self.members else ()


@dataclass(frozen=True, eq=False)
class Claimed:
    """A circuit whose every edge has one claim.

    Attributes:
        circuit: without dead edges.
        claims: in the order in which they were given.
        deciding: number of the claim about each edge, -1 for none, `(sender, receiver, group)`.
    """

    circuit: Circuit
    claims: tuple[Claim, ...]
    deciding: Int64[np.ndarray, "sender receiver group"]


@dataclass(frozen=True, eq=False)
class Interpretation:
    """A circuit, and what its nodes carry: the hypothesis that `scrub` tests.

    Attributes:
        circuit: a circuit, what a search found, the path of a file, or patterns of edges.
        claims: for patterns of edges what they carry. The last claim about an edge counts; edges without one
            carry everything.
        labels: by name, one label (text, number or truth value) for each image of the task: its clean images,
            and then its corrupt ones. A pandas table will do. Labels called "image" have to be the names of
            the image files, so that a table in another order is not taken for right.

    Example:
        >>> Interpretation(["a9.h2 -> logits"], {"a9.h2": "species & colour"}, labels=table)  # doctest: +SKIP
    """

    circuit: EdgesLike
    claims: Mapping[str, Carried] = field(default_factory=dict)
    labels: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        claims: Any = self.claims
        if not isinstance(claims, Mapping) or not all(isinstance(key, str) for key in claims):
            raise OptionError("claims are given by patterns of edges, such as {'a9.h2': 'species'}")
        try:
            labels = {str(name): self.labels[name] for name in self.labels}
        except (TypeError, KeyError, IndexError) as error:
            raise OptionError("labels are given by name, such as {'species': ['cat', 'dog']}") from error
        if taken := {EVERYTHING, NOTHING} & set(labels):
            raise OptionError(f"labels cannot be called {taken.pop()!r}, which says that none are needed")
        object.__setattr__(self, "labels", labels)

    def about(self, graph: Graph, clean: Sequence[str], corrupt: Sequence[str] = ()) -> Claimed:
        """The circuit with a claim for each edge.

        Args:
            graph: of the model, with the task's token groups.
            clean: the names of the clean images.
            corrupt: of the corrupt ones.

        Raises:
            NameNotFoundError: if a pattern names no edge of the circuit, or labels have no such name.
            OptionError: if no edge is on a path from the input to the logits, or a claim decides no edge.
            DataError: if there is not one label for each image, or no two images have the same.
        """
        circuit = select_edges(graph, self.circuit).pruned()
        if not len(circuit):
            raise OptionError("no edge of the circuit is on a path from the input to the logits")
        deciding = np.full(graph.shape, -1, dtype=np.int64)
        for number, pattern in enumerate(self.claims):
            named = edges_of(graph, pattern) & circuit.kept
            if not named.any():
                raise NameNotFoundError(
                    f"the claim about {pattern!r} names no edge of the circuit that is on a path from the "
                    f"input to the logits: its nodes are {', '.join(circuit.nodes)}"
                )
            deciding[named] = number
        images = (len(clean), len(corrupt))
        if IMAGE in self.labels:
            _check_names(_plain(self.labels[IMAGE], IMAGE, images), (*clean, *corrupt))
        claims = tuple(
            self._claim(pattern, carried, int((deciding == number).sum()), images)
            for number, (pattern, carried) in enumerate(self.claims.items())
        )
        return Claimed(circuit, claims, deciding)

    def _claim(self, pattern: str, carried: Carried, edges: int, images: tuple[int, int]) -> Claim:
        if not edges:
            raise OptionError(
                f"the claim about {pattern!r} decides no edge, as later ones are about all of its"
            )
        if isinstance(carried, str) and carried in (EVERYTHING, NOTHING):
            classes = () if carried == EVERYTHING else ("any",)
            return Claim(pattern, carried, edges, classes, (0,) * sum(images) * len(classes))
        columns, name = self._columns(pattern, carried, images)
        rows = list(zip(*columns, strict=True))
        classes_of = sorted(set(rows), key=lambda row: [(isinstance(each, str), each) for each in row])
        numbers = {row: number for number, row in enumerate(classes_of)}
        if len(classes_of) == len(rows):
            raise DataError(
                f"no two of {counted(len(rows), 'image')} have the same label in {name!r} ({pattern!r}), so "
                "that none can stand in for another: join labels, or claim that it carries 'everything'"
            )
        said = tuple(", ".join(map(str, row)) for row in classes_of)
        if len(set(said)) < len(said):
            raise DataError(f"two labels in {name!r} read the same, such as 1 and '1': make them differ")
        return Claim(pattern, name, edges, said, tuple(numbers[row] for row in rows))

    def _columns(
        self, pattern: str, carried: Carried, images: tuple[int, int]
    ) -> tuple[list[list[str | float]], str]:
        """The labels that have to be equal, and what they are called."""
        if not isinstance(carried, str):
            given = [carried(number) for number in range(sum(images))] if callable(carried) else carried
            return [_plain(given, pattern, images)], "its labels"
        names = [carried] if carried in self.labels else [name.strip() for name in carried.split(AND)]
        for name in names:
            if name not in self.labels:
                raise unknown_name("labels", name, (*self.labels, EVERYTHING, NOTHING))
        return [_plain(self.labels[name], name, images) for name in names], f" {AND} ".join(names)


def _plain(given: Any, name: str, images: tuple[int, int]) -> list[str | float]:
    """One label for each image as plain values, of which equal ones are the same."""
    values = given.detach().cpu() if hasattr(given, "detach") else given
    values = values.tolist() if hasattr(values, "tolist") else list(_entries(values, name))
    clean, corrupt = images
    if len(values) != sum(images):
        which = f": {clean} clean ones, and then {corrupt} corrupt ones" if corrupt else ""
        raise DataError(
            f"the labels of {name!r} are {len(values)}, and there are {counted(sum(images), 'image')}{which}"
        )
    found = [each.item() if isinstance(each, np.generic) else each for each in values]
    for number, each in enumerate(found):
        if not isinstance(each, (str, bool, int, float)) or each != each:
            raise DataError(f"the label of image {number} in {name!r} is {each!r}: give text or a number")
    return found


def _check_names(said: Sequence[str | float], names: Sequence[str]) -> None:
    """Refuse a table whose rows are about other images; the name of a file is enough, without its folder."""
    for number, (one, name) in enumerate(zip(said, names, strict=True)):
        if str(one) not in (name, Path(name).name):
            raise DataError(
                f"row {number} of the labels is about image {str(one)!r}, and image {number} is {name!r}: "
                "put the rows in the order of the images, clean ones first"
            )


def _entries(values: Any, name: str) -> Iterator[Any]:
    if isinstance(values, (str, bytes, Path)) or not hasattr(values, "__iter__"):
        raise OptionError(f"the labels of {name!r} are {values!r}: give one for each image")
    yield from values
