"""Which images of a folder are misread: what `why` can be asked about."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.errors import counted
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.tasks.classes import class_label
from circuitvit.tasks.images import FileImages
from circuitvit.tasks.labelled import LabelledSpec, Labels
from circuitvit.views.flipping import margin
from circuitvit.views.misread_runs import check_finite, masks_of
from circuitvit.views.subjects import watched_batches


@dataclass(frozen=True, eq=False, repr=False)
class Misread(Result):
    """The images that are misread, those that are farthest from right first.

    Attributes:
        model: its name.
        n_images: how many images there were.
        images: the misread ones: paths, or names where they are no files.
        labels: what each is said to be.
        answers: what the model sees.
        margins: the largest logit of the label's classes minus the largest of all others, below 0.
    """

    model: str
    n_images: int
    images: tuple[str, ...]
    labels: tuple[str, ...]
    answers: tuple[str, ...]
    margins: Float[NDArray[np.float64], " misread"]

    along = "images:misread labels:misread answers:misread"

    def records(self) -> Iterator[Record]:
        """One row for each misread `image`: its `label`, the `answer`, and the `margin`."""
        columns = self.images, self.labels, self.answers, self.margins.tolist()
        for image, label, answer, value in zip(*columns, strict=True):
            yield {"image": image, "label": label, "answer": answer, "margin": value}

    def __len__(self) -> int:
        return len(self.images)

    def __str__(self) -> str:
        each = (f"{row['image']}: {row['label']}, seen as {row['answer']}" for row in self.records())
        return "\n".join((f"{self.model} misreads {len(self)} of {counted(self.n_images, 'image')}.", *each))

    def __repr__(self) -> str:
        return f"Misread({len(self)} of {counted(self.n_images, 'image')})"


@running
@torch.no_grad()
def misread_images(
    model: Model,
    among: LabelledSpec,
    labels: Labels | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> Misread:
    """Which images are misread? Those that `why` can be asked about.

    Args:
        model: from `load`, `wrap`, `edit`, `with_head` or `with_prompts`, with classes.
        among: a folder with a subfolder for each class, or kind such as "cat", all classes of which are then
            right; a mapping from classes to images; or images with `labels`.
        labels: instead of subfolders a class, or kind, for each image.
        batch_size: images at once.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if a label, or the name of a folder, is no class and no kind.
        DataError: if images cannot be read, or nothing names their classes.
        UnsupportedModelError: if the model has no classes, takes sentences, or is edited for some images.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(8, seed=0)
        >>> misread_images(model, {"cat": pairs.clean, "dog": pairs.clean[:2]}, progress=False)
        Misread(2 of 10 images)
    """
    images, given, classes = masks_of(model, among, labels)
    names = tuple(map(str, images.paths)) if isinstance(images, FileImages) else images.names
    rows: list[tuple[float, str, str, str]] = []
    for batch in watched_batches(model, images, batch_size, "reading images", progress):
        for logits in model(batch):
            place = len(rows)
            check_finite(logits, names[place])
            own = float(margin(logits, classes[given[place]]))
            rows.append((own, names[place], given[place], class_label(model, int(logits.argmax()))))
    wrong = sorted((row for row in rows if row[0] <= 0), key=lambda row: row[0])
    return Misread(
        model=model.name,
        n_images=len(rows),
        images=tuple(name for _, name, _, _ in wrong),
        labels=tuple(label for _, _, label, _ in wrong),
        answers=tuple(answer for _, _, _, answer in wrong),
        margins=np.array([own for own, *_ in wrong], dtype=np.float64),
    )
