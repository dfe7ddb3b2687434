"""Metrics: one number for each image, computed from its logits.

A metric is written down without a model (`logit_diff("tabby", "Border collie")`) and bound to one when the
task is: class names become indices then. Where a metric takes a class it also takes a set of classes, such
as `group("cat")`, for which the logit is the log of the summed exponentials; so a difference of sets is a
log-odds.
Outputs that are features and no classes are compared with a vector: `similarity`, `projection`.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.models import Model
from circuitvit.tasks.ablations import same_ablation
from circuitvit.tasks.classes import ClassSpec as ClassSpec
from circuitvit.tasks.classes import class_indices, classes_label, spec_label
from circuitvit.tasks.images import ImageSpec
from circuitvit.tasks.vectors import VectorSpec, checked_vector, is_vector, read_vector


@dataclass(frozen=True)
class PerPair:
    """A class (or set of classes) of its own for each pair of a task, in the order of the pairs."""

    classes: tuple[ClassSpec, ...]


@dataclass(frozen=True)
class Inputs:
    """What a metric's formula is given besides the logits.

    Attributes:
        clean_logits: of the clean run, `(batch, class)`.
        target: which classes are the target, `(batch, class)` or None.
        foil: which classes are the foil, `(batch, class)` or None.
        vector: what the outputs are compared with, `(class,)` in float64, or None.
    """

    clean_logits: Float[Tensor, "batch class"]
    target: Bool[Tensor, "batch class"] | None
    foil: Bool[Tensor, "batch class"] | None
    vector: Float[Tensor, " class"] | None = None


Formula = Callable[[Tensor, Inputs], Tensor]


@dataclass(frozen=True)
class Metric:
    """A metric without a model: a formula and the classes it speaks of.

    Attributes:
        name: as users and files call it.
        formula: logits `(..., batch, class)` and inputs to one number for each image `(..., batch)`.
        target: the class the metric is about; None for the clean run's own top class.
        foil: the class it is compared with; None for the corrupt run's own top class.
        uses_target: whether the formula looks at the target.
        uses_foil: whether it looks at the foil.
        differentiable: whether gradient methods can use it.
        of_classes: whether the outputs must be logits of classes; functions of the user's own take any.
        to: what the outputs are compared with: a vector, or an image whose own output is; None for nothing.
        flat_at_clean: whether the clean run itself is its minimum or maximum, where it has no gradient.
    """

    name: str
    formula: Formula
    target: ClassSpec | PerPair | None = None
    foil: ClassSpec | PerPair | None = None
    uses_target: bool = False
    uses_foil: bool = False
    differentiable: bool = True
    of_classes: bool = True
    to: VectorSpec | ImageSpec | None = None
    flat_at_clean: bool = False


SWAPPED = "the answer is the foil on all of them: exchange target and foil, or clean and corrupt"


@dataclass(frozen=True, eq=False)
class BoundMetric:
    """A metric for the pairs of one task on one model; call it with logits.

    Attributes:
        metric: what was bound.
        label: one line, with class names.
        target: classes of each pair, `(pair, class)` or None.
        foil: the same.
        vector: what the outputs of all pairs are compared with, `(class,)` in float64 on the CPU, or None.
        flat_at_clean: whether the clean runs themselves are its minimum or maximum.
    """

    metric: Metric
    label: str
    target: Bool[Tensor, "pair class"] | None
    foil: Bool[Tensor, "pair class"] | None
    vector: Float[Tensor, " class"] | None = None
    flat_at_clean: bool = False

    def swapped(self, clean: ArrayLike, corrupt: ArrayLike) -> str:
        """What to do if target and foil, or clean and corrupt, were mixed up on every pair; "" if not.

        Args:
            clean: the metric on the clean images, `(pair,)`.
            corrupt: on the corrupt ones.
        """
        mixed_up = np.all(np.asarray(clean) < 0) and np.all(np.asarray(corrupt) > 0)
        return SWAPPED if self.metric.uses_foil and mixed_up else ""

    def __call__(
        self,
        logits: Float[Tensor, "*candidates batch class"],
        clean_logits: Float[Tensor, "batch class"],
        rows: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "*candidates batch"]:
        """One number for each image, computed in float32 at least.

        Args:
            logits: to judge; leading dimensions are candidates for the same images.
            clean_logits: of the clean run on the same images.
            rows: which pairs of the task the images belong to.

        Raises:
            DataError: if the formula gives anything but one finite number for each image.
        """
        target = None if self.target is None else self.target[rows].to(logits.device, non_blocking=True)
        foil = None if self.foil is None else self.foil[rows].to(logits.device, non_blocking=True)
        inputs = Inputs(_wide(clean_logits), target, foil, self.vector)
        values = self.metric.formula(_wide(logits), inputs)
        if values.shape != logits.shape[:-1]:
            raise DataError(
                f"metric {self.metric.name!r} gave shape {tuple(values.shape)} for logits "
                f"{tuple(logits.shape)}: it must give one number for each image"
            )
        # Formulas of classes are finite where logits are, and a look at the values would stop a GPU's queue.
        # Logits that are no numbers are the model's fault, and are refused as such where it was run.
        if not self.metric.of_classes and not values.isfinite().all() and logits.isfinite().all():
            broken = ~values.isfinite().flatten(0, -2).all(dim=0) if values.ndim > 1 else ~values.isfinite()
            image = int(rows[broken.cpu()][0])
            raise DataError(
                f"the metric {self.label} is NaN or infinite for image {image}: check its formula"
            )
        return values


def divergence(
    full_logits: Float[Tensor, "*#candidates batch class"],
    other_logits: Float[Tensor, "*#candidates batch class"],
) -> Float[Tensor, "*candidates batch"]:
    """KL(full || other) of each image in nats, summed over classes: how far a prediction has moved.

    Rounding may leave 1e-8 below 0. It means nothing where the logits are no classes, as in an embedding.

    Example:
        >>> even, sure = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 50.0]])
        >>> divergence(even, even).tolist(), divergence(sure, even).tolist()  # ln 2 at most, here
        ([0.0], [0.6931471824645996])
    """
    full = F.log_softmax(full_logits, dim=-1)
    return (full.exp() * (full - F.log_softmax(other_logits, dim=-1))).sum(dim=-1)


# -- the metrics ---------------------------------------------------------------------------------


def logit_diff(target: ClassSpec | PerPair | None = None, foil: ClassSpec | PerPair | None = None) -> Metric:
    """The target's logit minus the foil's: the log-odds between the two.

    Of sets and groups of classes it is the log-odds of "one of the target's" against "one of the foil's", as
    their logit is the log of the summed exponentials. A group of many classes so starts ahead of one of few:
    what counts is how the difference changes.

    Left out, the target is the class that the model gives the clean image, the foil that of the corrupt one.

    Example:
        >>> logit_diff("tabby", "Border collie").name
        'logit_diff'
    """
    return Metric("logit_diff", _logit_diff, target, foil, uses_target=True, uses_foil=True)


def logit(target: ClassSpec | PerPair | None = None) -> Metric:
    """The target's logit; by default that of the clean image's top class."""
    return Metric("logit", _logit, target, uses_target=True)


def log_probability(target: ClassSpec | PerPair | None = None) -> Metric:
    """The log of the target's probability, in nats."""
    return Metric("log_probability", _log_probability, target, uses_target=True)


