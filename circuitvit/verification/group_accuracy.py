"""How often a model is right, group by group, as it is and with edges ablated; and on the worst group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool

from circuitvit.engine import Evaluator
from circuitvit.errors import DataError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.tasks import Mean, PerPair, PreparedTask, Task
from circuitvit.tasks.classes import ClassSpec, class_indices
from circuitvit.tasks.grouped import Grouped, GroupedSpec, grouped_images
from circuitvit.tasks.inputs import fingerprint
from circuitvit.tasks.metrics import accuracy
from circuitvit.tasks.split import SomeImages
from circuitvit.verification.statistics import Bootstrap, Estimate, changed_share, share_interval

Hits = Bool[np.ndarray, " image"]


@dataclass(frozen=True)
class GroupAccuracy:
    """How often a model is right on some images, as it is and with edges ablated.

    Attributes:
        name: of the images: their group, and their class where a group has several.
        n: how many.
        before: the share that is right, with its exact interval.
        after: the same without the edges; None where nothing was ablated.
        change: the latter less the former, image by image.
    """

    name: str
    n: int
    before: Estimate
    after: Estimate | None = None
    change: Estimate | None = None


def worst(rows: Sequence[tuple[str, int, Estimate]]) -> tuple[str, Estimate]:
    """Of groups by name, number of images and accuracy the worst, and what the lowest accuracy of all may be.

    The interval is of the lowest accuracy, whichever group has it: from the lowest lower end to the lowest
    upper end of exact intervals that hold for all groups at once (Bonferroni). That of the one that came out
    lowest by itself would lie too low, as it was chosen for that.

    Example:
        >>> name, found = worst([("grass", 50, Estimate(0.9)), ("snow", 50, Estimate(0.5))])
        >>> print(name, found)
        snow 0.500 (0.337 to 0.663)
    """
    settings = Bootstrap(level=1 - 0.05 / len(rows))
    found = [share_interval(np.arange(n) < round(each.value * n), settings) for _, n, each in rows]
    name, lowest = min(zip((row[0] for row in rows), found, strict=True), key=lambda each: each[1].value)
    lows, highs = (
        [end for each in found if (end := getattr(each, side)) is not None] for side in ("low", "high")
    )
    sure = len(lows) == len(found)
    return name, Estimate(lowest.value, min(lows) if sure else None, min(highs) if sure else None)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Labelled images by group, checked and with their classes found.

    Attributes:
        model: that is to be right.
        given: the images.
        names: what the group of each image is called.
        classes: the classes that are right for each, as indices.
    """

    model: Model
    given: Grouped
    names: tuple[str, ...]
    classes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, model: Model, groups: GroupedSpec, labels: Mapping[str, ClassSpec], *, by_class: bool = True
    ) -> Labelled:
        """Read labelled images, and refuse what cannot be used.

        Args:
            model: whose classes the labels are.
            groups: see `grouped_images`.
            labels: what a label is called in the model, where that is something else.
            by_class: whether the classes of a group are counted apart.

        Raises:
            NameNotFoundError: for a label that is no class of the model.
            DataError: if images cannot be used.
        """
        given = grouped_images(groups, model.preprocessing)
        known = {
            label: class_indices(model, labels.get(label, label)) for label in dict.fromkeys(given.labels)
        }
        several = {group for group, _ in given.cells if sum(group == other for other, _ in given.cells) > 1}
        names = (
            f"{group}, {label}" if by_class and group in several else group
            for group, label in zip(given.groups, given.labels, strict=True)
        )
        given.images.check(False)
        return cls(model, given, tuple(names), tuple(known[label] for label in given.labels))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def fingerprints(self) -> list[bytes]:
        """Of each image."""
        images = self.given.images
        return [fingerprint(images.take(row, row + 1)) for row in range(len(self))]

    def without(self, known: Collection[bytes]) -> Labelled:
        """Those that are not among images known by their fingerprints.

        Raises:
            DataError: if none is left of a group.
        """
        images = self.given.images
        rows = [row for row, own in enumerate(self.fingerprints) if own not in known]
        if len(rows) == len(self):
            return self
        names = tuple(self.names[row] for row in rows)
        if gone := sorted({*self.names} - {*names}):
            raise DataError(
                f"all images of the group {gone[0]!r} are among those that circuits were found on: give "
                "others"
            )
        given = replace(
            self.given,
            images=SomeImages(images, tuple(rows)),
            groups=tuple(self.given.groups[row] for row in rows),
            labels=tuple(self.given.labels[row] for row in rows),
        )
        return Labelled(self.model, given, names, tuple(self.classes[row] for row in rows))

    def accuracies(
        self, ablated: Circuit | None, reference: Mean, *, batch_size: int | None, memory: int | str | None
    ) -> tuple[GroupAccuracy, ...]:
        """How often the model is right on each group, and without some edges.

        Args:
            ablated: edges of the model's own graph, or None.
            reference: what they get.
            batch_size: images at once.
            memory: bytes that a batch may take.
        """
        task = Task(self.given.images, metric=accuracy(PerPair(self.classes)), ablation=reference)
        evaluator = Evaluator(task.prepare(self.model), batch_size=batch_size, memory=memory)
        before = evaluator.whole > 0.5
        after = None if ablated is None else evaluator.values(~ablated) > 0.5
        names = np.array(self.names)
        return tuple(
            _accuracy(name, before[names == name], None if after is None else after[names == name])
            for name in dict.fromkeys(self.names)
        )


def fingerprints(*tasks: PreparedTask) -> set[bytes]:
    """Of all images of some tasks."""
    sides = [side for task in tasks for side in (task.clean, task.corrupt) if side is not None]
    return {fingerprint(side.take(row, row + 1)) for side in sides for row in range(len(side))}


def _accuracy(name: str, before: Hits, after: Hits | None) -> GroupAccuracy:
    if after is None:
        return GroupAccuracy(name, len(before), share_interval(before))
    change = changed_share(before, after)
    return GroupAccuracy(name, len(before), share_interval(before), share_interval(after), change)
