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

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, OptionError, check_whole, counted, unknown_name
from circuitvit.models import Model
from circuitvit.models.sites import LOOKS, Site, TokenSpec, chosen, kinds_at, matching, token_name
from circuitvit.tasks import TokenGroups
from circuitvit.tasks.images import Images
from circuitvit.tasks.labelled import LabelledSpec, Labels, class_numbers, labelled_images
from circuitvit.tasks.regression import check_fit, logistic_fit
from circuitvit.tasks.task import batches_of, check_size
from circuitvit.views.probe_results import LinearProbes, Reads

MOST_BYTES = 2**30
"""Activations that are kept at once; the images are run again for sites that do not fit."""

Targets = Int64[NDArray[np.int64], "image token"]
"""The class of each token of each image, -1 where it has none."""


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
    batch_size: int = 32,
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
        batch_size: images run at once.
        progress: whether to show bars.

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
    for name, value in (("folds", folds), ("samples", samples), ("the batch size (batch_size)", batch_size)):
        check_whole(name, value)
    check_whole("a seed", seed, 0)
    check_fit(strength, folds, "probes")
    if reads not in get_args(Reads):
        raise unknown_name("way to read tokens", reads, get_args(Reads))
    model.refresh()
    found = _sites(model, [sites] if isinstance(sites, str) else list(sites))
    pictures, targets, names = _labels(model, images, labels, classes)
    check_size(pictures, model)
    kinds = model.token_kinds(model.tokens_at(*pictures.shape[-2:]))
    places, masks = _places(model, kinds, tokens, groups, reads, len(pictures))
    if targets.shape[1] > 1 and reads == "mean":
        raise OptionError(
            "labels of tokens are no labels of their mean: choose reads='any' for one probe of single "
            "tokens, or reads='each' for a probe of every token"
        )
    targets, names = _present(targets, names, masks, folds)
    pictures.check(quiet=not progress)
    drawn = None if reads == "mean" else _drawn(masks, reads, len(pictures), samples, seed)
    reading = _Reading(masks, drawn)
    own = reading.targets(targets)
    cluster = _clusters(clusters, len(pictures), folds)
    fold = _folds(targets, cluster, folds, seed)
    shuffled = [reading.targets(targets[_shuffle(fold, each, seed)]) for each in range(folds)]
    result = _Result.empty(len(found), len(places), len(pictures), len(names))
    weights: dict[str, NDArray[np.float64]] = {}
    size = model.batch_of(len(pictures), batch_size)
    with progress_bar(len(found) * len(places), "probes", progress, unit="probe") as bar:
        for part in _chunks(found, len(pictures) * own[0].size):
            features = _features(model, pictures, [site.name for site in part], reading, size, progress)
            for name in list(features):
                values, row = features.pop(name), [site.name for site in found].index(name)
                weights[name] = np.full((len(places), len(names), values.shape[-1]), np.nan)
                for place in range(len(places)):
                    x, y = values[:, place], own[:, place]
                    if _can_be_told(y, len(names), folds):
                        controls = [each[:, place] for each in shuffled]
                        result.right[row, place], result.control[row, place] = _judged(
                            x, y, controls, fold, len(names), strength
                        )
                        weights[name][place], result.biases[row, place] = _fit(x, y, len(names), strength)
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
        weights=weights,
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


def _labels(
    model: Model, images: LabelledSpec, labels: Labels | TokenGroups | None, classes: Sequence[str] | None
) -> tuple[Images, Targets, tuple[str, ...]]:
    """The images, the class of each token (or of each image, `(image, 1)`), and the names of the classes."""
    grid: NDArray[Any] | None = None
    if isinstance(labels, TokenGroups):
        grid, classes = labels.members.numpy(), classes or labels.names
    elif isinstance(labels, (Tensor, np.ndarray)) and labels.ndim == 2:
        grid = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if grid is None:
        assert not isinstance(labels, TokenGroups), "its members are the grid"
        pictures, named = labelled_images(images, labels, model.preprocessing)
        found, numbers = class_numbers(named, len(pictures))
        return pictures, numbers[:, None], _renamed(found, classes, labels)
    if isinstance(images, Mapping):
        raise DataError("images by class are labelled already: with labels of tokens give a list")
    pictures, _ = labelled_images(images, [], model.preprocessing)
    count = model.tokens_at(*pictures.shape[-2:])
    prefix = model.token_kinds(count).count
    grid = np.broadcast_to(grid, (len(pictures), grid.shape[-1])) if grid.ndim == 1 else grid
    patches = prefix("patch")
    if grid.dtype.kind not in "iu" or grid.shape not in ((len(pictures), count), (len(pictures), patches)):
        raise DataError(
            f"labels of tokens are whole numbers, (image, token) = ({len(pictures)}, {count}) or (image, "
            f"patch) = ({len(pictures)}, {patches}), not {grid.dtype} of shape {grid.shape}"
        )
    before = np.full((len(pictures), count - grid.shape[1]), -1)
    targets = np.concatenate([before, grid], axis=1).astype(np.int64)
    most = int(targets.max(initial=-1))
    names = tuple(classes) if classes is not None else tuple(str(each) for each in range(most + 1))
    if targets.min() < -1 or most >= len(names):
        raise DataError(
            f"labels of tokens lie between 0 and {len(names) - 1}, or are -1 for none; here they lie between "
            f"{targets.min()} and {most}"
        )
    return pictures, targets, names