def probability(target: ClassSpec | PerPair | None = None) -> Metric:
    """The target's probability, 0 to 1. It saturates: prefer `logit_diff` for attribution."""
    return Metric("probability", _probability, target, uses_target=True)


def kl_divergence() -> Metric:
    """KL(clean || current) in nats: how far the whole prediction has moved; never negative.

    Its gradient vanishes at the clean run, so gradient methods that start there score everything 0.
    """
    return Metric("kl_divergence", _kl_divergence, flat_at_clean=True)


def cross_entropy() -> Metric:
    """Cross-entropy of the current prediction under the clean one, in nats: the KL plus a constant."""
    return Metric("cross_entropy", _cross_entropy, flat_at_clean=True)


def accuracy(target: ClassSpec | PerPair | None = None) -> Metric:
    """1 where the top class is (one of) the target, else 0; it has no gradient."""
    return Metric("accuracy", _accuracy, target, uses_target=True, differentiable=False)


def similarity(to: VectorSpec | ImageSpec | None = None) -> Metric:
    """The cosine between the model's output and something fixed, -1 to 1: for features, which are no classes.

    Args:
        to: a vector, as numbers or as a file (`.npy`, `.safetensors` with one tensor); or an image, as a file
            or preprocessed, whose own output is the vector. Left out, it is each clean image's own output,
            so that the metric says how far the representation has moved.

    Example:
        >>> similarity(to="cat.png").name
        'similarity'
    """
    return Metric("similarity", _similarity, of_classes=False, to=to, flat_at_clean=to is None)


