"""The typographic attack: how often a word on the picture is answered with, and not what is in the picture.

| figure | what it is |
| --- | --- |
| clean accuracy | share of the images as they are whose top class is right |
| neutral accuracy | the same with a neutral word on the same plate: what the plate alone costs |
| typographic accuracy | the same with the word |
| attack rate | of the images that are right without a word, the share that is answered with the word |

A plate hides a part of the picture, so accuracy may fall where nothing is read. What was read is the
difference between the word and the neutral word, and the attack rate beside that of the neutral word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.errors import DataError, NameNotFoundError, OptionError, UnsupportedModelError, counted
from circuitvit.export.style import INK
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.tasks import PerPair
from circuitvit.tasks.classes import ClassGroup, class_indices, classes_label, spec_label
from circuitvit.tasks.lettering import called
from circuitvit.tasks.with_words import Version, WithWords
from circuitvit.verification.statistics import Estimate, changed_share, percent, share_interval
from circuitvit.views.outcomes import few_images
from circuitvit.views.subjects import watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Labels = int | str | ClassGroup | Sequence[int | str | ClassGroup] | PerPair
"""A class (a group, a set) for all images, or one for each: `cv.PerPair([...])`."""

FIGURES = {
    "without": "clean accuracy", "neutral": "neutral accuracy", "word": "typographic accuracy",
}  # fmt: skip


@dataclass(frozen=True, eq=False, repr=False)
class TypographicAttack(Result):
    """What a model answers with a word on the picture, with a neutral word, and without.

    Attributes:
        model: its name.
        images: their names.
        words: what was pasted on each.
        labels: the right class of each, in short.
        named: the class that the word says, in short.
        versions: "without", "neutral" (where there is a neutral word) and "word".
        answers: the top class, as its index, `(version, image)`.
        right: whether that is right, `(version, image)`.
        read: whether that is what the word says, `(version, image)`.
        caveats: what to bear in mind.
    """

    model: str
    images: tuple[str, ...]
    words: tuple[str, ...]
    labels: tuple[str, ...]
    named: tuple[str, ...]
    versions: tuple[str, ...]
    answers: Int64[NDArray[np.int64], "version image"]
    right: Bool[NDArray[np.bool_], "version image"]
    read: Bool[NDArray[np.bool_], "version image"]
    caveats: tuple[str, ...]

    along = "images:image words:image labels:image named:image versions:version"

    def _check(self) -> None:
        if self.versions not in (("without", "word"), ("without", "neutral", "word")):
            raise OptionError(f"there are no such versions of images: {self.versions}")

    def records(self) -> Iterator[Record]:
        """One row for each `image` and `version`: the `word`, its class (`says`), the right one (`label`),
        the `answer` as an index, and whether it is `right` and what was `read`."""
        found = cells(
            {"version": self.versions, "row": range(len(self.images))},
            answer=self.answers, right=self.right, read=self.read,
        )  # fmt: skip
        for cell in found:
            row = int(cell.pop("row") or 0)
            named = {"image": self.images[row], "word": self.words[row], "says": self.named[row]}
            yield {**named, "label": self.labels[row], **cell}

    def accuracy(self, version: Version = "word") -> Estimate:
        """The share of right answers, with its exact interval.

        Raises:
            OptionError: for "neutral" where there was no neutral word.
        """
        return share_interval(self.right[self._place(version)])

    def attack_rate(self, version: Version = "word") -> Estimate:
        """Of the images that are right without a word, the share that is answered with what the word says.

        With "neutral" the same for the neutral word: how often that answer comes for other reasons.

        Raises:
            DataError: if no image is right without a word.
            OptionError: for "neutral" where there was no neutral word.
        """
        known = self.right[self._place("without")]
        if not known.any():
            raise DataError(f"{self.model} is right on no image without a word, so no answer can be turned")
        return share_interval(self.read[self._place(version)][known])

    @property
    def reading(self) -> Estimate:
        """What the letters cost: accuracy with the neutral word minus that with the word, image by image.

        Raises:
            OptionError: if there was no neutral word.
        """
        return changed_share(self.right[self._place("word")], self.right[self._place("neutral")])

    def rows(self) -> list[tuple[str, Estimate]]:
        """The figures by name, for tables."""
        found = [(FIGURES[version], self.accuracy(version)) for version in self.versions]  # type: ignore[arg-type]
        if self.right[0].any():
            found.append(("attack rate", self.attack_rate()))
            if "neutral" in self.versions:
                found.append(("attack rate, neutral", self.attack_rate("neutral")))
        if "neutral" in self.versions:
            found.append(("cost of the letters", self.reading))
        return found

    def table(self, **others: TypographicAttack) -> str:
        """The figures with their 95 % intervals; beside those of other models, by what to call them.

        Example:
            `before.table(after=repaired)` has the columns "before" and "after".
        """
        columns = {("before" if others else self.model): self, **others}
        lines = [f"{'':<21}" + "".join(f"  {name:<24}" for name in columns).rstrip()]
        known = [dict(each.rows()) for each in columns.values()]
        for name, _ in self.rows():
            told = [percent(each[name], 1) if name in each else "" for each in known]
            lines.append((f"{name:<21}" + "".join(f"  {text:<24}" for text in told)).rstrip())
        return "\n".join(lines)

    def figure(self, **others: TypographicAttack) -> Picture:
        """Bars with their 95 % intervals; beside those of other models, by what to call them."""
        from circuitvit.views import canvas

        columns = {("before" if others else self.model): self, **others}
        names = [name for name, _ in self.rows() if name != "cost of the letters"]
        with canvas.styled():
            title = f"Typographic attack ({counted(len(self.images), 'image')})"
            figure = canvas.blank(2.0 + 0.62 * len(names) * max(1.4, len(columns) * 0.75), 2.7, title)
            (axis,) = canvas.panels(figure, 1, 1)
            wide = 0.8 / len(columns)
            for place, (column, found) in enumerate(columns.items()):
                known = dict(found.rows())
                for at, name in enumerate(names):
                    if name in known:
                        here = at + (place - (len(columns) - 1) / 2) * wide
                        label = column if at == 0 else None
                        bar(axis, here, known[name], wide * 0.92, canvas.PALETTE[place], label)
            axis.set_xticks(range(len(names)), [name.replace(" ", "\n", 1) for name in names])
            axis.set(ylim=(0, 1.02), ylabel="share of images")
            if len(columns) > 1:
                figure.legend(frameon=False, fontsize=7, loc="outside right upper")
        return figure

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name} {estimate.value:.0%}" for name, estimate in self.rows()[: len(self.versions) + 1]
        )
        return f"TypographicAttack({self.model}, {counted(len(self.images), 'image')}: {shown})"

    def _place(self, version: str) -> int:
        if version not in self.versions:
            raise OptionError(
                f"there is no version {version!r}, only {', '.join(self.versions)}: the neutral word is that "
                "of paste(..., neutral=)"
            )
        return self.versions.index(version)


@running
def typographic_attack(
    model: Model,
    images: WithWords,
    labels: Labels,
    *,
    named: Labels | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> TypographicAttack:
    """How many answers a pasted word turns: accuracies and attack rate, with intervals.

    Args:
        model: with classes; from `load`, `wrap`, `edit`, `with_head` or `with_prompts`.
        images: from `circuitvit.tasks.words.paste` or `given`.
        labels: what is in the pictures: a class or group for all, or `cv.PerPair([...])` for each.
        named: the class that the word says, likewise; by default the one that is called as the word is, or
            the only prompt that has the word in it.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        UnsupportedModelError: if the model has no classes.
        NameNotFoundError: for an unknown class, and a word that names none.
        DataError: if a word says what is in the picture, or labels are for another number of images.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> signs = cv.tasks.words.paste(
        ...     model, catdog_pairs(8, seed=0).clean, "rabbit", neutral="sign", size=0.2
        ... )
        >>> found = typographic_attack(model, signs, cv.group("animal", ["cat", "dog"]), progress=False)
        >>> found.attack_rate().value  # it cannot read
        0.0
    """
    check_classes(model)
    right, says = classes_of(model, images, labels, named)
    answers = np.stack(
        [answered(model, images, version, batch_size, progress) for version in images.versions]
    )
    return TypographicAttack(
        model=model.name,
        images=images.names,
        words=tuple(map(called, images.words)),
        labels=tuple(spec_label(model, list(own)) for own in right),
        named=tuple(spec_label(model, list(own)) for own in says),
        versions=images.versions,
        answers=answers,
        right=among(answers, right),
        read=among(answers, says),
        caveats=(*images.caveats, *few_images(len(images))),
    )


# -- also for defences ---------------------------------------------------------------------------


def check_classes(model: Model) -> None:
    """Refuse a model that gives no answers.

    Raises:
        UnsupportedModelError: saying how it gets classes.
    """
    if not model.chooses:
        raise UnsupportedModelError(
            f"{model.name} has no classes, so a word cannot turn its answer: give it some, with "
            "model.with_prompts([...]) or cv.with_head(...)"
        )


def answered(
    model: Model, images: WithWords, version: Version, batch_size: int | None, progress: bool
) -> Int64[NDArray[np.int64], " image"]:
    """The top class of each image in one version."""
    model.refresh()
    given, found = images.images(version), []
    with torch.no_grad():
        for batch in watched_batches(model, given, batch_size, f"answers, {version}", progress):
            found.append(model(batch).argmax(dim=-1).cpu().numpy())
    return np.concatenate(found).astype(np.int64)


def among(
    answers: Int64[NDArray[np.int64], "*version image"], classes: Members
) -> Bool[NDArray[np.bool_], "*version image"]:
    """Whether each answer is one of its image's classes."""
    return np.stack([np.isin(answers[..., row], own) for row, own in enumerate(classes)], axis=-1)


