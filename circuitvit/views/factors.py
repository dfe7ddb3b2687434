"""Which nodes carry which factor of an image: a matrix of shares, and how tidy the division of labour is.

**Shares.** Let `z` be what a node writes (its mean over some tokens), and let the images be all combinations
of some factors' levels. The share of a factor is that of its main effect,

    share(node, factor) = sum over levels of n_l |mean of z at the level - mean|^2 / sum of |z - mean|^2

1 for a node that is a copy of the factor, 0 for one that does not answer to it. In a full factorial design
the shares of a node add up to at most 1, and the rest is interaction: exactly, as nothing else differs.

**DCI.** A forest reads each factor's level off all nodes together. A node's importance for it (the sum over
the node's `COMPONENTS` principal components), times how far above chance the forest is, gives a matrix `R`:

    disentanglement of a node    1 - entropy over factors of R[node] / its sum, in units of log(factors)
    completeness of a factor     1 - entropy over nodes of R[:, factor] / its sum, in units of log(nodes)
    informativeness              (right out of bag - most frequent level) / (1 - most frequent level),
                                 0 where guessing may do as well

Eastwood and Williams 2018, "A framework for the quantitative evaluation of disentangled representations",
ICLR. That importances are weighted by informativeness is this library's: what cannot be read has no say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import binom, chi2_contingency, entropy
from scipy.stats.contingency import association, crosstab
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.datasets.catdog import draw_scenes
from circuitvit.datasets.factors import factorial_scenes
from circuitvit.engine import activation_batches, progress_bar
from circuitvit.errors import DataError, OptionError, check_whole, unknown_name
from circuitvit.export.style import INK
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.sites import Site, kinds_at, matching, numbered
from circuitvit.models.tokens import LATENT, PATCH
from circuitvit.tasks.images import Images
from circuitvit.views.subjects import ImageSpec, images_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Factors = Mapping[str, Sequence[Any] | NDArray[Any] | Tensor]
"""By name of a factor its level in each image, names or numbers."""

COMPONENTS = 4
"""Principal components of a node that the forest reads."""

MOST_LEVELS = 10
"""A factor of more different numbers is cut into groups of equal size."""

TOGETHER = 0.001
"""Two factors go together where a chi-squared test of their independence gives less."""

FEW = 0.2
"""Share that chance may give, before there are too few images."""

LIKELY = 0.95
"""Quantile, over shuffles, of the largest share of any node: what is above it is no accident."""

LUCKY = 0.999
"""Quantile of the right answers of somebody who guesses: what is not above it is not read."""

LEAST_TREES = 30
"""Of a forest that can be tested on the images that each tree left out."""

_CONSTANT = 1e-9  # share of a node's squares that is the rounding of float32


@dataclass(frozen=True, eq=False, repr=False)
class Disentanglement(Result):
    """Nodes by factors.

    Attributes:
        model: its name.
        images: how many there were.
        nodes: the rows, in running order; with `each="unit"` such as `m1.hidden[17]`.
        factors: the columns.
        levels: names of each factor's levels.
        shares: of a row's variance over images that is a factor's main effect, `(node, factor)`, 0 to 1.
        chance: by factor the 95% quantile over shuffles of the largest share of any row, `(factor,)`.
        importance: of a row when a factor is read off all rows, times informativeness, `(node, factor)`.
        informativeness: how well a factor is read off all rows, 0 for guessing to 1, `(factor,)`; NaN without
            forests.
        caveats: what to know before these numbers are believed.
    """

    model: str
    images: int
    nodes: tuple[str, ...]
    factors: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    shares: Float[NDArray[np.float64], "node factor"]
    chance: Float[NDArray[np.float64], " factor"]
    importance: Float[NDArray[np.float64], "node factor"]
    informativeness: Float[NDArray[np.float64], " factor"]
    caveats: tuple[str, ...]

    along = "nodes:node factors:factor levels:factor"
    may_be_nan = "shares chance importance informativeness"

    def records(self) -> Iterator[Record]:
        """One row for each `node` and `factor`: the `share` of the node's variance that is the factor's,
        what `chance` gives, and the node's `importance` when the factor is read off all nodes."""
        chance = np.broadcast_to(self.chance, self.shares.shape)
        axes = {"node": self.nodes, "factor": self.factors}
        return cells(axes, share=self.shares, chance=chance, importance=self.importance)

    @property
    def disentanglement(self) -> NDArray[np.float64]:
        """Of each row: 1 where it is important for a single factor, 0 for all alike or none, `(node,)`."""
        return _order(self.importance)

    @property
    def completeness(self) -> NDArray[np.float64]:
        """Of each factor: 1 where it is read off a single row, 0 off all alike or none, `(factor,)`."""
        return _order(self.importance.T)

    @property
    def score(self) -> float:
        """The disentanglement of the rows, weighted by their importance; 0 if nothing can be read."""
        weights = self.importance.sum(axis=1)
        return float(self.disentanglement @ weights / weights.sum()) if weights.any() else 0.0

    def carriers(self, factor: str, most: int = 10) -> list[tuple[str, float]]:
        """The rows that carry a factor, with their shares, the largest first: those above chance.

        Raises:
            NameNotFoundError: if there is no such factor.
        """
        if factor not in self.factors:
            raise unknown_name("factor", factor, self.factors)
        column = self.factors.index(factor)
        shares = self.shares[:, column]
        order = np.argsort(-shares, kind="stable").tolist()
        rows = [row for row in order if shares[row] > self.chance[column]]
        return [(self.nodes[row], float(shares[row])) for row in rows[:most]]

    def figure(self, *, most: int = 40) -> Picture:
        """The matrix of shares, with each row's disentanglement beside it.

        Args:
            most: rows; those that factors explain most of, in running order.
        """
        from circuitvit.views import canvas

        rows = np.sort(np.argsort(-self.shares.max(axis=1), kind="stable")[:most])
        shares, tidy = self.shares[rows], self.disentanglement[rows]
        with canvas.styled():
            width = 2.4 + 0.62 * len(self.factors)
            text = f"{self.model}: share of each node's variance by factor"
            figure = canvas.blank(max(width, 4.2), 1.4 + 0.19 * len(rows), text)
            main, side = figure.subplots(1, 2, width_ratios=[len(self.factors), 1], sharey=True)
            drawn = main.imshow(shares, aspect="auto", cmap=canvas.rising_colours(), vmin=0, vmax=1)
            for (row, column), share in np.ndenumerate(shares):
                if share > self.chance[column] and share >= 0.01:
                    colour = "white" if share > 0.6 else INK
                    main.text(column, row, f"{share:.2f}", ha="center", va="center", fontsize=6, color=colour)
            names = [canvas.label(name, 14) for name in self.factors]
            read = ["" if np.isnan(how) else f"\n{how:.0%} read" for how in self.informativeness]
            below = [f"{name}{how}" for name, how in zip(names, read, strict=True)]
            main.set_xticks(range(len(self.factors)), below, fontsize=6.5)
            main.set_yticks(range(len(rows)), [self.nodes[row] for row in rows], fontsize=6.5)
            side.imshow(tidy[:, None], aspect="auto", cmap=canvas.rising_colours(), vmin=0, vmax=1)
            for row, value in enumerate(tidy):
                if not self.importance[rows[row]].any():
                    continue
                colour = "white" if value > 0.6 else INK
                side.text(0, row, f"{value:.2f}", ha="center", va="center", fontsize=6, color=colour)
            side.set_xticks([0], ["disentan-\nglement"], fontsize=6.5)
            for axes in (main, side):
                axes.tick_params(length=0)
            figure.colorbar(drawn, ax=[main, side], shrink=0.8, label="share (0 to 1)")
        return figure

    def __repr__(self) -> str:
        size = f"{len(self.nodes)} nodes x {len(self.factors)} factors, {self.images} images"
        return f"Disentanglement({self.model}: {size}; score {self.score:.2f})"