def projection(direction: VectorSpec | None = None) -> Metric:
    """The inner product of the model's output with a direction; in the output's units if that has length 1.

    Args:
        direction: a vector, as numbers or as a file (`.npy`, `.safetensors` with one tensor), such as the
            difference between the mean features of two kinds of images.

    Example:
        >>> projection([1.0, 0.0, -1.0]).name
        'projection'
    """
    return Metric("projection", _projection, of_classes=False, to=direction)


_BY_NAME: dict[str, Callable[..., Metric]] = {
    "logit_diff": logit_diff,
    "logit": logit,
    "log_probability": log_probability,
    "probability": probability,
    "kl_divergence": kl_divergence,
    "cross_entropy": cross_entropy,
    "accuracy": accuracy,
    "similarity": similarity,
    "projection": projection,
}

COMPARING = ("similarity", "projection")
"""Metrics that compare the outputs with a vector or an image."""


def metric_names() -> tuple[str, ...]:
    """Names of the metrics that can be asked for by name."""
    return tuple(_BY_NAME)


def as_metric(
    spec: Metric | str | Callable[[Tensor], Tensor],
    target: ClassSpec | PerPair | None = None,
    foil: ClassSpec | PerPair | None = None,
    to: VectorSpec | ImageSpec | None = None,
) -> Metric:
    """A metric from a metric, a name, or any function of logits `(batch, class)` to `(batch,)`.

    Args:
        spec: what was given; classes that it leaves open are filled in from `target` and `foil`.
        target: class or classes, such as a CSV's column.
        foil: the same.
        to: for a name: what the outputs are compared with, in similarity and projection.

    Raises:
        NameNotFoundError: for an unknown name.
        OptionError: if `spec` is none of these, or a metric of this name compares with nothing.
    """
    if isinstance(spec, str):
        if spec not in _BY_NAME:
            raise unknown_name("metric", spec, _BY_NAME)
        if to is not None and spec not in COMPARING:
            raise OptionError(f"the metric {spec} compares with nothing: leave out what to compare with")
        spec = _BY_NAME[spec]() if to is None else _BY_NAME[spec](to)
    if not isinstance(spec, Metric):
        return _custom(spec)
    if spec.target is None and spec.uses_target:
        spec = replace(spec, target=target)
    return replace(spec, foil=foil) if spec.foil is None and spec.uses_foil else spec


def bind(
    metric: Metric,
    model: Model,
    n_pairs: int,
    n_classes: int,
    top_clean: Callable[[], Tensor],
    top_corrupt: Callable[[], Tensor],
    output_of: Callable[[ImageSpec], tuple[Tensor, bool]],
) -> BoundMetric:
    """Turn class names into indices for the pairs of one task, if the model has classes at all.

    Args:
        metric: to bind.
        model: whose class names count.
        n_pairs: number of pairs.
        n_classes: number of logits.
        top_clean: gives the model's top class of each clean image `(pair,)`; called only where needed.
        top_corrupt: the same for the corrupt images.
        output_of: gives the model's output for an image, `(class,)`, and whether all clean images are that
            image.

    Raises:
        NameNotFoundError: for an unknown class; the message suggests the nearest.
        OptionError: for an index out of range, a `PerPair` of another length, or a metric of classes for a
            model whose outputs are none.
        DataError: if target and foil are the same class, or a vector does not fit the outputs.
    """
    if metric.of_classes and not model.has_classes:
        raise OptionError(
            f"{model.name} has no classes: its {n_classes} outputs are features, which the metric "
            f"{metric.name} cannot take for logits. Compare the features with a vector or an image, "
            "metric=cv.similarity(to=...) or cv.projection(direction); or "
            "put a classifier on them, cv.fit_head or cv.with_head; or, if they are classes, "
            "name them when loading, classes=[...]"
        )
    target = _resolved(metric.target, top_clean, model, n_pairs) if metric.uses_target else None
    foil = _resolved(metric.foil, top_corrupt, model, n_pairs) if metric.uses_foil else None
    if target is not None and foil is not None:
        for row, (wanted, other) in enumerate(zip(target, foil, strict=True)):
            shared = sorted(set(wanted) & set(other))
            if shared:
                what = "are the same class" if len(wanted) == len(other) == 1 else "share classes"
                raise DataError(
                    f"pair {row}: target and foil {what} ({classes_label(model, shared)}); "
                    "name them, or choose images that the model tells apart"
                )
    vector, own = _vector(metric, n_classes, output_of)
    label = metric.name
    if target is not None:
        sides = ((metric.target, target), (metric.foil, foil))
        label += f"({', '.join(_names(model, spec, side) for spec, side in sides if side is not None)})"
    elif vector is not None:
        label += f"({_named_vector(metric.to, vector)})"
    flat = metric.flat_at_clean or own
    if isinstance(metric.formula, partial):  # the user's own
        metric = replace(metric, differentiable=_has_gradient(metric.formula, model, n_classes))
    return BoundMetric(metric, label, _mask(target, n_classes), _mask(foil, n_classes), vector, flat)