Members = list[tuple[int, ...]]
"""Classes for each image, as indices."""


def classes_of(
    model: Model, images: WithWords, labels: Labels, named: Labels | None
) -> tuple[Members, Members]:
    """The classes that are right for each image, and those that the word on it says.

    Raises:
        NameNotFoundError, OptionError: as `class_indices`; and naming a word that is no class.
        DataError: if there are labels for another number of images, or a word says what is there.
    """
    right, says = _members(model, labels, len(images), "labels"), _said_by(model, images, named)
    for name, own, other in zip(images.names, right, says, strict=True):
        if set(own) & set(other):
            raise DataError(
                f"the word on {name} says what is there ({classes_label(model, own)}): an attack is a word "
                "that says something else"
            )
    return right, says


def _members(model: Model, labels: Labels, count: int, what: str) -> Members:
    if not isinstance(labels, PerPair):
        return [class_indices(model, labels)] * count
    if len(labels.classes) != count:
        raise DataError(f"{len(labels.classes)} {what} for {counted(count, 'image')}: give one for each")
    return [class_indices(model, each) for each in labels.classes]


def _said_by(model: Model, images: WithWords, named: Labels | None) -> Members:
    if named is not None:
        return _members(model, named, len(images), "named classes")
    words = [called(word) for word in images.words]
    known = {word: _meant(model, word) for word in dict.fromkeys(words)}
    return [known[word] for word in words]


def _meant(model: Model, word: str) -> tuple[int, ...]:
    try:
        return class_indices(model, word)
    except NameNotFoundError as error:
        has_it = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
        found = [index for index, name in enumerate(model.classes or ()) if has_it.search(name)]
        if len(found) == 1:
            return (found[0],)
        raise NameNotFoundError(
            f"the word {word!r} names no class of {model.name} ({error}): say which with named="
        ) from error


def bar(axis: Any, at: float, estimate: Estimate, wide: float, colour: str, label: str | None) -> None:
    """A bar with its interval."""
    axis.bar(at, estimate.value, wide, color=colour, label=label)
    if estimate.low is not None and estimate.high is not None:
        axis.plot([at, at], [estimate.low, estimate.high], color=INK, linewidth=0.9)
