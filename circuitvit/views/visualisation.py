"""Feature visualisation: images that a node, neuron, direction, class or circuit answers to most.

An image is a spectrum, whose frequencies `f` are scaled by `1 / f`, so that fine and coarse structure grow
alike; its colours are turned into channels that go together as they do in photographs, and a sigmoid keeps
pixels in range. Adam climbs the objective on the spectrum; at every step the image is turned, scaled and
shifted a little, so that what comes out does not depend on single pixels.

Olah, Mordvintsev and Schubert 2017, "Feature visualization", Distill; Ghiasi et al. 2022, "What do vision
transformers learn? A visual exploration", arXiv:2212.06727.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import activations, free_logits, progress_bar, reference_source, refuse_inference_mode
from circuitvit.errors import DataError, ModelError, OptionError, check_number, check_whole
from circuitvit.export.maps import picture_on
from circuitvit.export.sheet import Sheet
from circuitvit.graph import CircuitLike, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.sites import LOOKS, kinds_at, matching, numbered, parsed
from circuitvit.models.tokens import PATCH, TokenSpec
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks import Constants, Mean, Task, Zero, prepare
from circuitvit.tasks.classes import ClassSpec, class_indices, spec_label
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.tasks.task import batches_of
from circuitvit.views.subjects import ImageSpec, images_of
from circuitvit.views.units import with_class_number

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Objective = Callable[[Tensor], Tensor]
"""From preprocessed images `(image, *shape)` to a number for each, `(image,)`, differentiable."""

RANDOM = 32
"""Random images whose values are given beside those of the visualisations."""

BEST = 3
"""Reference images that are kept."""

COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))
"""Square root of the covariance of red, green and blue in photographs, up to a factor (Olah et al.)."""

SHIFT, SCALE, TURN = 0.08, 0.1, 5.0
"""The most that an image is moved (of its side), scaled (of 1) and turned (in degrees) at a step."""


@dataclass(frozen=True, eq=False, repr=False)
class FeatureVisualisation(Result):
    """Images that were made for an objective, and what it gives elsewhere.

    Attributes:
        label: of the objective.
        images: that were made, preprocessed, `(image, *shape)`.
        values: of the objective on them, `(image,)`.
        history: of the objective on the transformed images at each step, `(image, step)`.
        random: of the objective on random images of natural spectrum, `(random,)`.
        reference: of the objective on the reference images, `(reference,)`; empty without any.
        names: of the reference images.
        best: the reference images of the largest values, preprocessed, the largest first.
        spec: the model's preprocessing.
    """

    label: str
    images: Float[Tensor, "image *shape"]
    values: Float[NDArray[np.float64], " image"]
    history: Float[NDArray[np.float64], "image step"]
    random: Float[NDArray[np.float64], " random"]
    reference: Float[NDArray[np.float64], " reference"]
    names: tuple[str, ...]
    best: Float[Tensor, "best *shape"]
    spec: InputSpec

    along = "names:reference"

    def records(self) -> Iterator[Record]:
        """One row for each value of the objective: what it is of (`images`: "made", "random" or
        "reference"), the `image`'s number or name, and the `value`."""
        for kind, values in (("made", self.values), ("random", self.random), ("reference", self.reference)):
            names = self.names if kind == "reference" else [str(place) for place in range(len(values))]
            for name, value in zip(names, values.tolist(), strict=True):
                yield {"images": kind, "image": name, "value": value}

    @property
    def pictures(self) -> NDArray[np.uint8]:
        """The images as people see them, `(image, height, width, 3)`; clips as strips of frames."""
        return _pictures(self.images, self.spec)

    @property
    def best_names(self) -> tuple[str, ...]:
        """Names of the reference images of the largest values, the largest first."""
        order = np.argsort(-self.reference, kind="stable")[:BEST]
        return tuple(self.names[row] for row in order)

    def figure(self, *, picture: bool = True) -> Picture:
        """The images with their values, the reference images' best, the climb, and what random images give.

        Args:
            picture: whether the reference images are shown; they may be photographs.
        """
        from circuitvit.views import canvas

        shown = [(pixels, f"{value:.3g}") for pixels, value in zip(self.pictures, self.values, strict=True)]
        if picture:
            best = np.sort(self.reference)[::-1]
            pixels = _pictures(self.best, self.spec)
            shown += [(each, f"reference {value:.3g}") for each, value in zip(pixels, best, strict=False)]
        with canvas.styled():
            across = max(3, min(len(shown), 6))
            lines = -(-len(shown) // across)
            figure = canvas.blank(1.5 * across, 1.75 * lines + 2.1, self.label)
            upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.75 * lines, 2.0])[:, 0]
            for axes, (pixels, title) in zip(
                upper.subplots(lines, across, squeeze=False).ravel(),
                shown + [(None, "")] * (lines * across - len(shown)),
                strict=True,
            ):
                axes.set_visible(pixels is not None)
                if pixels is not None:
                    axes.imshow(pixels)
                    axes.set_title(title)
                    canvas.bare(axes)
            climb, spread = lower.subplots(1, 2, sharey=True, width_ratios=[3, 2])
            for row, colour in zip(self.history, canvas.PALETTE * len(self.history), strict=False):
                climb.plot(np.arange(1, len(row) + 1), row, color=colour, linewidth=0.9)
            climb.set_xlabel("step")
            climb.set_ylabel("objective")
            groups = {"made": self.values, "random": self.random, "reference": self.reference}
            groups = {name: found for name, found in groups.items() if len(found)}
            for place, found in enumerate(groups.values()):
                spread.plot(
                    np.full(len(found), place), found, "o", alpha=0.4, markersize=3, color=canvas.PALETTE[0]
                )
                spread.plot([place - 0.25, place + 0.25], [found.mean()] * 2, color=canvas.PALETTE[1])
            spread.set_xticks(range(len(groups)), groups)
            spread.set_xlim(-0.5, len(groups) - 0.5)
        return figure

    def __repr__(self) -> str:
        made = ", ".join(f"{value:.3g}" for value in self.values)
        others = f"random up to {self.random.max():.3g}"
        if len(self.reference):
            others += f", {len(self.reference)} reference images up to {self.reference.max():.3g}"
        return f"FeatureVisualisation({self.label}: {made}; {others})"


