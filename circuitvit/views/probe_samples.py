"""What probes are fitted to: the label of each token, the tokens of each place, folds and controls."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import DataError, OptionError, counted
from circuitvit.models import Model
from circuitvit.models.tokens import TokenSpec, chosen, token_name
from circuitvit.tasks import TokenGroups
from circuitvit.tasks.images import Images
from circuitvit.tasks.labelled import LabelledSpec, Labels, class_numbers, labelled_images
from circuitvit.views.probe_results import Reads

Targets = Int64[np.ndarray, "image token"]
"""The class of each token of each image, -1 where it has none."""

# -- labels and places ---------------------------------------------------------------------------


def token_labels(
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


def places_of(
    kinds: tuple[str, ...],
    grid_of: Callable[[], tuple[int, ...]],
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
        mask = chosen(spec, kinds, grid_of, groups).of(kinds)
        found = np.ones((1, len(kinds)), bool) if mask is None else np.atleast_2d(mask.numpy())
        if len(found) not in (1, images):
            raise OptionError(f"a mask of tokens for {len(found)} images, and there are {images}")
        if not found.any(axis=1).all():
            raise OptionError(f"{spec!r}: image {int(np.argmin(found.any(axis=1)))} has no such tokens")
        names.append(_called(kinds, grid_of, spec))
        masks.append(found)
    if not names or len(set(names)) < len(names):
        raise OptionError(f"tokens are named once each, and at least one, not {', '.join(names) or 'none'}")
    joined = np.stack(np.broadcast_arrays(*masks), axis=1)
    if reads != "each":
        return tuple(names), joined
    if (joined != joined[:1]).any():
        raise OptionError("tokens that differ between images have no probe each: choose reads='any'")
    single = np.flatnonzero(joined[0].any(axis=0))
    own = np.eye(len(kinds), dtype=bool)[single]
    return tuple(token_name(kinds, int(place), grid_of) for place in single), own[None]


def _called(kinds: tuple[str, ...], grid_of: Callable[[], tuple[int, ...]], spec: TokenSpec) -> str:
    if isinstance(spec, int):
        return token_name(kinds, spec % len(kinds), grid_of)
    return spec if isinstance(spec, str) else "tokens"


def present_classes(
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


# -- what is drawn -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
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


def drawn_tokens(
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


def cluster_numbers(
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


def folds_of(
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


def shuffled_images(fold: Int64[NDArray[np.int64], " image"], number: int, seed: int) -> NDArray[np.int64]:
    """From which image each has its label in the control: training and test images among themselves."""
    rng, order = np.random.default_rng((seed, number)), np.arange(len(fold))
    for own in (fold == number, (fold != number) & (fold >= 0)):
        order[own] = rng.permutation(order[own])
    return order