def same_metric(one: BoundMetric, other: BoundMetric) -> bool:
    """Whether two metrics are known to measure the same.

    That is by one formula, of classes that are said alike or are the same; those of each pair's own are taken
    for the same.
    """
    mine, theirs = one.metric, other.metric
    formulas = [getattr(each.formula, "args", each.formula) for each in (mine, theirs)]  # the user's own
    said = [
        [PerPair if isinstance(side, PerPair) else side for side in (each.target, each.foil)]
        for each in (mine, theirs)
    ]
    alike = said[0] == said[1] or one.label == other.label
    return formulas[0] == formulas[1] and alike and same_ablation(mine.to, theirs.to)


# -- inside --------------------------------------------------------------------------------------


def _custom(function: object) -> Metric:
    if not callable(function):
        raise OptionError(
            f"a metric is one of {', '.join(_BY_NAME)} or a function of logits, not {function!r}"
        )
    try:
        inspect.signature(function).bind(None)
    except (TypeError, ValueError) as error:
        raise OptionError(f"a metric function takes the logits (batch, class) alone: {error}") from error
    return Metric(getattr(function, "__name__", "custom"), partial(_by, function), of_classes=False)


# Formulas are functions of this file, as a task can only be pickled with those that have a place.


def _has_gradient(formula: Formula, model: Model, n_classes: int) -> bool:
    """Whether a gradient goes through a function of the user's own; what it cannot do with random logits is
    told when it is run."""
    generator = torch.Generator().manual_seed(0)
    logits = _wide(torch.randn(2, n_classes, generator=generator).to(model.device, model.dtype))
    try:
        with torch.enable_grad():
            return formula(logits.requires_grad_(), Inputs(logits, None, None)).requires_grad
    except Exception:  # such as one for so many images
        return True


def _by(function: Callable[[Tensor], Any], logits: Tensor, inputs: Inputs) -> Tensor:
    """A function of the user's own, given the logits `(batch, class)` alone."""
    values = function(logits.flatten(0, -2))
    if not isinstance(values, Tensor) or values.shape != (logits.shape[:-1].numel(),):
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise DataError(f"the metric function gave {shape}; it must give one number for each image, (batch,)")
    return values.reshape(logits.shape[:-1])


def _logit_diff(logits: Tensor, inputs: Inputs) -> Tensor:
    return _evidence(logits, inputs.target) - _evidence(logits, inputs.foil)


def _logit(logits: Tensor, inputs: Inputs) -> Tensor:
    return _evidence(logits, inputs.target)


def _probability(logits: Tensor, inputs: Inputs) -> Tensor:
    return _log_probability(logits, inputs).exp()


def _kl_divergence(logits: Tensor, inputs: Inputs) -> Tensor:
    return divergence(inputs.clean_logits, logits)


def _cross_entropy(logits: Tensor, inputs: Inputs) -> Tensor:
    return -(F.softmax(inputs.clean_logits, dim=-1) * F.log_softmax(logits, dim=-1)).sum(dim=-1)


