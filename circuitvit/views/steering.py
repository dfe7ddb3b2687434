"""Steering: does pushing the stream along a direction move the answer, more than any direction would?

A direction is added at a site, or the coordinate along it is held, at several scales: a dose-response curve.
Random directions of the same length are the control, as a push that is long enough moves any answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import activations
from circuitvit.errors import DataError, OptionError, check_number, check_whole, unknown_name
from circuitvit.export.style import COLOURS, MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, add, clamp
from circuitvit.models.sites import LOOKS, matching
from circuitvit.models.tokens import Groups, TokenSpec
from circuitvit.tasks import Task
from circuitvit.tasks.vectors import VectorSpec, read_vector
from circuitvit.verification.statistics import Estimate
from circuitvit.views.outcomes import (
    FIGURES,
    Figure,
    MetricSpec,
    Outcomes,
    always,
    few_images,
    outcomes,
    question,
    told,
)
from circuitvit.views.subjects import ImageSpec, images_of, watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

How = Literal["add", "clamp"]
SCALES = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Result):
    """A direction at a site, and what a step of 1 along it is.

    Attributes:
        values: `(width,)`; its length is what scale 1 means.
        site: where it was found.
        tokens: at which tokens; None for all.
        unit: scale 1 in words.
    """

    values: Float[Tensor, " width"]
    site: str
    tokens: TokenSpec = None
    unit: str = "the direction's own length"

    def records(self) -> Iterator[Record]:
        """One row for each `coordinate` of the stream: its `value`."""
        return cells({"coordinate": range(len(self.values))}, value=self.values.double().cpu().numpy())

    @property
    def length(self) -> float:
        """In the units of the site."""
        return float(self.values.norm())

    def __repr__(self) -> str:
        return f"Direction({self.site}: {len(self.values)} numbers, 1 = {self.unit} ({self.length:.3g}))"


@running
def difference_of_means(
    model: Model,
    towards: ImageSpec,
    away: ImageSpec,
    site: str,
    *,
    tokens: TokenSpec = None,
    groups: Groups | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Direction:
    """The direction from the mean activation on some images to that on others.

    A step of 1 leads from one mean to the other.

    Args:
        model: from `load`, `wrap` or `edit`.
        towards: images with what is to be steered to.
        away: images without.
        site: see `circuitvit.models.sites`, such as "resid6".
        tokens: over which activations are averaged, and that are steered; all by default.
        groups: token groups whose names may be used.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown site.
        OptionError: if the site is a pattern, or several.
        DataError: if images cannot be read, or both means are the same.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> pairs = catdog_pairs(6, seed=0)
        >>> difference_of_means(cv.load("catdog-tiny"), pairs.clean, pairs.corrupt, "resid2", tokens="cls")
        Direction(resid2: 64 numbers, 1 = the distance between the means (0.0555))
    """
    name = _site(model, site)
    both = images_of(model, towards), images_of(model, away)
    means = []
    for images in both:
        total, count = torch.zeros((), dtype=torch.float64), 0
        for batch in watched_batches(model, images, batch_size, "means", progress):
            read = activations(
                model, batch, name, tokens=tokens, groups=groups, batch_size=len(batch), progress=False
            )[name].double().flatten(0, -2)  # fmt: skip
            total, count = total + read.sum(dim=0), count + len(read)
        means.append(total / count)
    found = means[0] - means[1]
    if not bool(found.any()):
        raise DataError(f"both sets of images have the same mean at {name}: there is no direction")
    return Direction(found.to(model.dtype), name, tokens, "the distance between the means")


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Result):
    """A dose-response curve.

    Attributes:
        direction: that was added or held.
        how: "add" or "clamp".
        scales: of the direction, in order.
        outcomes: arrays `(scale, image)`; see `Outcomes`.
        controls: the same for random directions of the same length, `(draw, scale, image)`; None for none.
        caveats: what to bear in mind.
    """

    direction: Direction
    how: str
    scales: tuple[float, ...]
    outcomes: Outcomes
    controls: Outcomes | None
    caveats: tuple[str, ...]

    def records(self) -> Iterator[Record]:
        """One row for each direction (`draw`: -1 for the direction itself, else the number of a random one),
        `scale` and `image`, with the columns of `Outcomes.columns`."""
        yield from self.outcomes.columns({"draw": (-1,), "scale": self.scales}, (1, len(self.scales)))
        if self.controls is not None:
            draws = range(len(self.controls.after))
            yield from self.controls.columns(
                {"draw": draws, "scale": self.scales}, self.controls.after.shape[:2]
            )

    def _check(self) -> None:
        self.outcomes.check_changes(len(self.scales))
        if self.controls is not None and self.controls.after.shape[1:] != self.outcomes.after.shape:
            raise OptionError("the controls have other scales or images than the direction")

    def estimate(self, scale: float, of: Figure = "metric") -> Estimate:
        """The effect at a scale, with its bootstrap interval over images; of flips the exact one.

        Raises:
            OptionError: for another scale.
        """
        if scale not in self.scales:
            known = ", ".join(f"{each:g}" for each in self.scales)
            raise OptionError(f"there is no scale {scale:g}: there are {known}")
        return self.outcomes.estimate(self.scales.index(scale), of)

    def control(self, of: Figure = "metric") -> Float[NDArray[np.float64], "draw scale"]:
        """Mean effects of the random directions.

        Raises:
            OptionError: if there are none.
        """
        if self.controls is None:
            raise OptionError("there are no random directions: steer with controls=5 or so")
        return np.asarray(self.controls.values(of).mean(axis=-1))

    def figure(self, *, of: Figure = "metric") -> Picture:
        """Effect by scale with its 95 % interval; random directions in grey.

        Args:
            of: "metric", "kl" or "flips".
        """
        from circuitvit.views import canvas

        points = {scale: self.estimate(scale, of) for scale in self.scales}
        controls = {} if self.controls is None else dict(zip(self.scales, self.control(of).T, strict=True))
        if self.how == "add":  # nothing added is no change
            points[0.0] = Estimate(0.0, 0.0, 0.0)
            controls |= {0.0: np.zeros(len(next(iter(controls.values()))))} if controls else {}
        scales = sorted(points)
        found = [points[scale] for scale in scales]
        drawn: dict[str, Any] = {"color": COLOURS["supports"], "marker": "o", "markersize": 3}
        with canvas.styled():
            verb = "added to" if self.how == "add" else "held in"
            figure = canvas.blank(4.6, 3.0, f"A direction {verb} {self.direction.site}")
            (axis,) = canvas.panels(figure, 1, 1)
            if controls:
                rows = np.stack([controls[scale] for scale in scales])
                axis.plot(scales, rows, color=MUTED, linewidth=0.7, alpha=0.6)
                axis.plot([], [], color=MUTED, linewidth=0.7, label="random, same length")
            axis.plot(scales, [each.value for each in found], **drawn, label="the direction")
            if all(each.low is not None for each in found):
                low, high = ([getattr(each, side) for each in found] for side in ("low", "high"))
                axis.fill_between(scales, low, high, color=COLOURS["supports"], alpha=0.2, linewidth=0)
            axis.axhline(0, color=MUTED, linewidth=0.6)
            axis.axvline(0, color=MUTED, linewidth=0.6)
            axis.set_xlabel(f"scale (1 = {self.direction.unit}, {self.direction.length:.3g})")
            said = FIGURES[of].split(",")[0]
            axis.set_ylabel(f"{canvas.label(self.outcomes.metric, 40)}, change" if of == "metric" else said)
            axis.legend(frameon=False, fontsize=7)
        return figure

    def __repr__(self) -> str:
        ends = dict.fromkeys((self.scales[0], self.scales[-1]))
        said = ", ".join(f"{told(self.estimate(scale), 'metric')} at {scale:g}" for scale in ends)
        return f"Steering({self.how} at {self.direction.site}; {self.outcomes.metric}: {said})"


@running
def steer(
    model: Model,
    images: ImageSpec | Task,
    direction: Direction | VectorSpec,
    site: str | None = None,
    *,
    scales: Sequence[float] = SCALES,
    tokens: TokenSpec = None,
    how: How = "add",
    controls: int = 5,
    groups: Groups | None = None,
    metric: MetricSpec | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Steering:
    """A dose-response curve: the answer when a direction is added at several scales, or held there.

    Args:
        model: from `load`, `wrap` or `edit`.
        images: preprocessed images or paths; or a task, whose clean images and metric are meant.
        direction: from `difference_of_means`; or `(width,)` numbers, such as a probe's normal, or their file
            (`.npy`, `.safetensors` with one tensor); its length is what scale 1 means.
        site: where, such as "resid6"; that of the direction by default.
        scales: factors of the direction.
        tokens: where it is added; those of the direction by default, or all.
        how: "add"; or "clamp": the coordinate along the direction becomes scale times its length.
        controls: how many random directions of the same length are tried beside it; 0 for none.
        groups: token groups whose names may be used.
        metric: for images: a metric or its name; the logit of the predicted class by default.
        seed: of the random directions.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown site, metric or class.
        OptionError: if nothing says where the direction belongs, or there are no scales.
        DataError: if images cannot be read or do not fit the model, or the direction does not fit the site.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(6, seed=0)
        >>> more_cat = difference_of_means(model, pairs.clean, pairs.corrupt, "resid3", tokens="cls")
        >>> task = cv.Task(pairs.corrupt, pairs.clean, metric=cv.logit_diff("cat", "dog"))
        >>> steered = steer(model, task, more_cat, scales=[1.0, 2.0])
        >>> bool(steered.estimate(1.0).value > abs(steered.control()).max())
        True
    """
    if how not in get_args(How):
        raise unknown_name("way of steering", how, get_args(How))
    if not len(scales):
        raise OptionError("no scales: write, for example, scales=(-1, 0.5, 1)")
    for scale in scales:
        check_number("scale", scale, -float("inf"))
    check_whole("the number of random directions (controls)", controls, 0)
    found = _direction(model, direction, site, tokens)
    prepared = question(model, images, metric)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(controls, *found.values.shape, generator=generator).to(found.values)
    drawn = drawn * (found.values.norm() / drawn.norm(dim=-1, keepdim=True))
    edited = [
        always(_steered(model, found, values, float(scale), how, groups))
        for values in (found.values, *drawn)
        for scale in scales
    ]
    whole = outcomes(prepared, edited, "steering", batch_size, progress).reshaped(1 + controls, len(scales))
    caveats = (
        *(() if controls else ("no random directions: a push that is long enough moves any answer",)),
        *few_images(len(prepared)),
    )
    scaled = tuple(map(float, scales))
    return Steering(found, how, scaled, whole.at(0), whole.at(slice(1, None)) if controls else None, caveats)


# -- inside --------------------------------------------------------------------------------------


def _site(model: Model, name: str) -> str:
    found = matching(model.all_sites, name)
    if len(found) != 1 or found[0].kind in (*LOOKS, "logits"):
        raise OptionError(f"a direction is at one site such as 'resid6' or 'm3', not at {name!r}")
    return found[0].name


def _direction(
    model: Model, direction: Direction | VectorSpec, site: str | None, tokens: TokenSpec
) -> Direction:
    """A direction with everything filled in and checked."""
    if isinstance(direction, Direction):
        place, own, unit = site or direction.site, direction.tokens, direction.unit
        values: VectorSpec = direction.values
    elif site is None:
        raise OptionError("the direction does not say where it belongs: give site='resid6' or the like")
    else:
        place, own, unit, values = site, None, "the direction's own length", direction
    name = _site(model, place)
    width = next(each.shape[-1] for each in model.all_sites if each.name == name)
    found = read_vector(values, width, f"the direction at {name}").to(model.device, model.dtype)
    return Direction(found, name, own if tokens is None else tokens, unit)


def _steered(
    model: Model, direction: Direction, values: Tensor, scale: float, how: How, groups: Groups | None
) -> Model:
    if how == "add":
        value: Any = add(values, scale, direction.tokens)
    else:
        held = scale * float(values.norm())
        value = clamp(values, held, held, direction.tokens)
    return model.edit({direction.site: value}, groups=groups)