@running
def feature_visualisation(
    model: Model,
    objective: str | CircuitLike | Objective,
    *,
    unit: ClassSpec | None = None,
    direction: Tensor | NDArray[np.floating] | None = None,
    tokens: TokenSpec = None,
    task: Task | None = None,
    reference: ImageSpec | None = None,
    count: int = 3,
    steps: int = 128,
    rate: float = 0.05,
    jitter: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> FeatureVisualisation:
    """Make images that something in a model answers to most, by gradient ascent.

    Args:
        model: from `load` or `wrap`.
        objective: the name of one site, such as `"m5.hidden[17]"`, `"a5.h2@cls"`, `"logits"` or
            `"a5.h2.pattern@patch->cls"` (the mean attention); a circuit, whose logit it is then, all other
            edges ablated; or a function of images.
        unit: the coordinate of the site, where its name has none in brackets: a number; of logits
            a class, a set or a group of them. Its mean over tokens climbs.
        direction: `(width,)`, instead of a unit: the mean coordinate along it climbs. With neither, it is the
            mean squared length of what is there.
        tokens: of the site, where its name has no @; by default the patches, where there are some.
        task: of a circuit, for its token groups and its ablation: "mean", "zero" or constants, which are the
            same for every image.
        reference: images whose values are given beside: photographs, say.
        count: of images to make.
        steps: of Adam.
        rate: of learning.
        jitter: how strong the transformations are; 0 for none, 1 for those of the module.
        seed: of the first image; the next has the next seed.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if there is no such site or class, with the nearest.
        OptionError: if options contradict each other, or an ablation differs between images.
        DataError: if the objective does not answer to the image at all.
        ModelError: if it becomes NaN or infinite.

    Example:
        >>> import circuitvit as cv
        >>> made = feature_visualisation(
        ...     cv.load("catdog-tiny"), "logits", unit="cat", count=1, steps=8, progress=False
        ... )
        >>> made.label, made.images.shape
        ('logits of cat', torch.Size([1, 3, 48, 48]))
    """
    for name, whole, least in (("count", count, 1), ("steps", steps, 1), ("seed", seed, 0)):
        check_whole(name, whole, least)
    check_number("rate", rate)
    check_number("jitter", jitter, above=-1e-12)
    refuse_inference_mode()
    refuse_sentences(model.preprocessing, "pictures are made of pixels that climb")
    model.refresh()
    pictures = None if reference is None else images_of(model, reference)
    label, of = _objective(model, objective, unit, direction, tokens, task)
    size = batch_size or 8
    images, history = [], []
    with progress_bar(steps * -(-count // size), "feature visualisation", progress, unit="step") as bar:
        for first in range(0, count, size):
            seeds = range(seed + first, seed + min(first + size, count))
            made, climb = _ascent(model, of, seeds, steps, rate, jitter, bar.update)
            images.append(made)
            history.append(climb)
    found = torch.cat(images)
    spectra = [
        _start(model.preprocessing, torch.Generator().manual_seed(seed + place)) for place in range(RANDOM)
    ]
    random = _painted(_natural(torch.stack(spectra), model.preprocessing), model.preprocessing)
    values, others = _values(model, of, found, size), _values(model, of, random, size)
    seen = np.empty(0)
    best = found[:0]
    if pictures is not None:
        with progress_bar(len(pictures), "reference images", progress, unit=model.preprocessing.what) as bar:
            parts = []
            for batch in batches_of(model, pictures, size):
                parts.append(_values(model, of, batch, size))
                bar.update(len(batch))
        seen = np.concatenate(parts)
        order = np.argsort(-seen, kind="stable")[:BEST].tolist()
        best = torch.cat([pictures.take(row, row + 1) for row in order])
    return FeatureVisualisation(
        label,
        found,
        values,
        np.concatenate(history),
        others,
        seen,
        () if pictures is None else pictures.names,
        best,
        model.preprocessing,
    )


# -- objectives ----------------------------------------------------------------------------------


def _objective(
    model: Model,
    objective: str | CircuitLike | Objective,
    unit: ClassSpec | None,
    direction: Tensor | NDArray[np.floating] | None,
    tokens: TokenSpec,
    task: Task | None,
) -> tuple[str, Objective]:
    """What climbs, in words and as a function of images."""
    if isinstance(objective, str):
        if task is not None:
            raise OptionError("a task is for a circuit's objective: leave it out for a site's")
        return _of_site(model, objective, unit, direction, tokens)
    if direction is not None or tokens is not None:
        raise OptionError("direction= and tokens= are for a site's objective, named as text")
    if not callable(objective):
        return _of_circuit(model, objective, unit, task)
    if unit is not None or task is not None:
        raise OptionError("a function is the whole objective: leave out unit= and task=")
    return getattr(objective, "__name__", "objective"), objective


def _of_site(
    model: Model,
    name: str,
    unit: ClassSpec | None,
    direction: Tensor | NDArray[np.floating] | None,
    tokens: TokenSpec,
) -> tuple[str, Objective]:
    name = with_class_number(model, name)
    bare, at, keys = parsed(name)
    bare, number = numbered(bare)
    if number is not None:
        if unit is not None:
            raise OptionError(f"{name!r} names a unit already: leave out unit=")
        unit, name = number, name.replace(f"[{number}]", "", 1)
    sites = matching(model.all_sites, bare)
    if len(sites) > 1:
        raise OptionError(f"{name!r} means {len(sites)} sites, {sites[0].name} and others: name one")
    (site,) = sites
    if unit is not None and direction is not None:
        raise OptionError("give a unit or a direction, not both")
    if site.kind in LOOKS:
        if keys is None or unit is not None or direction is not None:
            raise OptionError(
                f"of {site.name} it is the attention to some tokens that can climb: write @patch->cls, and "
                "give no unit or direction"
            )
        return name, lambda images: _at(model, images, name, tokens).sum(dim=2).mean(dim=1)
    if at is None and tokens is None and site.kind != "logits":
        kinds = kinds_at(model, site, model.n_tokens)[0]
        tokens = PATCH if PATCH in kinds else "all"
    if site.kind == "logits":
        if direction is None and unit is None:
            raise OptionError("the logits of which class? Give unit=, a name or a number")
        if unit is not None:
            classes = class_indices(model, unit)
            logits = _evidence(lambda images: _at(model, images, name, tokens), classes)
            return f"{name} of {spec_label(model, unit)}", logits
    number = _unit(unit, site.name, site.shape[-1])
    said = "" if number is None else f"[{number}]"
    if direction is not None:
        axis = _axis(direction, site.name, site.shape[-1]).to(model.device, model.dtype)
        return f"{name} along a direction", lambda images: _flat(_at(model, images, name, tokens) @ axis)
    if number is None:
        return f"{name}, squared length", lambda images: _flat(
            _at(model, images, name, tokens).square().sum(dim=-1)
        )
    return f"{name}{said}", lambda images: _flat(_at(model, images, name, tokens)[..., number])


def _at(model: Model, images: Tensor, name: str, tokens: TokenSpec) -> Tensor:
    (found,) = activations(model, images, name, tokens=tokens, grad=True).values()
    return found


def _flat(values: Tensor) -> Float[Tensor, " image"]:
    """The mean over tokens, where there are any."""
    return values if values.ndim == 1 else values.mean(dim=1)


def _unit(unit: ClassSpec | None, name: str, width: int) -> int | None:
    if unit is None:
        return None
    if isinstance(unit, bool) or not isinstance(unit, int) or not -width <= unit < width:
        raise OptionError(f"{name} has units 0 to {width - 1}, not {unit!r}")
    return int(unit) % width


def _axis(direction: Tensor | NDArray[np.floating], name: str, width: int) -> Tensor:
    """A unit vector."""
    direction = torch.as_tensor(direction)
    if direction.shape != (width,):
        shape = tuple(direction.shape)
        raise OptionError(f"a direction at {name} is a tensor of {width} numbers, not {shape}")
    length = float(direction.norm())
    if not 0 < length < math.inf:
        raise OptionError("the direction is 0, or not finite")
    return direction.detach() / length


def _of_circuit(
    model: Model, circuit: CircuitLike, unit: ClassSpec | None, task: Task | None
) -> tuple[str, Objective]:
    if unit is None or task is None:
        raise OptionError("of a circuit it is a logit that climbs: give unit=, the class, and task=")
    prepared = prepare(model, task)
    if not isinstance(prepared.ablation, (Mean, Zero, Constants)) or prepared.denoising:
        raise OptionError(
            f"{prepared.ablation.name} ablation is of pairs, and an image that is made has none: use a "
            "noising task with mean or zero ablation, or constants"
        )
    if prepared.groups is not None and prepared.groups.members.ndim == 2:
        raise OptionError("the token groups differ between images: give groups that are the same for all")
    found, classes = as_circuit(circuit, prepared.graph), class_indices(model, unit)
    references = reference_source(prepared, batch_size=8)
    label = f"{spec_label(model, unit)} in a circuit of {len(found)} edges"
    return label, _evidence(lambda images: free_logits(prepared, references, images, found.kept), classes)


def _evidence(logits: Objective, classes: Sequence[int]) -> Objective:
    """The logit of a class; of several the log of the summed exponentials."""
    return lambda images: logits(images)[:, list(classes)].logsumexp(dim=1)


def _values(model: Model, of: Objective, images: Tensor, size: int) -> NDArray[np.float64]:
    """The objective of some images, without a graph."""
    with torch.no_grad():
        parts = [
            of(images[row : row + size].to(model.device, model.dtype)) for row in range(0, len(images), size)
        ]
    return torch.cat(parts).double().cpu().numpy()


# -- images by their spectrum --------------------------------------------------------------------


def _space(spec: InputSpec) -> tuple[int, ...]:
    """Height and width; of clips with time first."""
    return (*spec.shape[: -len(spec.size)], *spec.size[1:])


def _start(spec: InputSpec, generator: torch.Generator) -> Tensor:
    """Random numbers for a spectrum, `(channel, *space, 2)`, the last axis of space halved."""
    *before, width = _space(spec)
    return torch.randn(spec.size[0], *before, width // 2 + 1, 2, generator=generator)


def _natural(spectrum: Tensor, spec: InputSpec) -> Tensor:
    """Images of a spectrum whose frequencies are scaled by 1 / f, of unit variance."""
    image = _drawn(spectrum, spec)
    return image / image.flatten(1).std(dim=1).view(-1, *(1,) * (image.ndim - 1))


def _drawn(spectrum: Tensor, spec: InputSpec) -> Float[Tensor, "image channel *space"]:
    """Images of a spectrum whose frequencies are scaled by 1 / f."""
    space = _space(spec)
    axes = [torch.fft.fftfreq(side) for side in space[:-1]] + [torch.fft.rfftfreq(space[-1])]
    frequency = torch.stack(torch.meshgrid(*axes, indexing="ij")).norm(dim=0)
    scale = 1 / frequency.clamp_min(1 / max(space))
    scaled = torch.view_as_complex(spectrum) * scale.to(spectrum.device)
    drawn: Tensor = torch.fft.irfftn(scaled, s=space, dim=tuple(range(-len(space), 0)), norm="ortho")
    return drawn / 4


def _painted(image: Float[Tensor, "image channel *space"], spec: InputSpec) -> Float[Tensor, "image *shape"]:
    """Preprocessed images: colours that go together, in the range of pixels, normalised as the model says."""
    if image.shape[1] == 3:
        colours = torch.tensor(COLOURS, device=image.device)
        image = torch.einsum("oc,nc...->no...", colours / colours.norm(dim=0).max(), image)
    mean, std = (
        torch.tensor(each, device=image.device).view(-1, *(1,) * (image.ndim - 2))
        for each in (spec.mean, spec.std)
    )
    normalised = (image.sigmoid() - mean) / std
    return normalised.movedim(1, -3)  # a clip's frames come before its channels


def _ascent(
    model: Model,
    of: Objective,
    seeds: Sequence[int],
    steps: int,
    rate: float,
    jitter: float,
    step_done: Callable[[], object],
) -> tuple[Float[Tensor, "image *shape"], NDArray[np.float64]]:
    """Images that climbed an objective, and its value at each step; each image has its own randomness."""
    spec = model.preprocessing
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    spectrum = 0.01 * torch.stack([_start(spec, generator) for generator in generators])
    spectrum = spectrum.to(model.device).requires_grad_()
    optimiser = torch.optim.Adam([spectrum], lr=rate)
    history = []
    with torch.enable_grad():
        for step in range(steps):
            images = _moved(_painted(_drawn(spectrum, spec), spec), generators, jitter)
            values = of(images.to(model.dtype))
            _check(values, images, step)
            optimiser.zero_grad()
            (-values.sum()).backward()  # type: ignore[no-untyped-call]
            if step == 0 and (spectrum.grad is None or not spectrum.grad.any()):
                raise DataError("the objective is the same for all images: there is nothing to climb")
            optimiser.step()
            history.append(values.detach().double().cpu())
            step_done()
    return _painted(_drawn(spectrum.detach(), spec), spec).cpu(), torch.stack(history, dim=1).numpy()


def _check(values: object, images: Tensor, step: int) -> None:
    if not isinstance(values, Tensor) or values.shape != (len(images),) or not values.requires_grad:
        raise OptionError("an objective gives a differentiable number for each image, a tensor (image,)")
    if not values.isfinite().all():
        raise ModelError(f"the objective is NaN or infinite at step {step + 1}: use a smaller rate")


def _moved(images: Tensor, generators: Sequence[torch.Generator], jitter: float) -> Tensor:
    """Each image turned, scaled and shifted a little; what comes in from outside is its reflection."""
    if not jitter:
        return images
    height, width = images.shape[-2:]
    draws = torch.stack([2 * torch.rand(4, generator=each) - 1 for each in generators]) * jitter
    angle, size = math.radians(TURN) * draws[:, 0], 1 + SCALE * draws[:, 1]
    cos, sin = size * angle.cos(), size * angle.sin()
    shift = 2 * SHIFT * draws[:, 2:]
    rows = [cos, -sin * height / width, shift[:, 0], sin * width / height, cos, shift[:, 1]]
    theta = torch.stack(rows, dim=1).view(-1, 2, 3).to(images)
    flat = images.reshape(-1, *images.shape[-3:])
    theta = theta.repeat_interleave(len(flat) // len(images), dim=0)
    grid = F.affine_grid(theta, list(flat.shape), align_corners=False)
    return F.grid_sample(flat, grid, padding_mode="reflection", align_corners=False).view(images.shape)


def _pictures(images: Tensor, spec: InputSpec) -> NDArray[np.uint8]:
    sheet = Sheet((*images.shape[1:-3], 1, 1))
    shown = [picture_on(sheet, image, spec) for image in images]
    return np.stack(shown) if shown else np.empty((0, 1, 1, 3), dtype=np.uint8)
