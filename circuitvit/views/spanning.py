"""TextSpan: what heads say, in plain language.

A head's direct contributions to the embedding vary over images in few directions, and descriptions have
directions in the same space. The description along which the contributions vary most is taken, what it
explains is projected out, and so on (Gandelsman, Efros and Steinhardt 2024, arXiv:2310.05916, Algorithm 1).
What a phrase explains is what varies along its own direction; the paper counts what varies along the nearest
direction that the head can write, which is all of it for a head that writes one direction only.

The best of some hundred phrases always explains something. So each head's first phrase is held against heads
that say nothing: their contributions vary as much and in as many directions, but along axes drawn at random,
once in the whole space (every rotation of the head alike), and once as the other heads write (with the
covariance of all these), as what all heads write lies somehow to the descriptions. A label is given where the
phrase explains more than in both, corrected for the number of heads that vary at all (Benjamini and Hochberg
1995): of the labels a share of `alpha` at most means nothing, on average, and of models in which no head says
anything at most that share gets one. That a head says something does not say that the model uses it:
`mean_ablate` and `Model.edit` ask that.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import ArrayLike, NDArray
from scipy.stats import false_discovery_control
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.errors import DataError, OptionError, check_number, check_whole, counted, unknown_name
from circuitvit.export.style import INK
from circuitvit.graph.names import named
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.held import class_directions
from circuitvit.tasks.classes import class_label
from circuitvit.verification.statistics import rank_p
from circuitvit.views.contributions import as_rows, decompose
from circuitvit.views.subjects import ImageSpec

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

FEWEST_IMAGES = 8
"""Below this many, contributions can hardly be said to vary along something."""

MOST_AXES = 16
"""Axes of a head, its largest, that are compared with random ones."""

NOTHING = 1e-12
"""A head whose contributions vary by less, as a share of the largest head's, says nothing."""

AT_ONCE = 64
"""Random heads at once."""

ENOUGH = 20
"""Random heads that do as well, after which no more are drawn (Besag and Clifford 1991, "Sequential Monte
Carlo p-values")."""


@cache
def own_descriptions() -> tuple[str, ...]:
    """The phrases that come with the library: colours, places, shapes, animals, numbers and so on.

    Example:
        >>> "red" in own_descriptions(), len(own_descriptions()) > 300
        (True, True)
    """
    text = files("circuitvit.views").joinpath("descriptions.txt").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