def _similarity(logits: Tensor, inputs: Inputs) -> Tensor:
    wide = _wide(logits)
    other = _wide(inputs.clean_logits) if inputs.vector is None else _like(inputs.vector, wide)
    unit = other / torch.linalg.vector_norm(other, dim=-1, keepdim=True)
    cosine: Tensor = (wide * unit).sum(dim=-1) / torch.linalg.vector_norm(wide, dim=-1)
    return cosine


def _projection(logits: Tensor, inputs: Inputs) -> Tensor:
    wide = _wide(logits)
    return (wide * _like(_required(inputs.vector), wide)).sum(dim=-1)


def _accuracy(logits: Tensor, inputs: Inputs) -> Tensor:
    target, top = _required(inputs.target), logits.argmax(dim=-1, keepdim=True)
    return target.expand(*logits.shape[:-1], -1).gather(-1, top).squeeze(-1).to(logits.dtype)


def _log_probability(logits: Tensor, inputs: Inputs) -> Tensor:
    return _evidence(F.log_softmax(logits, dim=-1), inputs.target)


def _evidence(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Log of the summed exponentials over the marked classes: the logit itself where one class is marked."""
    return logits.masked_fill(~_required(classes), float("-inf")).logsumexp(dim=-1)


def _required(given: Tensor | None) -> Tensor:
    assert given is not None, "the metric was bound without its classes or its vector"
    return given


def _wide(outputs: Tensor) -> Tensor:
    """At least float32: differences of logits, and cosines near 1, have few digits in half precision."""
    return outputs if outputs.dtype == torch.float64 else outputs.float()


def _like(vector: Tensor, outputs: Tensor) -> Tensor:
    return vector.to(outputs.dtype).to(outputs.device)  # in this order: some devices know no float64


def _vector(
    metric: Metric, width: int, output_of: Callable[[ImageSpec], tuple[Tensor, bool]]
) -> tuple[Tensor | None, bool]:
    """What the outputs are compared with, and whether that is what they are at all clean runs."""
    along = metric.formula is _projection  # a user's own function may be called so too
    if metric.to is None:
        if along:
            raise OptionError("the metric projection needs a direction: a vector of numbers, or its file")
        return None, False
    what = "the direction" if along else "what the outputs are compared with"
    if is_vector(metric.to):
        return read_vector(metric.to, width, what), False  # type: ignore[arg-type]
    if along:
        raise OptionError(
            "the direction of a projection is a vector, as numbers or as a file that ends in .npy or "
            ".safetensors, and not an image: similarity takes an image"
        )
    output, own = output_of(metric.to)  # type: ignore[arg-type]
    return checked_vector(output, width, f"the model's output for the image, {what},"), own


def _named_vector(source: object, vector: Tensor) -> str:
    """A vector in a label: by its file, or by the beginning of its hash."""
    if isinstance(source, (str, Path)):
        return Path(source).name
    kind = "vector" if is_vector(source) else "image"
    return f"{kind} {hashlib.sha256(vector.numpy().tobytes()).hexdigest()[:8]}"


def _resolved(
    spec: ClassSpec | PerPair | None, fallback: Callable[[], Tensor], model: Model, n_pairs: int
) -> list[tuple[int, ...]]:
    """The class indices of each pair."""
    if spec is None:
        return [(int(index),) for index in fallback()]
    if isinstance(spec, PerPair):
        if len(spec.classes) != n_pairs:
            raise OptionError(f"{len(spec.classes)} classes for {n_pairs} pairs")
        return [class_indices(model, each) for each in spec.classes]
    return [class_indices(model, spec)] * n_pairs


def _mask(indices: list[tuple[int, ...]] | None, n_classes: int) -> Tensor | None:
    if indices is None:
        return None
    mask = torch.zeros(len(indices), n_classes, dtype=torch.bool)
    for row, classes in enumerate(indices):
        mask[row, list(classes)] = True
    return mask


def _names(model: Model, spec: ClassSpec | PerPair | None, indices: list[tuple[int, ...]]) -> str:
    distinct = sorted(set(indices))
    if len(distinct) > 1:
        return f"{len(distinct)} different classes"
    spec = spec.classes[0] if isinstance(spec, PerPair) else spec
    return classes_label(model, distinct[0]) if spec is None else spec_label(model, spec)