@running
def disentanglement(
    model: Model,
    images: ImageSpec | None = None,
    factors: Factors | None = None,
    names: str | Sequence[str] | None = None,
    *,
    tokens: str | int | None = None,
    each: Literal["node", "unit"] = "node",
    groups: int = 5,
    trees: int = 30,
    shuffles: int = 100,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Disentanglement:
    """Which nodes carry which factor: variance explained by factor, and DCI scores, with a shuffled control.

    Args:
        model: from `load` or `wrap`.
        images: by default drawn scenes, every combination of the levels in
            `circuitvit.datasets.factors.LEVELS`; or one's own, with `factors`.
        factors: of one's own images. Numbers of more than `MOST_LEVELS` kinds are cut into `groups`.
        names: of sites to read: `"a*.h*"`, `"m1.hidden[17]"`, `"resid*"`. By default all heads and MLPs.
        tokens: where names have no @: what is averaged over. By default the class token; where a model has
            none, all patches; of a pool, its latents.
        each: a row for each "node", or for each "unit", such as a neuron of `m1.hidden`.
        groups: into which numbers are cut.
        trees: of each forest, at least 30; or 0 for shares alone, which take no scikit-learn.
        shuffles: of the factors among the images, for the control.
        seed: of scenes, shuffles and forests.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: if images cannot be used, factors are not one level for each image, or have a single level,
            or scikit-learn is missing.
        NameNotFoundError: if there is no such site, with the nearest.
        OptionError: if an option makes no sense.

    Example:
        >>> import circuitvit as cv
        >>> found = cv.disentanglement(cv.load("catdog-tiny"), trees=0, progress=False)
        >>> found.factors
        ('species', 'x', 'y', 'radius', 'tilt', 'fur', 'background')
        >>> found.shares.shape == (len(found.nodes), 7)
        True
    """
    for name, value, least in (
        ("groups", groups, 2), ("trees", trees, 0), ("shuffles", shuffles, 1), ("seed", seed, 0)
    ):  # fmt: skip
        check_whole(name, value, least)
    if 0 < trees < LEAST_TREES:
        raise OptionError(f"a forest has at least {LEAST_TREES} trees, not {trees}; 0 gives shares alone")
    if each not in ("node", "unit"):
        raise OptionError(f"rows are each='node' or each='unit', not {each!r}")
    forest = _forest() if trees else None
    if images is None:
        if factors is not None:
            raise OptionError("factors without their images: give both, or neither for drawn scenes")
        images, factors = _scenes(model, seed)
    elif factors is None:
        raise OptionError("images without factors: give a level for each image, factors={'colour': [...]}")
    pictures = images_of(model, images)
    if not factors:
        raise DataError("no factors are given: a level for each image, factors={'colour': [...]}")
    table = {name: _coded(name, given, len(pictures), groups) for name, given in factors.items()}
    codes = [code for _, code in table.values()]
    read = _read(model, pictures, _asked(model, names, tokens), batch_size, progress)
    rows, starts = _rows(read, each)
    values = np.concatenate([*read.values()], axis=1)
    shares, chance = _shares(values, starts, codes, np.random.default_rng(seed), shuffles)
    importance, informativeness = np.zeros(shares.shape), np.full(len(codes), 0.0 if forest else np.nan)
    if forest is not None:
        parts, owners = _components(values, starts)
        with progress_bar(len(codes), "forests", progress, unit="factor") as bar:
            for column, code in enumerate(codes):
                fitted = forest(trees, max_features=None, oob_score=True, random_state=seed).fit(parts, code)
                above = informativeness[column] = _above(fitted.oob_score_, code)
                importance[:, column] = above * np.bincount(owners, fitted.feature_importances_, len(rows))
                bar.update()
    return Disentanglement(
        model.name,
        len(pictures),
        rows,
        tuple(table),
        tuple(levels for levels, _ in table.values()),
        shares,
        chance,
        importance,
        informativeness,
        tuple(_caveats(tuple(table), codes, chance)),
    )


# -- images and factors --------------------------------------------------------------------------


def _scenes(model: Model, seed: int) -> tuple[Tensor, Factors]:
    """All combinations of levels, drawn in the model's size and preprocessed as it says."""
    spec = model.preprocessing
    if spec.what != "image" or spec.size[0] != 3 or spec.size[1] != spec.size[2]:
        shape = " x ".join(map(str, spec.shape))
        raise DataError(
            f"scenes are drawn as square colour images, and {model.name} takes {spec.what}s of {shape}: give "
            "images and factors"
        )
    scenes, factors = factorial_scenes(seed=seed)
    mean, std = (torch.tensor(each)[:, None, None] for each in (spec.mean, spec.std))
    return (draw_scenes(scenes, spec.size[1]) - mean) / std, factors


def _coded(name: str, given: Any, count: int, groups: int) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """The names of a factor's levels, and the number of each image's."""
    values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if values.shape != (count,):
        raise DataError(f"the factor {name!r} has the shape {values.shape}, and there are {count} images")
    is_number = values.dtype.kind in "iuf"
    if is_number and not np.isfinite(values).all():
        raise DataError(f"the factor {name!r} holds NaN or infinite values")
    levels, codes = np.unique(values, return_inverse=True)
    if len(levels) < 2:
        raise DataError(f"the factor {name!r} is {levels[0]} in all images: leave it out, or vary it")
    if is_number and len(levels) > MOST_LEVELS:
        edges = np.unique(np.quantile(values, np.arange(1, groups) / groups))
        _, codes = np.unique(np.searchsorted(edges, values, side="right"), return_inverse=True)
        spans = [values[codes == code] for code in range(codes.max() + 1)]
        return tuple(f"{span.min():.3g} to {span.max():.3g}" for span in spans), codes
    if 2 * len(levels) > count:
        raise DataError(
            f"the factor {name!r} has {len(levels)} levels in {count} images: give more images of each level"
        )
    return tuple(map(str, levels)), codes


def _caveats(
    names: tuple[str, ...], codes: list[NDArray[np.int64]], chance: NDArray[np.float64]
) -> list[str]:
    """Factors that go together, and images too few to tell."""
    found = []
    for one, other in combinations(range(len(codes)), 2):
        table = crosstab(codes[one], codes[other]).count
        if chi2_contingency(table).pvalue < TOGETHER:
            found.append(
                f"{names[one]} and {names[other]} go together in these images (Cramér's V "
                f"{association(table):.2f}): what answers to one seems to answer to the other"
            )
    for name, limit in zip(names, chance, strict=True):
        if limit > FEW:
            found.append(f"by chance alone a node has a share of {limit:.2f} in {name}: give more images")
    return found


# -- what nodes write ----------------------------------------------------------------------------


def _asked(model: Model, names: str | Sequence[str] | None, tokens: str | int | None) -> dict[str, str]:
    """What to read, with the tokens that are averaged over, by what the row is called."""
    if names is None:
        wanted = [each for each in model.graph.senders if each != "input"]
    else:
        wanted = [names] if isinstance(names, str) else list(names)
    found = []
    for name in wanted:
        node, at, said = name.partition("@")
        bare, number = numbered(node.strip())
        for site in matching(model.all_sites, bare):
            row = site.called(number)
            spec = said if at else "" if site.kind == "logits" else tokens
            found.append((row, f"{row}@{_usual(model, site) if spec is None else spec}".removesuffix("@")))
    alike = len({row for row, _ in found}) < len(set(found))
    return {key if alike else row: key for row, key in found}


def _usual(model: Model, site: Site) -> str:
    """The tokens of a site that are read where nothing is said."""
    kinds = kinds_at(model, site, model.n_tokens)[0]
    return next((kind for kind in ("cls", PATCH, LATENT) if kind in kinds), "all")


def _read(
    model: Model, pictures: Images, names: Mapping[str, str], batch_size: int | None, progress: bool
) -> dict[str, NDArray[np.float32]]:
    """The mean over tokens of what is read, `(image, width)`, by row."""
    batches = activation_batches(
        model, pictures, list(names.values()), batch_size=batch_size, progress=progress
    )
    parts: dict[str, list[Tensor]] = {row: [] for row in names}
    for _, found in batches:
        for row, key in names.items():
            parts[row].append(found[key].float() if found[key].ndim == 2 else found[key].float().mean(dim=1))
    return {row: torch.cat(each).numpy() for row, each in parts.items()}


def _rows(read: Mapping[str, NDArray[np.float32]], each: str) -> tuple[tuple[str, ...], NDArray[np.intp]]:
    """The names of the rows, and the first column of each."""
    if each == "unit":
        names = [f"{name}[{unit}]" for name, value in read.items() for unit in range(value.shape[1])]
        return tuple(names), np.arange(len(names))
    widths = [value.shape[1] for value in read.values()]
    return tuple(read), np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(np.intp)


# -- scores --------------------------------------------------------------------------------------


def _shares(
    values: NDArray[np.float32],
    starts: NDArray[np.intp],
    codes: list[NDArray[np.int64]],
    rng: np.random.Generator,
    shuffles: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The share of each factor in each row, and what chance gives."""
    squares = np.add.reduceat(np.square(values, dtype=np.float64).sum(axis=0), starts)
    centred = values - values.mean(axis=0, dtype=np.float64)
    total = np.add.reduceat(np.square(centred).sum(axis=0), starts)
    varies = total > _CONSTANT * squares
    one_hot = [np.eye(code.max() + 1)[code] for code in codes]
    groups = np.concatenate([hot / np.sqrt(hot.sum(axis=0)) for hot in one_hot], axis=1)
    firsts = np.cumsum([0, *(hot.shape[1] for hot in one_hot)])[:-1]
    total = np.where(varies, total, np.inf)

    def explained(groups: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float64]:
        between = np.add.reduceat(np.square(groups.T @ values), firsts, axis=0)
        return np.asarray(np.add.reduceat(between, starts, axis=1) / total, dtype=np.float64)

    single, rough = centred.astype(np.float32), groups.astype(np.float32)
    orders = [rng.permutation(len(values)) for _ in range(shuffles)]
    largest = [explained(rough[order], single).max(axis=1) for order in orders]
    return explained(groups, centred).T.clip(0, 1), np.quantile(largest, LIKELY, axis=0)


def _above(right: float, code: NDArray[np.int64]) -> float:
    """How far a share of right answers is above that of the most frequent level; 0 where luck may do it."""
    most = np.bincount(code).max() / len(code)
    return (
        float((right - most) / (1 - most)) if right * len(code) > binom.ppf(LUCKY, len(code), most) else 0.0
    )


def _components(
    values: NDArray[np.float32], starts: NDArray[np.intp]
) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """The principal components of each row, side by side, and whose each is."""
    parts, owners = [], []
    for row, columns in enumerate(np.split(values, starts[1:], axis=1)):
        centred = columns - columns.mean(axis=0)
        if columns.shape[1] > COMPONENTS:
            left, scale, _ = np.linalg.svd(centred, full_matrices=False)
            centred = (left * scale)[:, :COMPONENTS]
        parts.append(centred)
        owners += [row] * centred.shape[1]
    return np.concatenate(parts, axis=1), np.array(owners, dtype=np.intp)


def _order(importance: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 minus the entropy of each row, in units of that of all columns alike; 0 for an empty row."""
    total, count = importance.sum(axis=1), importance.shape[1]
    if count < 2:
        return np.asarray(total > 0, dtype=np.float64)
    rows = np.where(total[:, None] > 0, importance, 1.0)
    return np.asarray(1 - entropy(rows, axis=1) / np.log(count)).clip(0, 1)


def _forest() -> Any:
    try:
        from sklearn.ensemble import RandomForestClassifier
    except ImportError as error:
        raise DataError(
            "factors are read off with scikit-learn: pip install circuitvit[heads], or trees=0"
        ) from error
    return RandomForestClassifier