@dataclass(frozen=True, eq=False, repr=False)
class TextSpan(Result):
    """The phrases that explain best how each head's direct contributions vary.

    Attributes:
        model: its name.
        images: how many were looked at.
        heads: names of the heads, or of other nodes that were asked for, in running order.
        layers: the number of each head's layer; "pool" for one of a pool.
        descriptions: what there was to choose from.
        left_out: descriptions that come with the library and that the model has no words for.
        chosen: `(head, phrase)`, places of the phrases in `descriptions`, in the order of the choice; -1
            where nothing was left to explain.
        shares: `(head, phrase)`, the share of the variance that each explains beyond those before it.
        spread: `(head,)`, the head's share of how the embedding varies, see `Decomposition.spread`.
        p: `(head,)`, how often a head that says nothing has a phrase that explains as much as the first.
        p_fdr: `(head,)`, that with the correction of Benjamini and Hochberg for as many heads as vary at all.
        alpha: the share of labels that may mean nothing.
    """

    model: str
    images: int
    heads: tuple[str, ...]
    layers: tuple[int | str, ...]
    descriptions: tuple[str, ...]
    left_out: tuple[str, ...]
    chosen: Int64[NDArray[np.int64], "head phrase"]
    shares: Float[NDArray[np.float64], "head phrase"]
    spread: Float[NDArray[np.float64], " head"]
    p: Float[NDArray[np.float64], " head"]
    p_fdr: Float[NDArray[np.float64], " head"]
    alpha: float

    along = "heads:head layers:head"

    def _check(self) -> None:
        if self.chosen.size and not -1 <= self.chosen.min() <= self.chosen.max() < len(self.descriptions):
            raise OptionError(f"phrases outside of the {len(self.descriptions)} descriptions")

    @property
    def labels(self) -> dict[str, str]:
        """The first phrase of each head for which it means something: for `Circuit.draw(labels=...)`."""
        return {
            name: self.descriptions[first]
            for name, first, p in zip(self.heads, self.chosen[:, 0], self.p_fdr, strict=True)
            if p <= self.alpha and first >= 0
        }

    def phrases(self, head: str) -> list[tuple[str, float]]:
        """The phrases of a head and what they explain, whether they mean something or not.

        Raises:
            NameNotFoundError: for another head.
        """
        if head not in self.heads:
            raise unknown_name("head", head, self.heads)
        row = self.heads.index(head)
        pairs = zip(self.chosen[row], self.shares[row], strict=True)
        return [(self.descriptions[place], float(share)) for place, share in pairs if place >= 0]

    def records(self) -> Iterator[Record]:
        """One row for each `head` and `rank` of a phrase: the `phrase`, the `share` that it explains, and of
        the head its `p`, corrected `p_fdr`, and whether that makes a `label`."""
        for row, head in enumerate(self.heads):
            facts = {"p": float(self.p[row]), "p_fdr": float(self.p_fdr[row])}
            for rank, (phrase, share) in enumerate(self.phrases(head)):
                named = rank == 0 and head in self.labels
                yield {
                    "head": head,
                    "rank": rank + 1,
                    "phrase": phrase,
                    "share": share,
                    **facts,
                    "label": named,
                }

    def figure(self) -> Picture:
        """The heads by layer, dark where the first phrase explains much, with their labels."""
        from circuitvit.views import canvas

        layers = list(dict.fromkeys(self.layers))
        rows = {layer: [at for at, own in enumerate(self.layers) if own == layer] for layer in layers}
        width = max(map(len, rows.values()))
        table = np.full((len(layers), width), np.nan)
        for place, layer in enumerate(layers):
            table[place, : len(rows[layer])] = self.shares[rows[layer], 0]
        labels = self.labels
        with canvas.styled():
            size = 1.6 + max(0.95, 3.2 / width) * width, 1.2 + 0.36 * len(layers)
            title = f"What heads say: {len(labels)} of {len(self.heads)} have a label"
            figure = canvas.blank(max(size[0], 4.6), size[1], title)
            axes = figure.subplots()
            top = float(np.nanmax(table)) or 1.0
            drawn = axes.imshow(
                table, origin="lower", aspect="auto", cmap=canvas.rising_colours(), vmin=0.0, vmax=top
            )
            for place, layer in enumerate(layers):
                for column, at in enumerate(rows[layer]):
                    said = labels.get(self.heads[at])
                    if said is not None:
                        colour = "white" if table[place, column] > 0.55 * top else INK
                        text = canvas.label(said, 18)
                        axes.text(column, place, text, ha="center", va="center", fontsize=6.5, color=colour)
            axes.set_xticks(range(width), [f"h{head}" for head in range(width)])
            axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
            axes.set_ylabel("layer")
            axes.tick_params(length=0)
            figure.colorbar(drawn, ax=axes, shrink=0.8, label="variance explained by the first phrase")
        return figure

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {said!r}" for name, said in list(self.labels.items())[:4])
        count = f"{len(self.labels)} of {counted(len(self.heads), 'head')} with a label"
        return f"TextSpan({self.model}, {counted(self.images, 'image')}; {count}{': ' * bool(shown)}{shown})"


