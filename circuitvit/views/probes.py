"""Linear probes: what can be read off which activation, at which token.

A logistic regression for each site and each place (a token, a group's mean, or any token of a group), judged
on images that it was not fitted to. Alain and Bengio 2016, "Understanding intermediate layers using linear
classifier probes", arXiv:1610.01644. A regression on many features fits much by itself, so a second one is
fitted to labels that belong to other images: what it gets right is the control, and what the first gets right
beyond it the selectivity (Hewitt and Liang 2019, "Designing and interpreting probes with control tasks",
arXiv:1909.03368). Patch-level labels keep their maps, so that the control knows where an object usually is.

What can be read need not be used by the model: steer along a probe's direction to see.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, OptionError, check_whole, unknown_name
from circuitvit.models import Model
from circuitvit.models.sites import LOOKS, Site, kinds_at, matching
from circuitvit.models.tokens import TokenSpec
from circuitvit.tasks import TokenGroups
from circuitvit.tasks.images import Images
from circuitvit.tasks.labelled import LabelledSpec, Labels
from circuitvit.tasks.regression import check_fit, logistic_fit
from circuitvit.tasks.task import batches_of, check_size
from circuitvit.views.probe_results import LinearProbes, Reads
from circuitvit.views.probe_samples import (
    Reading,
    cluster_numbers,
    drawn_tokens,
    folds_of,
    places_of,
    present_classes,
    shuffled_images,
    token_labels,
)

MOST_BYTES = 2**30
"""Activations that are kept at once; the images are run again for sites that do not fit."""


@running
def linear_probes(
    model: Model,
    images: LabelledSpec,
    labels: Labels | TokenGroups | None = None,
    sites: str | Sequence[str] = "resid*",
    *,
    tokens: TokenSpec = None,
    groups: TokenGroups | None = None,
    reads: Reads = "mean",
    classes: Sequence[str] | None = None,
    strength: float = 1.0,
    folds: int = 5,
    clusters: Sequence[Hashable] | None = None,
    samples: int = 16,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> LinearProbes:
    """Fit linear probes for labels at some sites and tokens, and judge them by cross-validation.

    Folds are stratified, and never part an image's tokens. For the control, labels go to other images inside
    of the training and of the test images. Memory is that of the tokens that are asked for.

    Args:
        model: from `load`, `wrap`, `with_head` or `edit`.
        images: a folder with one subfolder for each class; a mapping, `{"cat": "cats/", "dog": "dogs/"}`; or
            files, a folder or a preprocessed tensor, with labels.
        labels: one for each image, names or numbers. For patches: whole numbers `(image, token)` or
            `(image, patch)` with -1 for none, or token groups (`TokenGroups.from_masks`), whose names are the
            classes.
        sites: names, see `model.sites()`: streams, nodes, reads, `.z`, `.hidden`; globs.
        tokens: a string or mask is one place, a list has several: "cls", ["cls", "patch"], "patch(2,3)". By
            default the class token, or the patches of a model without one.
        groups: whose names may stand in `tokens`.
        reads: "mean": a probe of the mean of a place's tokens; "any": one probe for single tokens, whichever
            of the place's they are; "each": a probe of its own for every token.
        classes: names of numbers in `labels`.
        strength: of the fit, against a penalty on squared weights (scikit-learn's `C`), features being
            standardised.
        folds: of the cross-validation.
        clusters: which images belong together, one for each: twins, crops, frames. They share a fold, as a
            probe that has seen one of two twins is no better, or worse, than chance at the other.
        samples: for "any", how many of a place's tokens are drawn of each image.
        seed: of folds, controls and drawn tokens.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if there is no such site.
        OptionError: for settings that make no sense, sites without tokens, or labels of tokens with "mean".
        DataError: if scikit-learn is missing, images or labels cannot be used, there is one class only, or a
            class has fewer images than there are folds.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> pairs = catdog_pairs(20, seed=0)
        >>> shown = {"cat": pairs.clean, "dog": pairs.corrupt}
        >>> probes = linear_probes(cv.load("catdog-tiny"), shown, progress=False)
        >>> probes
        LinearProbes(catdog-tiny: 2 classes, 5 sites, place cls, 40 images)
        >>> probes.mean("resid4").value > 0.9, probes.mean("resid0").value <= 0.5
        (True, True)
    """
    if not isinstance(model, Model):
        way = "wrap it with cv.wrap first" if isinstance(model, torch.nn.Module) else "give what cv.load gave"
        raise OptionError(f"{type(model).__name__} is no model of circuitvit: {way}")
    for name, value in (("folds", folds), ("samples", samples)):
        check_whole(name, value)
    check_fit(strength, folds, "probes")
    if reads not in get_args(Reads):
        raise unknown_name("way to read tokens", reads, get_args(Reads))
    model.refresh()
    found = _sites(model, [sites] if isinstance(sites, str) else list(sites))
    pictures, targets, names = token_labels(model, images, labels, classes)
    check_size(pictures, model)
    kinds = model.token_kinds(model.tokens_at(*pictures.shape[-2:]))
    size = pictures.shape[-2:]
    places, masks = places_of(kinds, lambda: model.grid_at(*size), tokens, groups, reads, len(pictures))
    if targets.shape[1] > 1 and reads == "mean":
        raise OptionError(
            "labels of tokens are no labels of their mean: choose reads='any' for one probe of single "
            "tokens, or reads='each' for a probe of every token"
        )
    targets, names = present_classes(targets, names, masks, folds)
    pictures.check(progress)
    drawn = None if reads == "mean" else drawn_tokens(masks, reads, len(pictures), samples, seed)
    reading = Reading(masks, drawn)
    own = reading.targets(targets)
    if not any(_can_be_told(own[:, place], len(names), folds) for place in range(len(places))):
        raise DataError(
            f"at no place is each of {', '.join(names)} in at least {folds} images, one for each fold: give "
            "more images, or reads='any' for one probe of all tokens"
        )
    cluster = cluster_numbers(clusters, len(pictures), folds)
    fold = folds_of(targets, cluster, folds, seed)
    shuffled = [reading.targets(targets[shuffled_images(fold, each, seed)]) for each in range(folds)]
    result = _Result.empty(len(found), len(places), len(pictures), len(names))
    with progress_bar(len(found) * len(places), "probes", progress, unit="probe") as bar:
        for part in _chunks(found, len(pictures) * own[0].size):
            features = _features(model, pictures, [site.name for site in part], reading, batch_size, progress)
            for name in list(features):
                values, row = features.pop(name), [site.name for site in found].index(name)
                result.weights[name] = np.full((len(places), len(names), values.shape[-1]), np.nan)
                for place in range(len(places)):
                    controls = [each[:, place] for each in shuffled]
                    result.fit((row, name, place), values[:, place], own[:, place], controls, fold, strength)
                    bar.update(1)
    return LinearProbes(
        model=model.name,
        sites=tuple(site.name for site in found),
        places=places,
        classes=names,
        images=pictures.names,
        reads=reads,
        right=result.right,
        control=result.control,
        fold=fold,
        clusters=cluster,
        majority=_majority(own, len(names)),
        weights=result.weights,
        biases=result.biases,
        tokens=np.asarray(masks.any(axis=0)),
        kinds=kinds,
        grid=_grid(model, pictures),
    )


# -- what is asked for ---------------------------------------------------------------------------


def _sites(model: Model, names: Sequence[str]) -> list[Site]:
    """The sites that are probed, once each and in the order of the model's."""
    if not names:
        raise OptionError("no sites are named: model.sites() lists what there is")
    if at := next((name for name in names if "@" in name), None):
        raise OptionError(f"{at!r}: name the tokens in tokens=, for all sites alike")
    wanted = {site.name for name in names for site in matching(model.all_sites, name)}
    found = [site for site in model.all_sites if site.name in wanted]
    for site in found:
        if site.kind in (*LOOKS, "logits"):
            raise OptionError(
                f"{site.name} is ({', '.join(site.axes)}) and has no features of tokens to probe: choose a "
                "stream, a node, or its .z or .hidden"
            )
        if "latent" in kinds_at(model, site, model.all_sites[0].shape[0])[0]:
            raise OptionError(f"{site.name} stands behind a pool, where there are no tokens of the image")
    return found


def _grid(model: Model, images: Images) -> tuple[int, ...]:
    """Rows and columns of the patches; none where they form none."""
    try:
        return tuple(model.grid_at(*images.shape[-2:]))
    except DataError:
        return ()


# -- features ------------------------------------------------------------------------------------


def _chunks(sites: Sequence[Site], samples: int) -> Iterator[list[Site]]:
    """Sites in order, as many at once as may be kept."""
    part: list[Site] = []
    for site in sites:
        part.append(site)
        if 4 * samples * sum(each.shape[-1] for each in part) > MOST_BYTES and len(part) > 1:
            yield part[:-1]
            part = [site]
    yield part


def _features(
    model: Model,
    images: Images,
    names: Sequence[str],
    reading: Reading,
    batch_size: int | None,
    progress: bool,
) -> dict[str, NDArray[np.float32]]:
    """What the probes of some sites read, `(image, place, sample, width)`."""
    found: dict[str, NDArray[np.float32]] = {}
    first, tokens = 0, torch.from_numpy(reading.union)
    with progress_bar(len(images), "activations", progress, unit=model.preprocessing.what) as bar:
        for batch in batches_of(model, images, batch_size):
            seen = model.activations(batch, names, tokens=tokens, batch_size=len(batch), progress=False)
            for name in names:
                values = reading.features(seen[name].float(), first).numpy()
                if name not in found:
                    found[name] = np.empty((len(images), *values.shape[1:]), np.float32)
                found[name][first : first + len(values)] = values
            first += len(batch)
            bar.update(len(batch))
    return found


# -- fits ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """What is found out, filled in probe by probe; see `LinearProbes`."""

    right: NDArray[np.float64]
    control: NDArray[np.float64]
    biases: NDArray[np.float64]
    weights: dict[str, NDArray[np.float64]]

    @classmethod
    def empty(cls, sites: int, places: int, images: int, classes: int) -> _Result:
        right, control = np.full((2, sites, places, images), np.nan)
        return cls(right, control, np.full((sites, places, classes), np.nan), {})

    def fit(
        self,
        at: tuple[int, str, int],
        features: Float[NDArray[np.float32], "image sample width"],
        targets: Int64[NDArray[np.int64], "image sample"],
        controls: Sequence[Int64[NDArray[np.int64], "image sample"]],
        fold: Int64[NDArray[np.int64], " image"],
        strength: float,
    ) -> None:
        """Judge and fit the probe of a site (number and name) and a place, if its classes can be told."""
        row, name, place = at
        classes = self.biases.shape[-1]
        if not _can_be_told(targets, classes, len(controls)):
            return
        judged = _judged(features, targets, controls, fold, classes, strength)
        self.right[row, place], self.control[row, place] = judged
        weight, self.biases[row, place] = _fit(features, targets, classes, strength)
        self.weights[name][place] = weight


def _can_be_told(targets: NDArray[np.int64], classes: int, folds: int) -> bool:
    """Whether every class is at a place in at least as many images as there are folds."""
    return all((targets == number).any(axis=1).sum() >= folds for number in range(classes))


def _fit(
    features: NDArray[np.float32], targets: NDArray[np.int64], classes: int, strength: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight `(class, width)` and bias `(class,)`; a class that is not there is never said."""
    known = targets >= 0
    there = np.unique(targets[known])
    weight, bias = np.zeros((classes, features.shape[-1])), np.full(classes, -np.inf)
    if len(there) == 1:
        bias[there] = 0.0
    else:
        weight[there], bias[there] = logistic_fit(
            features[known].astype(np.float64), targets[known], strength
        )
    return weight, bias


def _judged(
    features: Float[NDArray[np.float32], "image sample width"],
    targets: Int64[NDArray[np.int64], "image sample"],
    controls: Sequence[Int64[NDArray[np.int64], "image sample"]],
    fold: Int64[NDArray[np.int64], " image"],
    classes: int,
    strength: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share of each image's samples that are classified rightly by probes of the other folds.

    For the labels, and for those of the control.
    """
    shares = np.full((2, len(fold)), np.nan)
    for number, control in enumerate(controls):
        test = fold == number
        rest = ~test & (fold >= 0)
        for share, labels in zip(shares, (targets, control), strict=True):
            if not (labels[rest] >= 0).any():
                continue
            weight, bias = _fit(features[rest], labels[rest], classes, strength)
            said = (features[test].astype(np.float64) @ weight.T + bias).argmax(axis=-1)
            known = labels[test] >= 0
            with np.errstate(invalid="ignore"):
                share[test] = ((said == labels[test]) & known).sum(axis=1) / known.sum(axis=1)
    return shares[0], shares[1]


def _majority(
    targets: Int64[NDArray[np.int64], "image place sample"], classes: int
) -> Float[NDArray[np.float64], " place"]:
    """How often the most frequent class is there; NaN where nothing is labelled."""
    found = np.full(targets.shape[1], np.nan)
    for place in range(targets.shape[1]):
        own = targets[:, place]
        if (own >= 0).any():
            found[place] = np.bincount(own[own >= 0], minlength=classes).max() / (own >= 0).sum()
    return found