def _renamed(found: Sequence[str], classes: Sequence[str] | None, labels: Any) -> tuple[str, ...]:
    """The names of classes, which may be given for numbers."""
    if classes is None:
        return tuple(found)
    try:
        return tuple(str(classes[int(each)]) for each in found)
    except (ValueError, IndexError):
        raise OptionError(
            f"classes= names the numbers in labels, of which there are {', '.join(found)}"
        ) from None


def _places(
    model: Model,
    kinds: tuple[str, ...],
    tokens: TokenSpec,
    groups: TokenGroups | None,
    reads: Reads,
    images: int,
) -> tuple[tuple[str, ...], Bool[NDArray[np.bool_], "image place token"]]:
    """What each probe reads: names, and the tokens for all images alike (1) or for each."""
    if tokens is None:
        tokens = "cls" if "cls" in kinds else "patch"
    specs: list[TokenSpec] = list(tokens) if isinstance(tokens, (list, tuple)) else [tokens]
    names, masks = [], []
    for spec in specs:
        mask = chosen(spec, kinds, lambda: model.grid, groups).of(kinds)
        found = np.ones((1, len(kinds)), bool) if mask is None else np.atleast_2d(mask.numpy())
        if len(found) not in (1, images):
            raise OptionError(f"a mask of tokens for {len(found)} images, and there are {images}")
        if not found.any(axis=1).all():
            raise OptionError(f"{spec!r}: image {int(np.argmin(found.any(axis=1)))} has no such tokens")
        names.append(_called(model, kinds, spec))
        masks.append(found)
    if not names or len(set(names)) < len(names):
        raise OptionError(f"tokens are named once each, and at least one, not {', '.join(names) or 'none'}")
    joined = np.stack(np.broadcast_arrays(*masks), axis=1)
    if reads != "each":
        return tuple(names), joined
    if (joined != joined[:1]).any():
        raise OptionError("tokens that differ between images have no probe each: choose reads='any'")
    single = np.flatnonzero(joined[0].any(axis=0))
    return tuple(token_name(kinds, int(place), lambda: model.grid) for place in single), np.eye(
        len(kinds), dtype=bool
    )[single][None]


def _called(model: Model, kinds: tuple[str, ...], spec: TokenSpec) -> str:
    if isinstance(spec, int):
        return token_name(kinds, spec % len(kinds), lambda: model.grid)
    return spec if isinstance(spec, str) else "tokens"


def _present(
    targets: Targets, names: tuple[str, ...], masks: Bool[NDArray[np.bool_], "image place token"], folds: int
) -> tuple[Targets, tuple[str, ...]]:
    """The classes that occur at the tokens that are read, and targets renumbered to them.

    Raises:
        DataError: if it is one only, or one has fewer images than there are folds.
    """
    if targets.shape[1] > 1:
        targets = np.where(masks.any(axis=1), targets, -1)
    in_images = np.array([(targets == number).any(axis=1).sum() for number in range(len(names))])
    kept = np.flatnonzero(in_images)
    if len(kept) < 2:
        only = f"all are {names[kept[0]]!r}" if len(kept) else "none of the tokens has a label"
        raise DataError(f"{only}: there is nothing to tell apart")
    rare = kept[in_images[kept].argmin()]
    if in_images[rare] < folds:
        raise DataError(
            f"{names[rare]!r} is in {counted(int(in_images[rare]), 'image')}, fewer than the {folds} folds: "
            "give more images, or folds="
        )
    number = np.full(len(names) + 1, -1)
    number[kept] = np.arange(len(kept))
    return number[targets], tuple(names[each] for each in kept)


def _grid(model: Model, images: Images) -> tuple[int, ...]:
    """Rows and columns of the patches; none where they form none."""
    try:
        return tuple(model.grid_at(*images.shape[-2:]))
    except DataError:
        return ()


