"""Emergent segmentation: does the evidence of each patch for a class find the object?

A classifier was never told where things are. Joseph and Nanda 2024 ("Laying the Foundations for Vision and
Multimodal Mechanistic Interpretability") saw that what the lens says of each patch outlines the object all
the same; Gandelsman et al. 2024 (arXiv:2310.05916) segment with the heads' direct contributions by
patch. Here these maps are scored against masks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture
from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.export.style import INK, MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.groundtruth.edges import average_precision
from circuitvit.models import Model
from circuitvit.tasks.classes import ClassSpec, opposed, spec_label
from circuitvit.tasks.images import Images
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.verification.statistics import Estimate, mean_interval
from circuitvit.views.attribution import direct_logit_attribution
from circuitvit.views.contributions import decompose
from circuitvit.views.lens import position_index, positions_of, token_logits
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

By = Literal["lens", "attribution", "heads"]
Threshold = float | Literal["mean"]

MOST_PANELS = 12


@dataclass(frozen=True)
class SegmentationScore:
    """How well a map of evidence finds a mask; every figure lies between 0 and 1.

    Attributes:
        iou_best: intersection over union at the threshold that suits the image best: what the map could do.
        best_threshold: that threshold, in units of the evidence.
        iou_fixed: the same at the fixed threshold: what the map does.
        fixed_threshold: that threshold.
        average_precision: area under precision over recall, without any threshold.
        prevalence: share of the pixels in the mask; the average precision of a map that knows nothing, and
            the IoU of calling everything object.
    """

    iou_best: float
    best_threshold: float
    iou_fixed: float
    fixed_threshold: float
    average_precision: float
    prevalence: float


@dataclass(frozen=True, eq=False, repr=False)
class PatchEvidence(Result):
    """Evidence of each patch for a class.

    Attributes:
        subjects: the images.
        label: what the evidence is, for titles.
        values: `(image, row, column)`, in logits (nats of log-odds); positive speaks for the class. Of clips
            with time before rows.
    """

    subjects: Subjects
    label: str
    values: Float[NDArray[np.float64], "image *grid"]

    along = "subjects:image"

    def records(self) -> Iterator[Record]:
        """One row for each `image` and patch (`token`): its `evidence`, in logits or nats of log-odds."""
        images, tokens = self.subjects.axes_of_tokens.values()
        flat = self.values.reshape(len(self.values), -1)
        return cells({"image": images, "token": tokens[self.subjects.n_prefix :]}, evidence=flat)

    def _check(self) -> None:
        if self.values.shape[1:] != tuple(self.subjects.grid):
            raise OptionError(f"maps of {self.values.shape[1:]} for patches of {self.subjects.grid}")

    def upsampled(self, size: tuple[int, int] | None = None) -> NDArray[np.float64]:
        """The maps in the size of the images or another, `(image, height, width)`, interpolated linearly; of
        clips frame by frame, `(clip, frame, height, width)`.
        """
        sheet, before = self.subjects.sheet, self.values.shape[:-2]
        height, width = self.subjects.pictures.shape[1:3]
        wanted = size or (height * sheet.across // sheet.frames, width // sheet.across)
        maps = torch.from_numpy(self.values).reshape(-1, 1, *self.values.shape[-2:])
        found = F.interpolate(maps, size=tuple(wanted), mode="bilinear", align_corners=False)
        return np.asarray(found.reshape(*before, *wanted).numpy())

    def score(
        self, masks: ArrayLike | Tensor, threshold: Threshold = 0.0, ignore: ArrayLike | Tensor | None = None
    ) -> tuple[SegmentationScore, ...]:
        """Each map against its mask.

        Args:
            masks: True on the object, `(image, height, width)`, any size that fits the picture's; of clips
                with one for each frame of the grid, `(clip, frame, height, width)`.
            threshold: the fixed one, chosen without the masks: at 0 a patch is object when it speaks for the
                class; at "mean" when it does so more than the image's average.
            ignore: pixels that do not count, such as an annotated border, of the same shape.

        Raises:
            DataError: if the masks do not match the images, or one is empty or full.
        """
        wanted = np.asarray(masks, dtype=bool)
        left_out = np.zeros_like(wanted) if ignore is None else np.asarray(ignore, dtype=bool)
        if wanted.shape[:-2] != self.values.shape[:-2] or left_out.shape != wanted.shape:
            raise DataError(
                f"masks of shape {wanted.shape} for maps of {self.values.shape}: one (height, width) for each"
            )
        maps = self.upsampled((wanted.shape[-2], wanted.shape[-1]))
        return tuple(
            _score(
                maps[row][~left_out[row]], wanted[row][~left_out[row]], threshold, self.subjects.names[row]
            )
            for row in range(len(maps))
        )

    def figure(
        self,
        *,
        masks: ArrayLike | None = None,
        ignore: ArrayLike | None = None,
        threshold: Threshold = "mean",
        smooth: bool = True,
        picture: bool = True,
    ) -> Picture:
        """Each image with its map; with masks also their outlines, and IoU and average precision below.

        White is the threshold: blue patches lie above it, orange ones below.

        Args:
            masks: True on the object, `(image, height, width)`, of the pictures' size; not of clips.
            ignore: pixels that do not count.
            threshold: the fixed one of the IoU, as in `score`.
            smooth: whether maps are interpolated between patches.
            picture: whether the images lie behind.

        Raises:
            OptionError: if masks do not have the pictures' size.
            DataError: if they cannot be scored.
        """
        from circuitvit.views import canvas

        count, size = min(len(self.subjects), MOST_PANELS), self.subjects.pictures.shape[1:3]
        wanted = None if masks is None else np.asarray(masks, dtype=bool)
        if wanted is not None and (wanted.shape[1:] != size or self.values.ndim > 3):
            raise OptionError(f"masks of {wanted.shape[1:]} cannot be drawn over pictures of {size}")
        scores = None if wanted is None else self.score(wanted, threshold, ignore)
        maps = (self.upsampled() if smooth else self.values)[:count]
        if isinstance(threshold, str):
            middle = maps.mean(axis=tuple(range(1, maps.ndim)), keepdims=True)
            maps, above = maps - middle, "above the image's mean"
        else:
            maps, above = maps - threshold, f"above {threshold:g}"
        unit = f"{'log-odds (nats)' if 'lens' in self.label else 'logits'} {above}"
        look = {"cmap": canvas.signed_colours(), "norm": canvas.even_norm(maps, 0.99)}
        sheet = self.subjects.sheet
        maps = sheet.tile(maps) if maps.ndim > 3 else maps
        across = min(count, 5) if sheet.frames == 1 else 1
        wide, high = canvas.proportions(sheet, 1.85, 8.0)
        with canvas.styled():
            least = 2 if sheet.frames == 1 else 1
            width, height = wide * max(across, least) + 0.5, (high + 0.3) * -(-count // across) + 0.4
            figure = canvas.blank(width, height, f"Evidence for {canvas.label(self.label, 90)}")
            axes = canvas.panels(figure, count, across)
            for row, axis in enumerate(axes):
                behind = self.subjects.pictures[row] if picture else None
                alpha = 0.6 if picture else 1.0
                drawn = canvas.overlay(axis, maps[row], behind, 0.9, size, sheet, alpha=alpha, **look)
                if wanted is not None and scores is not None:
                    axis.contour(wanted[row], levels=[0.5], colors=[INK], linewidths=0.9)
                    iou = f"IoU {scores[row].iou_fixed:.2f} (best {scores[row].iou_best:.2f})"
                    precision = f"AP {scores[row].average_precision:.2f}"
                    axis.set_xlabel(f"{iou}, {precision}", color=MUTED, fontsize=6.5)
                axis.set_title(canvas.label(self.subjects.names[row], 26))
            figure.colorbar(drawn, ax=axes, shrink=0.6, extend="both", label=unit)
        return figure

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.subjects.grid))
        return f"PatchEvidence({self.label}: {len(self.values)} maps of {grid} patches)"


@dataclass(frozen=True, eq=False, repr=False)
class SegmentationChange(Result):
    """How well changed models outline objects, beside the model as it is.

    Attributes:
        label: what the evidence is.
        before: a score for each image.
        after: the same of each changed model, by name.
    """

    label: str
    before: tuple[SegmentationScore, ...]
    after: Mapping[str, tuple[SegmentationScore, ...]]

    def records(self) -> Iterator[Record]:
        """One row for each `model` ("" for the model as it is) and `image` (its number): the figures of its
        `SegmentationScore`."""
        for name, scores in {"": self.before, **self.after}.items():
            for image, score in enumerate(scores):
                yield {"model": name, "image": image, **asdict(score)}

    def _check(self) -> None:
        if any(len(scores) != len(self.before) for scores in self.after.values()):
            raise OptionError("there are scores of other numbers of images")

    def values(self, name: str, of: str = "average_precision") -> NDArray[np.float64]:
        """The change of one figure of merit, `(image,)`: after minus before.

        Raises:
            NameNotFoundError: for another model, or figure.
        """
        figures = ("average_precision", "iou_best", "iou_fixed")
        for each, known, kind in ((name, tuple(self.after), "changed model"), (of, figures, "figure")):
            if each not in known:
                raise unknown_name(kind, each, known)
        pairs = zip(self.before, self.after[name], strict=True)
        return np.array([getattr(after, of) - getattr(before, of) for before, after in pairs])

    def estimate(self, name: str, of: str = "average_precision") -> Estimate:
        """The mean change over images, with its bootstrap interval."""
        return mean_interval(self.values(name, of))

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {self.estimate(name)}" for name in self.after)
        return f"SegmentationChange({self.label}; change of average precision: {said})"


@running
def segmentation_change(
    model: Model,
    changed: Mapping[str, Model],
    images: ImageSpec,
    masks: ArrayLike | Tensor,
    target: ClassSpec,
    foil: ClassSpec | None = None,
    *,
    ignore: ArrayLike | Tensor | None = None,
    threshold: Threshold = "mean",
    by: By = "lens",
    position: int | str = -1,
    batch_size: int | None = None,
    progress: bool = True,
) -> SegmentationChange:
    """What edits do to the outlines that the model's evidence draws, such as attention made causal.

    Args:
        model: as it is.
        changed: edited models, by name.
        images: preprocessed, or paths.
        masks: True on the object, see `PatchEvidence.score`.
        target: a class, a set or a group of them.
        foil: what it is compared with.
        ignore: pixels that do not count.
        threshold: the fixed one, see `PatchEvidence.score`.
        by: "lens", "attribution" or "heads", see `patch_evidence`.
        position: of the lens; of a name such as "layer 5" the same one in every model.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError, OptionError, NameNotFoundError: as `patch_evidence` and `PatchEvidence.score`.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(5, seed=0)
        >>> edits = {"causal": model.edit({"a*.pattern": cv.causal()})}
        >>> masks = np.indices((5, 48, 48))[1] > 20
        >>> segmentation_change(model, edits, pairs.clean, masks, "cat").before[0].prevalence > 0.5
        True
    """

    def of(each: Model) -> PatchEvidence:
        return patch_evidence(
            each, images, target, foil, by=by, position=position, batch_size=batch_size, progress=progress
        )

    own = of(model)
    before = own.score(masks, threshold, ignore)
    after = {name: of(each).score(masks, threshold, ignore) for name, each in changed.items()}
    return SegmentationChange(own.label, before, after)


@running
def patch_evidence(
    model: Model,
    images: ImageSpec,
    target: ClassSpec,
    foil: ClassSpec | None = None,
    *,
    by: By = "lens",
    position: int | str = -1,
    batch_size: int | None = None,
    progress: bool = True,
) -> PatchEvidence:
    """How much each patch speaks for a class, or for any of several.

    * `by="lens"`: the log-odds of the target against the foil in the patch's own lens logits at a position.
      A set of classes counts as the log of their summed exponentials; without a foil it is all others.
    * `by="attribution"`: the shares of all heads in the logit difference by the patch they read it from (see
      `direct_logit_attribution`); it is always of the last layer.
    * `by="heads"`: the direct contributions of all heads by the patch that they were read from, along the
      direction of the class minus the mean of the others' (see `decompose`): zero-shot segmentation.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        target: a class, a set or a group of them.
        foil: what it is compared with.
        by: "lens", "attribution" or "heads".
        position: of the lens, by name or number.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown class, position or way.
        OptionError: if target and foil overlap.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> patch_evidence(cv.load("catdog-tiny"), catdog_pairs(2, seed=0).clean, "cat", "dog")
        PatchEvidence(cat against dog, lens at layer 3: 2 maps of 6 x 6 patches)
    """
    if by not in get_args(By):
        raise unknown_name("kind of evidence", by, get_args(By))
    wanted, others = opposed(model, target, foil)
    label = spec_label(model, target) + ("" if foil is None else f" against {spec_label(model, foil)}")
    if by == "attribution":
        view = direct_logit_attribution(model, images, target, foil, batch_size=batch_size, progress=progress)
        return PatchEvidence(view.subjects, f"{label}, direct attribution", view.by_patch.sum(axis=1))
    rest = others or tuple(index for index in range(model.n_logits) if index not in set(wanted))
    refuse_sentences(model.preprocessing, "segmentation is of patches")
    found = images_of(model, images)
    if by == "heads":
        return _of_heads(model, found, wanted, rest, label, batch_size, progress)
    places = list(positions_of(model, "layer").items())
    place, name = places[position_index([name for _, name in places], position)]
    batches = watched_batches(model, found, batch_size, "evidence", progress)
    odds = [_odds(model, batch, place, wanted, rest) for batch in batches]
    subjects = subjects_of(model, found)
    return PatchEvidence(subjects, f"{label}, lens at {name}", subjects.on_grid(np.concatenate(odds)))


# -- figures of merit ----------------------------------------------------------------------------


def iou(found: NDArray[np.bool_], mask: NDArray[np.bool_]) -> float:
    """Intersection over union of two masks; 0 where both are empty.

    Example:
        >>> iou(np.array([True, True, False]), np.array([False, True, True]))
        0.3333333333333333
    """
    either = int((found | mask).sum())
    return float((found & mask).sum() / either) if either else 0.0


def best_iou(values: NDArray[np.float64], mask: NDArray[np.bool_]) -> tuple[float, float]:
    """The largest IoU of `values >= threshold` over all thresholds, and the threshold.

    Example:
        >>> best_iou(np.array([3.0, 2.0, 1.0]), np.array([True, True, False]))
        (1.0, 2.0)
    """
    order = np.argsort(-values, kind="stable")
    ordered, hits = values[order], mask[order]
    last = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)  # equal values are one step
    inside = np.cumsum(hits)[last]
    scores = inside / (mask.sum() + last + 1 - inside)
    place = int(np.argmax(scores))
    return float(scores[place]), float(ordered[last][place])


# -- inside --------------------------------------------------------------------------------------


def _score(
    values: NDArray[np.float64], mask: NDArray[np.bool_], threshold: Threshold, name: str
) -> SegmentationScore:
    if mask.all() or not mask.any():
        raise DataError(
            f"the mask of {name} is {'full' if mask.any() else 'empty'}: there is nothing to find"
        )
    best, at = best_iou(values, mask)
    level = float(values.mean()) if isinstance(threshold, str) else float(threshold)
    precision = average_precision(values, mask)
    return SegmentationScore(best, at, iou(values >= level, mask), level, precision, float(mask.mean()))


def _of_heads(
    model: Model,
    images: Images,
    wanted: tuple[int, ...],
    rest: tuple[int, ...],
    label: str,
    batch_size: int | None,
    progress: bool,
) -> PatchEvidence:
    """What the heads add by patch along the mean of some classes' directions minus that of others."""
    direction = np.zeros((1, model.n_logits))
    direction[0, list(wanted)] = 1 / len(wanted)
    direction[0, list(rest)] = -1 / max(1, len(rest))
    view = decompose(
        model,
        images,
        output="logits",
        tokens=True,
        directions=direction,
        batch_size=batch_size,
        progress=progress,
    )
    assert view.by_token is not None, "tokens were asked for"
    maps = view.subjects.on_grid(view.by_token[..., 0].sum(axis=1))
    return PatchEvidence(view.subjects, f"{label}, heads' contributions", maps)


@torch.no_grad()
def _odds(
    model: Model, images: Tensor, place: int, wanted: tuple[int, ...], rest: tuple[int, ...]
) -> NDArray[np.float64]:
    """Log-odds of some classes against others in each token's lens logits, `(image, token)`."""
    logits = token_logits(model, capture(model, images).stream(place)).double()
    odds = logits[..., list(wanted)].logsumexp(dim=-1) - logits[..., list(rest)].logsumexp(dim=-1)
    return np.asarray(odds.cpu().numpy())
