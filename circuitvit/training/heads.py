"""A linear head fitted to labelled images: the usual probe, put on the model so that it has circuits.

The features of a model that was trained without classes (DINO, MAE, CLIP) are judged by how well a logistic
regression reads a label off them. That regression is a classifier like any other once it is the model's
readout, and its logit difference a behaviour like any other.

Alain and Bengio 2016, "Understanding intermediate layers using linear classifier probes", arXiv:1610.01644;
Caron et al. 2021, "Emerging properties in self-supervised vision transformers", arXiv:2104.14294.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, ModelError, OptionError, check_whole
from circuitvit.models import HeadTokens, Model, with_head
from circuitvit.tasks.images import Images
from circuitvit.tasks.labelled import LabelledSpec, Labels, class_numbers, labelled_images
from circuitvit.tasks.regression import check_fit, logistic_fit
from circuitvit.tasks.task import batches_of, check_size


class FittedHead(NamedTuple):
    """A model with a head that was fitted, and how right it is on images that it was not fitted to.

    Attributes:
        model: with the head; `model.head.save` keeps it.
        accuracy: share of images that are classified rightly by heads fitted without their fold.
        folds: the same of each fold.
    """

    model: Model
    accuracy: float
    folds: tuple[float, ...]


@running
def fit_head(
    model: Model,
    images: LabelledSpec,
    labels: Labels | None = None,
    *,
    tokens: HeadTokens = "pooled",
    strength: float = 1.0,
    folds: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> FittedHead:
    """Fit a linear classifier to labelled images by logistic regression, and put it on the model.

    Features are standardised for the fit; the head holds the same classifier on the features as they are.
    With two classes the logits are equal but for their sign, and their difference is the log-odds. The
    accuracy is of heads that did not see the images judged; images that are nearly equal make it too high.

    Args:
        model: from `load` or `wrap`, with classes of its own or none.
        images: a folder with one subfolder for each class; a mapping from classes to folders or tensors; or
            files, a folder or a tensor of preprocessed images, with labels. Files are read a batch at a time.
        labels: one for each image, names or numbers; by default the name of the folder that each file is in.
        tokens: what the head reads, as for `with_head`.
        strength: of the fit, against a penalty on squared weights (scikit-learn's `C`).
        folds: for the cross-validation.
        seed: of the folds.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: if scikit-learn is missing, images cannot be used, labels are not one for each image, or a
            class has fewer images than there are folds.
        OptionError: for fewer than two folds, or a model or tokens that `with_head` refuses.
        ModelError: if features are NaN or infinite.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> pairs = catdog_pairs(20, seed=0)
        >>> labels = ["cat"] * 20 + ["dog"] * 20
        >>> fitted = fit_head(cv.load("catdog-tiny"), torch.cat([*pairs]), labels, progress=False)
        >>> fitted.model.classes, fitted.accuracy > 0.9
        (('cat', 'dog'), True)
    """
    if not isinstance(model, Model):
        way = "wrap it with cv.wrap first" if isinstance(model, torch.nn.Module) else "give what cv.load gave"
        raise OptionError(f"{type(model).__name__} is no model of circuitvit: {way}")
    check_whole("folds", folds)
    check_fit(strength, folds, "heads")
    model.refresh()
    bare = with_head(model, None, tokens=tokens)
    pictures, named = labelled_images(images, labels, model.preprocessing)
    classes, targets = class_numbers(named, len(pictures))
    sizes = np.bincount(targets)
    if sizes.min() < folds:
        rare = classes[int(sizes.argmin())]
        raise DataError(
            f"{rare!r} has {sizes.min()} images, fewer than the {folds} folds: give more images, or folds="
        )
    pictures.check(progress)
    check_size(pictures, model)
    features = _features(bare, pictures, batch_size, progress)
    place = np.random.default_rng(seed)
    fold_of = np.empty(len(targets), dtype=int)
    for number in range(len(classes)):  # each class in proportion
        rows = place.permutation(np.flatnonzero(targets == number))
        fold_of[rows] = (np.arange(len(rows)) + place.integers(folds)) % folds
    right = []
    for fold in range(folds):
        out = fold_of == fold
        weight, bias = logistic_fit(features[~out], targets[~out], strength)
        right.append((features[out] @ weight.T + bias).argmax(axis=1) == targets[out])
    weight, bias = logistic_fit(features, targets, strength)
    made = with_head(model, weight, bias, classes=classes, tokens=tokens)
    return FittedHead(made, float(np.concatenate(right).mean()), tuple(float(each.mean()) for each in right))


# -- inside --------------------------------------------------------------------------------------


def _features(bare: Model, images: Images, batch_size: int | None, progress: bool) -> NDArray[np.float64]:
    """The features of all images, `(image, width)`."""
    found = []
    with progress_bar(len(images), "features", progress, unit="image") as bar:
        for batch in batches_of(bare, images, batch_size):
            found.append(bare(batch).double().cpu())
            bar.update(len(batch))
    features = torch.cat(found)
    bad = ~features.isfinite().all(dim=1)
    if bad.any():
        raise ModelError(f"the features of {images.names[int(bad.nonzero()[0])]} are NaN or infinite")
    return features.numpy()
