"""What becomes of a model's answers when it is changed: the figures that knock-outs, token ablations and
steering share.

Every change is an edited model. It is run from the first stage that differs, on the stream of the model as it
is, and only numbers for each image are kept, so that folders of any size can be asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import Capture, capture, check_logits, progress_bar
from circuitvit.errors import OptionError, counted, unknown_name
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, through
from circuitvit.tasks import Batch, Metric, PreparedTask, Task, TokenGroups, prepare
from circuitvit.tasks.metrics import divergence
from circuitvit.tasks.task import BATCH
from circuitvit.verification.statistics import Estimate, mean_interval, share_interval
from circuitvit.views.subjects import ImageSpec

Figure = Literal["metric", "kl", "flips"]
FIGURES: dict[str, str] = {
    "metric": "change of the metric, after minus before",
    "kl": "KL(before || after) in nats",
    "flips": "share of images whose top class changes",
}

Changed = Callable[[Batch], Model]
"""Gives the edited model for some of a task's images."""

MetricSpec = Metric | str | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes(Result):
    """The answers of changed models, beside those of the model as it is.

    Attributes:
        images: their names.
        metric: what is measured, in words.
        before: the metric of the model as it is, `(image,)`.
        after: that of each changed model, `(*change, image)`.
        kl: KL(before || after) in nats, `(*change, image)`; None where the outputs are no classes.
        flips: whether the top class changed, `(*change, image)`; None likewise.
    """

    images: tuple[str, ...]
    metric: str
    before: Float[NDArray[np.float64], " image"]
    after: Float[NDArray[np.float64], "*change image"]
    kl: Float[NDArray[np.float64], "*change image"] | None
    flips: Bool[NDArray[np.bool_], "*change image"] | None

    along = "images:image"

    def records(self) -> Iterator[Record]:
        """One row for each `change` (its number) and `image`: the `metric` before and after, `kl` in nats
        and whether the top class `flips`, which are None where the outputs are no classes."""
        changes = int(np.prod(self.after.shape[:-1]))
        return self.columns({"change": range(changes)}, (changes,))

    def columns(self, axes: Mapping[str, Sequence[Any]], shape: tuple[int, ...]) -> Iterator[Record]:
        """The same, the changes named along some axes."""
        own = self.reshaped(*shape)
        before = np.broadcast_to(self.before, own.after.shape)
        figures = {"before": before, "after": own.after, "kl": own.kl, "flips": own.flips}
        return cells({**axes, "image": self.images}, **figures)

    def check_changes(self, *shape: int) -> None:
        """Refuse other numbers of changes.

        Raises:
            OptionError: saying how many there are.
        """
        if self.after.shape[:-1] != shape:
            raise OptionError(f"outcomes of {self.after.shape[:-1]} changes, where there should be {shape}")

    def __repr__(self) -> str:
        changes = counted(int(np.prod(self.after.shape[:-1])), "change")
        return f"Outcomes({changes}, {counted(len(self.images), 'image')}; {self.metric})"

    def values(self, of: Figure = "metric") -> Float[NDArray[np.float64], "*change image"]:
        """One number for each change and image: "metric" (after minus before), "kl" or "flips" (0 or 1).

        Raises:
            NameNotFoundError: for another figure.
            OptionError: if the outputs are no classes, and so have neither KL nor top class.
        """
        if of not in FIGURES:
            raise unknown_name("figure", of, FIGURES)
        found = self.after - self.before if of == "metric" else self.kl if of == "kl" else self.flips
        if found is None:
            raise OptionError(f"the outputs are no classes, so there is no {of!r}: ask for 'metric'")
        return np.asarray(found, dtype=np.float64)

    def estimate(self, change: int | tuple[int, ...], of: Figure = "metric") -> Estimate:
        """The mean over images of one change, with its bootstrap interval; of flips the exact one."""
        values = self.values(of)[change]
        return share_interval(values > 0) if of == "flips" else mean_interval(values)

    def is_sure(self, change: int | tuple[int, ...], of: Figure = "metric") -> bool:
        """Whether the interval leaves out 0."""
        found = self.estimate(change, of)
        return found.low is not None and found.high is not None and (found.low > 0 or found.high < 0)

    def reshaped(self, *shape: int) -> Outcomes:
        """The same with the changes in a table."""
        return self._with(lambda values: values.reshape(*shape, len(self.images)))

    def at(self, change: int | slice) -> Outcomes:
        """The same of some of the changes."""
        return self._with(lambda values: values[change])

    def _with(self, made: Callable[[NDArray[Any]], NDArray[Any]]) -> Outcomes:
        kl, flips = (None if each is None else made(each) for each in (self.kl, self.flips))
        return replace(self, after=made(self.after), kl=kl, flips=flips)