# -- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reading:
    """Which tokens the probes read.

    Attributes:
        masks: `(image or 1, place, token)`.
        drawn: numbers of single tokens, `(image or 1, place, sample)` with -1 for none; None for means.
    """

    masks: Bool[NDArray[np.bool_], "image place token"]
    drawn: Int64[NDArray[np.int64], "image place sample"] | None

    @cached_property
    def union(self) -> Bool[NDArray[np.bool_], " token"]:
        """All tokens that are read of any image."""
        return np.asarray(self.masks.any(axis=(0, 1)))

    def targets(self, targets: Targets) -> Int64[NDArray[np.int64], "image place sample"]:
        """The class of each sample, -1 where there is none."""
        places = self.masks.shape[1]
        if self.drawn is None:
            return np.repeat(targets[:, None], places, axis=1)
        drawn = np.broadcast_to(self.drawn, (len(targets), *self.drawn.shape[1:]))
        if targets.shape[1] == 1:
            return np.where(drawn >= 0, targets[:, :, None], -1)
        taken = np.take_along_axis(targets[:, None].repeat(places, axis=1), drawn.clip(0), axis=2)
        return np.where(drawn >= 0, taken, -1)

    def features(self, values: Tensor, first: int) -> Float[Tensor, "image place sample width"]:
        """Of activations at the union of tokens, `(image, kept, width)`, from the image `first` on."""
        table = self.masks if self.drawn is None else self.drawn
        rows = slice(first, first + len(values)) if len(table) > 1 else slice(None)
        if self.drawn is None:
            share = torch.from_numpy(self.masks[rows][:, :, self.union]).to(values)
            return (share / share.sum(dim=-1, keepdim=True) @ values)[:, :, None]
        at = torch.from_numpy((self.union.cumsum() - 1)[self.drawn[rows]])
        return values[torch.arange(len(values))[:, None, None], at]


def _drawn(
    masks: Bool[NDArray[np.bool_], "image place token"], reads: Reads, images: int, samples: int, seed: int
) -> Int64[NDArray[np.int64], "image place sample"]:
    """Single tokens: of each place the one that it has, or some that are drawn of each image."""
    if reads == "each":
        return np.asarray(masks.argmax(axis=2)[..., None])
    rng = np.random.default_rng(seed)
    masks = np.broadcast_to(masks, (images, *masks.shape[1:]))
    drawn = np.full((*masks.shape[:2], min(samples, int(masks.sum(axis=2).max()))), -1)
    for place in np.ndindex(*masks.shape[:2]):
        own = rng.permutation(np.flatnonzero(masks[place]))[: drawn.shape[2]]
        drawn[place][: len(own)] = np.sort(own)
    return drawn


def _clusters(
    clusters: Sequence[Hashable] | None, images: int, folds: int
) -> Int64[NDArray[np.int64], " image"]:
    """A number for each image's cluster; by default each image is its own."""
    if clusters is None:
        return np.arange(images)
    numbers: dict[Hashable, int] = {}
    found = np.array([numbers.setdefault(each, len(numbers)) for each in clusters], dtype=np.int64)
    if len(found) != images:
        raise DataError(f"{len(found)} clusters for {images} images: give one for each")
    if len(numbers) < folds:
        raise DataError(f"{len(numbers)} clusters are fewer than the {folds} folds: give more, or folds=")
    return found


def _folds(
    targets: Targets, clusters: Int64[NDArray[np.int64], " image"], folds: int, seed: int
) -> Int64[NDArray[np.int64], " image"]:
    """The fold in which each image is judged; -1 where it has no label."""
    from sklearn.model_selection import StratifiedGroupKFold

    rows, columns = np.nonzero(targets >= 0)
    found = np.full(len(targets), -1)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for number, (_, out) in enumerate(splitter.split(rows[:, None], targets[rows, columns], clusters[rows])):
        found[rows[out]] = number
    return found


def _shuffle(fold: Int64[NDArray[np.int64], " image"], number: int, seed: int) -> NDArray[np.int64]:
    """From which image each has its label in the control: training and test images among themselves."""
    rng, order = np.random.default_rng((seed, number)), np.arange(len(fold))
    for own in (fold == number, (fold != number) & (fold >= 0)):
        order[own] = rng.permutation(order[own])
    return order


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
    model: Model, images: Images, names: Sequence[str], reading: _Reading, batch_size: int, progress: bool
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
    right: NDArray[np.float64]
    control: NDArray[np.float64]
    biases: NDArray[np.float64]

    @classmethod
    def empty(cls, sites: int, places: int, images: int, classes: int) -> _Result:
        right, control = np.full((2, sites, places, images), np.nan)
        return cls(right, control, np.full((sites, places, classes), np.nan))


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
