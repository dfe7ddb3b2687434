"""How alike nodes of two models are in what they write about the same images, and how alike by chance.

Likeness is linear CKA (Kornblith et al. 2019, "Similarity of neural network representations revisited",
arXiv:1905.00414) with the unbiased estimate of HSIC (Song et al. 2012, "Feature selection via dependence
maximization", JMLR 13; as Nguyen et al. 2021, arXiv:2010.15327, use it): the cosine of two U-centred kernels.
It asks which images are alike to a node, so it compares streams of any two widths and is blind to a rotation
of either. The plain estimate comes near 1 for any two nodes that write in more directions than there are
images (Murphy et al. 2024, arXiv:2405.01012); this one stays around 0 for what is unrelated.

Unrelated heads are no fair chance, though: two models that were never trained see the same bright and dark
images, and their heads are alike far beyond 0. Chance is a head that looks where the other model's head looks
and carries something else: of all that the heads of its layer carry together, in values and outputs, another
part of the same width, cut out by a random rotation (as Gurnee et al. 2024, "Universal neurons in GPT2
language models", arXiv:2401.12181, hold neurons against rotated ones). For values and outputs drawn from a
normal distribution no rotation is special, wherever the heads look, which makes the p-value that of a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

Values = Float[np.ndarray, "image place width"]
Kernels = Float[np.ndarray, "node image image"]
Table = Float[np.ndarray, "node other"]

SILENT = 1e-12
"""A node whose writing varies by less, as a share of the most varied one's, says nothing of the images."""

CLOSE = 1e-3
"""How far what a head writes may be from its values, mixed as it attends, times its output: rounding."""

LEAST_SPREAD = 1e-9