@running
def text_span(
    model: Model,
    images: ImageSpec,
    descriptions: Sequence[str] | None = None,
    *,
    embeddings: Float[Tensor, "text width"] | ArrayLike | None = None,
    nodes: str | Sequence[str] | None = None,
    phrases: int = 5,
    alpha: float = 0.05,
    draws: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> TextSpan:
    """The phrases that explain best how each head's direct contributions vary over images.

    Descriptions are compared as they differ from their mean: what all sentences have in common says nothing
    of a head.

    Args:
        model: from `load` or `wrap`; of a model without words the classes are the phrases.
        images: preprocessed, or paths: at least 8, and as varied as what the heads may say.
        descriptions: the phrases to choose from; by default those that come with the library
            (`views.spanning.own_descriptions`) and that the model has words for, or the names of its classes.
        embeddings: `(text, width)`, the directions of `descriptions`, where the model has no words.
        nodes: names, with `*`, of what is to be labelled instead of the heads, such as `"m8.f*"`: features
            of a refined model. Each is held against what all others of them write.
        phrases: of each head.
        alpha: the share of labels that may mean nothing, on average.
        draws: how many heads that say nothing each head is held against; by default so many that one head
            alone can get a label.
        seed: of these.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: if no node that writes what is read out is called so.
        OptionError: if there are no directions for the descriptions, or options make no sense.
        DataError: for images that cannot be used or are too few, or descriptions that the model has no words
            for.
        UnsupportedModelError: as `decompose`.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(8, seed=0)
        >>> found = text_span(model, pairs.clean, phrases=1)
        >>> len(found.heads), set(found.descriptions) >= {"cat", "dog"}
        (16, True)
    """
    check_whole("the number of phrases", phrases)
    check_number("the level alpha", alpha, above=0, below=1)
    if draws is not None:
        check_whole("the number of draws", draws)
    said, directions, left_out = _directions(model, descriptions, embeddings)
    found = decompose(model, images, batch_size=batch_size, progress=progress)
    if len(found.subjects) < FEWEST_IMAGES:
        raise DataError(
            f"{counted(len(found.subjects), 'image')}: how heads vary takes {FEWEST_IMAGES} or more"
        )
    labelled = found.heads if nodes is None else named("node", nodes, found.senders)
    if not labelled:
        raise OptionError(f"{model.name} has no heads that write what is read out: there is nothing to label")
    if directions.shape[1] != found.embedding.shape[1]:
        raise OptionError(
            f"directions of {directions.shape[1]} dimensions, and the embedding of {model.name} has "
            f"{found.embedding.shape[1]}"
        )
    places = [found.senders.index(name) for name in labelled]
    written = torch.from_numpy(found.by_sender[:, places]).transpose(0, 1)
    count = draws or max(500, math.ceil(2 * len(places) / alpha))
    chosen, shares, p = spans(written, directions, phrases, count, seed)
    p_fdr, tried = p.copy(), chosen[:, 0] >= 0
    p_fdr[tried] = false_discovery_control(p[tried])
    return TextSpan(
        model.name,
        len(found.subjects),
        labelled,
        tuple(found.layers[place] for place in places),
        said,
        left_out,
        chosen,
        shares,
        found.spread[places],
        p,
        p_fdr,
        alpha,
    )


def spans(
    written: Float[Tensor, "head image dim"],
    directions: Float[Tensor, "text dim"],
    phrases: int,
    draws: int,
    seed: int = 0,
) -> tuple[
    Int64[NDArray[np.int64], "head phrase"], Float[NDArray[np.float64], "head phrase"], NDArray[np.float64]
]:
    """The phrases of each head, what they explain, and how often a head that says nothing has as good a one.

    Args:
        written: what the heads contribute; their means over images do not count.
        directions: of the descriptions; their mean and their lengths do not count.
        phrases: of each head.
        draws: heads that say nothing.
        seed: of these.
    """
    centred = (written - written.mean(dim=1, keepdim=True)).double()
    texts = directions.double() - directions.double().mean(dim=0)
    texts = texts / texts.norm(dim=1, keepdim=True).clamp_min(1e-300)
    size = centred.flatten(1).norm(dim=1)
    silent = (size**2 <= NOTHING * (size**2).max()).tolist()
    alike = torch.zeros_like(centred)
    for head, quiet in enumerate(silent):
        if not quiet:
            alike[head] = centred[head] / size[head]
    generator = torch.Generator().manual_seed(seed)
    together = torch.einsum("hid,hie->de", alike, alike)
    chosen = np.full((len(written), phrases), -1, dtype=np.int64)
    shares, p = np.zeros((len(written), phrases)), np.ones(len(written))
    for head, quiet in enumerate(silent):
        if quiet:
            continue
        _, lengths, axes = torch.linalg.svd(alike[head], full_matrices=False)
        for rank, (place, share) in enumerate(_greedy(lengths[:, None] * axes, texts, phrases)):
            chosen[head, rank], shares[head, rank] = place, share
        others = together - alike[head].t() @ alike[head]
        p[head] = _p(lengths[:MOST_AXES], axes[:MOST_AXES], texts, others, draws, generator)
    return chosen, shares, p


# -- inside --------------------------------------------------------------------------------------


def _greedy(varies: Float[Tensor, "axis dim"], texts: Tensor, phrases: int) -> Iterator[tuple[int, float]]:
    """Algorithm 1, on the axes along which a head varies, as long as it does; yields places and shares."""
    whole = varies.square().sum()
    for _ in range(min(phrases, len(texts))):
        variances = (texts @ varies.t()).square().sum(dim=1)
        best = int(variances.argmax())
        if not variances[best] > NOTHING * whole:
            return
        unit = texts[best] / texts[best].norm()
        yield best, float((varies @ unit).square().sum() / whole)
        varies = varies - (varies @ unit)[:, None] * unit
        texts = texts - (texts @ unit)[:, None] * unit


def _p(
    lengths: Tensor, axes: Tensor, texts: Tensor, others: Tensor, draws: int, generator: torch.Generator
) -> float:
    """The larger p-value of two: against axes anywhere, and against axes from what the other heads write."""
    weights = lengths**2

    def best(frames: Tensor) -> Tensor:
        along = (frames @ texts.t()).square()
        return torch.einsum("k,...kt->...t", weights, along).amax(dim=-1)

    own, found = float(best(axes)), 0.0
    for covariance in (None, others):
        if covariance is not None and not covariance.trace() > NOTHING:
            continue
        root = None if covariance is None else _root(covariance)
        drawn: list[Tensor] = []
        for start in range(0, draws, AT_ONCE):
            shape = (min(AT_ONCE, draws - start), texts.shape[1], len(lengths))
            noise = torch.randn(shape, generator=generator, dtype=texts.dtype)
            frames, _ = torch.linalg.qr(noise if root is None else root @ noise)
            drawn.append(best(frames.transpose(1, 2)))
            values = torch.cat(drawn).numpy()
            if (values >= own).sum() >= ENOUGH:
                break
        found = max(found, rank_p(own, values))
    return found


def _root(covariance: Tensor) -> Tensor:
    """A matrix that gives noise this covariance, and a trace of any direction, so that frames are whole."""
    values, vectors = torch.linalg.eigh(covariance)
    floor = 1e-9 * values[-1]
    root: Tensor = vectors * values.clamp_min(floor).sqrt()
    return root


def _directions(
    model: Model, texts: Sequence[str] | None, embeddings: Tensor | ArrayLike | None
) -> tuple[tuple[str, ...], Float[Tensor, "text width"], tuple[str, ...]]:
    """Descriptions, their directions, and descriptions that the model has no words for."""
    if isinstance(texts, str):
        raise OptionError(f"the descriptions are a list, not {texts!r}")
    said, left_out = None if texts is None else tuple(texts), tuple[str, ...]()
    if embeddings is not None:
        given = as_rows("embeddings", embeddings)
        if said is None or given.ndim != 2 or len(given) != len(said) or not given.is_floating_point():
            raise OptionError(
                f"embeddings are one direction for each of the descriptions, (text, width): there are "
                f"{len(said or ())} descriptions, and embeddings of shape {tuple(given.shape)}"
            )
        directions = given
    elif model.words is not None:
        if said is None:
            said, left_out = _sayable(model)
        directions = model.words.embed(said)
    elif said is None:
        directions = class_directions(model)
        said = tuple(class_label(model, place) for place in range(len(directions)))
    else:
        raise OptionError(
            f"{model.name} has no words for the descriptions: give their embeddings=, or leave them out, so "
            "that heads are matched to classes"
        )
    if len(said) < 2:
        raise OptionError(f"{counted(len(said), 'description')}: there is nothing to choose from")
    if not directions.isfinite().all():
        raise OptionError("directions of descriptions hold NaN or infinite values")
    return said, directions.cpu().double(), left_out


def _sayable(model: Model) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Of the descriptions that come with the library those that the model has words for, and the others."""
    assert model.words is not None, "only a model with words says something"
    known, unknown = list[str](), list[str]()
    for each in own_descriptions():
        try:
            model.words.tokenizer.encode(each)
        except DataError:
            unknown.append(each)
        else:
            known.append(each)
    return tuple(known), tuple(unknown)
