"""Metrics: one number for each image, computed from its logits.

A metric is written down without a model (`logit_diff("tabby", "Border collie")`) and bound to one when the
task is: class names become indices then. Where a metric takes a class it also takes a set of classes, such
as all cats, for which the logit is the log of the summed exponentials; so a difference of sets is a log-odds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.models import Model
from circuitvit.tasks.classes import ClassSpec as ClassSpec
from circuitvit.tasks.classes import class_indices, class_label, classes_label


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
    """

    clean_logits: Float[Tensor, "batch class"]
    target: Bool[Tensor, "batch class"] | None
    foil: Bool[Tensor, "batch class"] | None


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
    """

    name: str
    formula: Formula
    target: ClassSpec | PerPair | None = None
    foil: ClassSpec | PerPair | None = None
    uses_target: bool = False
    uses_foil: bool = False
    differentiable: bool = True
    of_classes: bool = True


@dataclass(frozen=True, eq=False)
class BoundMetric:
    """A metric for the pairs of one task on one model; call it with logits.

    Attributes:
        metric: what was bound.
        label: one line, with class names.
        target: classes of each pair, `(pair, class)` or None.
        foil: the same.
    """

    metric: Metric
    label: str
    target: Bool[Tensor, "pair class"] | None
    foil: Bool[Tensor, "pair class"] | None

    def __call__(
        self,
        logits: Float[Tensor, "*candidates batch class"],
        clean_logits: Float[Tensor, "batch class"],
        rows: Int64[Tensor, " batch"],
    ) -> Float[Tensor, "*candidates batch"]:
        """One number for each image.

        Args:
            logits: to judge; leading dimensions are candidates for the same images.
            clean_logits: of the clean run on the same images.
            rows: which pairs of the task the images belong to.

        Raises:
            DataError: if the formula gives anything but one finite number for each image.
        """
        target = None if self.target is None else self.target[rows].to(logits.device)
        foil = None if self.foil is None else self.foil[rows].to(logits.device)
        values = self.metric.formula(logits, Inputs(clean_logits, target, foil))
        if values.shape != logits.shape[:-1]:
            raise DataError(
                f"metric {self.metric.name!r} gave shape {tuple(values.shape)} for logits "
                f"{tuple(logits.shape)}: it must give one number for each image"
            )
        # logits that are no numbers are the model's fault, and are refused as such where it was run
        if not values.isfinite().all() and logits.isfinite().all():
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
    return Metric("kl_divergence", _kl_divergence)


def cross_entropy() -> Metric:
    """Cross-entropy of the current prediction under the clean one, in nats: the KL plus a constant."""
    return Metric("cross_entropy", _cross_entropy)


def accuracy(target: ClassSpec | PerPair | None = None) -> Metric:
    """1 where the top class is (one of) the target, else 0; it has no gradient."""
    return Metric("accuracy", _accuracy, target, uses_target=True, differentiable=False)


_BY_NAME: dict[str, Callable[..., Metric]] = {
    "logit_diff": logit_diff,
    "logit": logit,
    "log_probability": log_probability,
    "probability": probability,
    "kl_divergence": kl_divergence,
    "cross_entropy": cross_entropy,
    "accuracy": accuracy,
}


def metric_names() -> tuple[str, ...]:
    """Names of the metrics that can be asked for by name."""
    return tuple(_BY_NAME)


def as_metric(
    spec: Metric | str | Callable[[Tensor], Tensor],
    target: ClassSpec | PerPair | None = None,
    foil: ClassSpec | PerPair | None = None,
) -> Metric:
    """A metric from a metric, a name, or any function of logits `(batch, class)` to `(batch,)`.

    Args:
        spec: what was given; classes that it leaves open are filled in from `target` and `foil`.
        target: class or classes, such as a CSV's column.
        foil: the same.

    Raises:
        NameNotFoundError: for an unknown name.
        OptionError: if `spec` is none of these.
    """
    if isinstance(spec, str):
        if spec not in _BY_NAME:
            raise unknown_name("metric", spec, _BY_NAME)
        spec = _BY_NAME[spec]()
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
) -> BoundMetric:
    """Turn class names into indices for the pairs of one task, if the model has classes at all.

    Args:
        metric: to bind.
        model: whose class names count.
        n_pairs: number of pairs.
        n_classes: number of logits.
        top_clean: gives the model's top class of each clean image `(pair,)`; called only where needed.
        top_corrupt: the same for the corrupt images.

    Raises:
        NameNotFoundError: for an unknown class; the message suggests the nearest.
        OptionError: for an index out of range, a `PerPair` of another length, or a metric of classes for a
            model whose outputs are none.
        DataError: if target and foil are the same class.
    """
    if metric.of_classes and not model.has_classes:
        raise OptionError(
            f"{model.name} has no classes: its {n_classes} outputs are features, which the metric "
            f"{metric.name} cannot take for logits. Give a function of the features as the metric, such as "
            "their projection on a direction, metric=lambda features: features @ direction; or load the "
            "model with a classifier; or name the outputs when loading, classes=[...], if they are classes"
        )
    target = _resolved(metric.target, top_clean, model, n_pairs) if metric.uses_target else None
    foil = _resolved(metric.foil, top_corrupt, model, n_pairs) if metric.uses_foil else None
    if target is not None and foil is not None:
        for row, (wanted, other) in enumerate(zip(target, foil, strict=True)):
            shared = set(wanted) & set(other)
            if shared:
                raise DataError(
                    f"pair {row}: target and foil are the same class ({class_label(model, min(shared))}); "
                    "name them, or choose images that the model tells apart"
                )
    label = metric.name
    if target is not None:
        label += f"({', '.join(_names(model, side) for side in (target, foil) if side is not None)})"
    return BoundMetric(metric, label, _mask(target, n_classes), _mask(foil, n_classes))


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
    return formulas[0] == formulas[1] and (said[0] == said[1] or one.label == other.label)


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


def _accuracy(logits: Tensor, inputs: Inputs) -> Tensor:
    target, top = _required(inputs.target), logits.argmax(dim=-1, keepdim=True)
    return target.expand(*logits.shape[:-1], -1).gather(-1, top).squeeze(-1).to(logits.dtype)


def _log_probability(logits: Tensor, inputs: Inputs) -> Tensor:
    return _evidence(F.log_softmax(logits, dim=-1), inputs.target)


def _evidence(logits: Tensor, classes: Tensor | None) -> Tensor:
    """Log of the summed exponentials over the marked classes: the logit itself where one class is marked."""
    return logits.masked_fill(~_required(classes), float("-inf")).logsumexp(dim=-1)


def _required(classes: Tensor | None) -> Tensor:
    assert classes is not None, "the metric was bound without its classes"
    return classes


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


def _names(model: Model, indices: list[tuple[int, ...]]) -> str:
    distinct = sorted(set(indices))
    if len(distinct) > 1:
        return f"{len(distinct)} different"
    return classes_label(model, distinct[0])