def question(
    model: Model,
    images: ImageSpec | Task,
    metric: MetricSpec | None = None,
    groups: TokenGroups | str | None = None,
) -> PreparedTask:
    """Images, checked, with what is measured of them.

    Args:
        model: to be changed.
        images: a task, whose clean images are run; or images.
        metric: for images: a metric or its name; the logit of the class that the model itself predicts by
            default.
        groups: of tokens; those of the task by default.

    Raises:
        OptionError: if the task has a metric, or groups, of its own and others are given; if it is one of
            denoising; or if a metric of classes is asked of a model without classes.
        DataError: if images cannot be read or do not fit the model.
    """
    if not isinstance(images, Task):
        task = Task(images, metric=metric or "logit", ablation="zero", groups=groups)
        return prepare(model, task)
    if metric is not None:
        raise OptionError("the task says what is measured: leave out metric=, or change it in the task")
    if groups is not None and images.groups is not None:
        raise OptionError("the task has token groups: leave out groups=, or change them in the task")
    if images.direction != "noising":
        raise OptionError("what a change does is measured on clean images: give a task of noising")
    return prepare(model, images if groups is None else images.with_options(groups=groups))


def always(model: Model) -> Changed:
    """A change that is the same for all images."""
    return partial(_same, model)


def _same(model: Model, batch: Batch) -> Model:
    return model


def outcomes(
    prepared: PreparedTask, changes: Sequence[Changed], what: str, batch_size: int | None, progress: bool
) -> Outcomes:
    """Run every change on every image.

    Args:
        prepared: whose clean images are run.
        changes: in order.
        what: they are, for the progress bar.
        batch_size: images that run at once.
        progress: whether a bar is shown.

    Raises:
        ModelError: if a changed model gives NaN or infinite logits.
    """
    model, size = prepared.model, BATCH if batch_size is None else batch_size
    size = model.batch_of(len(prepared), size)
    before: list[Tensor] = []
    rows: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in changes]
    with torch.no_grad(), progress_bar(len(prepared) * len(changes), what, progress) as bar:
        for batch in prepared.batches(size):
            base = capture(model, batch.base)
            check_logits(base.logits, batch)
            before.append(prepared.metric(base.logits, base.logits, batch.rows))
            for found, change in zip(rows, changes, strict=True):
                logits = rerun(model, change(batch), base, batch.base)
                check_logits(logits, batch)
                moved = divergence(base.logits.double(), logits.double())
                flipped = logits.argmax(dim=-1) != base.logits.argmax(dim=-1)
                found.append((prepared.metric(logits, base.logits, batch.rows), moved, flipped))
                bar.update(len(batch.base))
    after, kl, flips = (
        np.stack([torch.cat([each[part] for each in found]).cpu().numpy() for found in rows])
        for part in range(3)
    )
    known = model.chooses
    return Outcomes(
        prepared.clean.names,
        prepared.metric.label,
        torch.cat(before).double().cpu().numpy(),
        after.astype(np.float64),
        kl.clip(min=0) if known else None,
        flips if known else None,
    )


def rerun(
    model: Model, changed: Model, base: Capture, images: Float[Tensor, "image *shape"]
) -> Float[Tensor, "image class"]:
    """The logits of a changed model, run from the first stage in which it differs on the stream of the model
    as it is, of which `base` is the run on these images."""
    pairs = enumerate(zip(model.stages, changed.stages, strict=False))
    first = next((place for place, (own, other) in pairs if own is not other), None)
    if first is None:
        return base.logits
    if first == 0:
        return through(changed.essential[1:], changed.embed(images))
    return through(changed.essential[first:], base.stream(first))


def told(estimate: Estimate, of: Figure) -> str:
    """An estimate for a table: shares in per cent, all else with three decimals."""
    if of != "flips":
        return str(estimate)
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:.1%}"
    return f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def few_images(count: int) -> tuple[str, ...]:
    """A caveat where intervals are wide or missing."""
    return (f"{counted(count, 'image')} only: intervals are wide, or missing below 5",) if count < 20 else ()