def kernel(values: Values) -> Float[np.ndarray, "image image"]:
    """Inner products of what a node writes about two images, less the mean over images, summed over places.

    Example:
        >>> kernel(np.array([[[0.0]], [[2.0]]])).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    flat = _varying(values).reshape(len(values), -1)
    return np.asarray(flat @ flat.T)


def centred(kernels: Kernels) -> Float[np.ndarray, "node pair"]:
    """Kernels as unit vectors whose inner products are the debiased linear CKA; silent nodes are 0.

    U-centring (Székely and Rizzo 2014, "Partial distance correlation with methods for dissimilarities",
    Annals of Statistics 42): without the diagonal, less the means of rows and columns, so that the inner
    product of two is the unbiased HSIC.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> unrelated = np.stack([kernel(rng.normal(size=(40, 1, 200))) for _ in range(2)])
        >>> abs(round(float(np.prod(centred(unrelated), axis=0).sum()), 1))
        0.0
    """
    spread = np.trace(kernels, axis1=1, axis2=2)
    count = kernels.shape[-1]
    apart = kernels * ~np.eye(count, dtype=bool)
    rows = apart.sum(axis=2)
    apart -= (rows[:, :, None] + rows[:, None, :]) / (count - 2)
    apart += (rows.sum(axis=1) / ((count - 1) * (count - 2)))[:, None, None]
    apart *= ~np.eye(count, dtype=bool)
    flat = apart.reshape(len(kernels), -1)
    norms = np.linalg.norm(flat, axis=1, keepdims=True)
    heard = (spread > SILENT * spread.max(initial=0.0))[:, None] & (norms > 0)
    return np.asarray(np.divide(flat, norms, out=np.zeros_like(flat), where=heard))


def assign(likeness: Table) -> Int64[np.ndarray, " node"]:
    """The partner of each node, one to one, so that the sum of likeness is largest; -1 for none.

    Only what is alike (above 0) is joined.

    Example:
        >>> assign(np.array([[0.9, 0.8], [0.7, 0.1], [0.0, 0.0]])).tolist()
        [1, 0, -1]
    """
    partner = np.full(len(likeness), -1)
    rows, columns = linear_sum_assignment(np.maximum(likeness, 0.0), maximize=True)
    joined = likeness[rows, columns] > 0
    partner[rows[joined]] = columns[joined]
    return partner


def of_partners(likeness: Table, partner: Int64[np.ndarray, " node"]) -> Float[np.ndarray, " node"]:
    """How alike each node is to its partner; 0 without one."""
    return np.where(partner >= 0, likeness[np.arange(len(partner)), partner], 0.0)


# -- other images ------------------------------------------------------------------------------------


def on_halves(
    kernels: Kernels,
    others: Kernels,
    partner: Int64[np.ndarray, " node"],
    n: int,
    rng: np.random.Generator,
) -> tuple[Float[np.ndarray, " node"], Float[np.ndarray, " node"]]:
    """What random halves of the images say: how far the likeness of partners spreads, and how often the
    same two are partners.

    An estimate on half of the images, drawn without replacement, spreads around the one on all as that does
    around the truth (Politis, Romano and Wolf 1999, "Subsampling"); images drawn twice would look like images
    that are alike.
    """
    count = kernels.shape[-1]
    alike, same = [], []
    for _ in range(n):
        half = np.sort(rng.permutation(count)[: count // 2])
        own, other = (centred(each[:, half[:, None], half[None, :]]) for each in (kernels, others))
        found = own @ other.T
        alike.append(of_partners(found, partner))
        same.append(assign(found) == partner)
    return np.std(alike, axis=0, ddof=1), np.mean(same, axis=0)


# -- chance ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Layer:
    """The heads of one layer: what each would write if it carried what others do.

    Attributes:
        places: the heads' numbers among all nodes.
        mixed: the values of all heads side by side, less their mean over images, mixed as each head attends,
            `(head, image, place, value)`.
        products: inner products of the directions in which values are written, `(value, value)`.
        ends: where each head's values end.
    """

    places: tuple[int, ...]
    mixed: Float[np.ndarray, "head image place value"]
    products: Float[np.ndarray, "value value"]
    ends: tuple[int, ...]

    @classmethod
    def of(
        cls,
        places: Sequence[int],
        mixed: Sequence[Sequence[Values]],
        outputs: Sequence[Float[np.ndarray, "value d_model"]],
        written: Sequence[Values],
    ) -> Layer | None:
        """From heads that write something; None where there are fewer than two, or where what they write is
        not their values mixed (a gate, or a norm behind).

        Args:
            places: the heads' numbers.
            mixed: for each head the values of each, mixed as it attends.
            outputs: by which each head's values are written.
            written: what each head wrote.
        """
        if len(places) < 2:
            return None
        for head, (out, each) in enumerate(zip(outputs, written, strict=True)):
            off = _varying(mixed[head][head] @ out - each)
            if np.linalg.norm(off) > CLOSE * np.linalg.norm(_varying(each)):
                return None
        stacked = np.concatenate(outputs)
        ends = np.cumsum([len(out) for out in outputs]).tolist()
        beside = np.stack([_varying(np.concatenate(row, axis=-1)) for row in mixed])
        return cls(tuple(places), beside, stacked @ stacked.T, tuple(ends))

    def divided(self, rng: np.random.Generator) -> Kernels:
        """Kernels of heads that look where these do and carry other parts, of the same widths."""
        width = len(self.products)
        turn, upper = np.linalg.qr(rng.normal(size=(width, width)))
        turn *= np.sign(np.diag(upper))  # uniform over rotations: Mezzadri 2007, arXiv:math-ph/0609050
        found = []
        for mixed, start, end in zip(self.mixed, (0, *self.ends), self.ends, strict=False):
            part = turn[:, start:end]
            own = mixed @ part
            weighed = own @ (part.T @ self.products @ part)
            found.append(weighed.reshape(len(own), -1) @ own.reshape(len(own), -1).T)
        return np.stack(found)


def _varying(values: Values) -> Values:
    return np.asarray(values - values.mean(axis=0))


def by_chance(
    own: Float[np.ndarray, "node pair"],
    others: Kernels,
    layers: Sequence[Layer],
    n: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "draw node"]:
    """How alike each node is to its partner where the other model's heads carry other parts."""
    found = np.empty((n, len(own)))
    units = centred(others)
    for draw in range(n):
        drawn = units.copy()
        for layer in layers:
            drawn[list(layer.places)] = centred(layer.divided(rng))
        likeness = own @ drawn.T
        found[draw] = of_partners(likeness, assign(likeness))
    return found


def beyond_chance(
    alike: Float[np.ndarray, " node"], drawn: Float[np.ndarray, "draw node"]
) -> NDArray[np.float64]:
    """The p-value of each node, corrected for all of them: Westfall and Young 1993, "Resampling-based
    multiple testing", single step.

    Each node's likeness is measured in standard deviations of its own draws, and held against the largest of
    any node in each draw, so that the chance that any node is called alike by chance stays below the level.

    Example:
        >>> drawn = np.random.default_rng(0).normal(size=(99, 3))
        >>> round(float(beyond_chance(np.array([9.0, 0.0, 0.0]), drawn)[0]), 3)
        0.01
    """
    every = np.concatenate([alike[None], drawn])
    spread = np.maximum(every.std(axis=0), LEAST_SPREAD)
    heights = (every - every.mean(axis=0)) / spread
    largest = heights.max(axis=1)
    reached = largest[:, None] >= heights[0] - LEAST_SPREAD
    reached[0] = True  # what the heads do carry counts as one of the draws
    return np.asarray(reached.mean(axis=0))
