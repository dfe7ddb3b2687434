"""Attention patterns, scores before the softmax, and value-weighted patterns of all heads of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture
from circuitvit.errors import OptionError, UnsupportedModelError, counted, unknown_name
from circuitvit.export.style import MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, Stage
from circuitvit.models.stages import Reads
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

KINDS = ("pattern", "scores", "weighted")
"""What can be shown: the pattern, the scores before the softmax, the value-weighted pattern."""

_TITLES = {"pattern": "pattern", "scores": "score before the softmax", "weighted": "pattern times value"}

MOST_HEADS = 16
"""Heads that a figure has room for."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns(Result):
    """Where the heads of one layer look. All arrays are `(image, head, query, key)`, float32.

    Attributes:
        subjects: the images.
        layer: of the model.
        heads: names of the heads; those of a pool, whose queries are latents, end the model.
        pattern: after the softmax; each row sums to 1, but of differential heads to what their difference is.
        scores: before it, in nats; NaN for differential heads, which have two softmaxes.
        weighted: length of what each key's value adds to the stream at each query, in units of the stream;
            NaN where heads are normed together, so that it is no sum over keys.
    """

    subjects: Subjects
    layer: int
    heads: tuple[str, ...]
    pattern: Float[NDArray[np.float32], "image head query key"]
    scores: Float[NDArray[np.float32], "image head query key"]
    weighted: Float[NDArray[np.float32], "image head query key"]

    along = "subjects:image heads:head"
    may_be_nan = "scores weighted"

    def records(self) -> Iterator[Record]:
        """One row for each `image`, `head`, `query` and `key`: `pattern`, `score` and `weighted`. Long: read
        the arrays themselves where there are many tokens."""
        images, keys = self.subjects.axes_of_tokens.values()
        queries = [self.query_name(query) for query in range(self.pattern.shape[2])]
        axes = {"image": images, "head": self.heads, "query": queries, "key": keys}
        return cells(axes, pattern=self.pattern, score=self.scores, weighted=self.weighted)

    def _check(self) -> None:
        self.subjects.check_tokens(self.pattern.shape[3])

    def of_kind(self, kind: str) -> NDArray[np.float32]:
        """One of the three arrays by name.

        Raises:
            NameNotFoundError: if `kind` is none of `KINDS`.
        """
        if kind not in KINDS:
            raise unknown_name("kind of attention", kind, KINDS)
        found: NDArray[np.float32] = getattr(self, kind)
        return found

    def maps(self, query: int | tuple[int, ...] = 0, kind: str = "pattern") -> NDArray[np.float32]:
        """What one query token sees: `(image, head, row, column)`; of clips with time before rows.

        Args:
            query: a token by its place, 0 being the class token where there is one; or a patch by row and
                column, of a clip by frame, row and column.
            kind: one of `KINDS`.

        Raises:
            OptionError: if there is no such token.
        """
        token = self.token(query)
        return self.subjects.on_grid(self.of_kind(kind)[:, :, token])

    def token(self, query: int | tuple[int, ...]) -> int:
        """The place of a query token, given by place or as a patch `(row, column)`."""
        if isinstance(query, tuple) and self.pools:
            raise OptionError("the queries of a pool are latents, not patches: give the number of one")
        if isinstance(query, tuple):
            return self.subjects.patch(query)
        count = self.pattern.shape[2]
        if not 0 <= query < count:
            what = "latent" if self.pools else "token"
            raise OptionError(f"there is no {what} {query}: there are {count}, from 0")
        return query

    @property
    def pools(self) -> bool:
        """Whether queries are the latents of a pool, and not tokens."""
        return _pools(self.heads)

    def query_name(self, query: int) -> str:
        """What to call a query: a token's name, or "latent 0"."""
        return f"latent {query}" if self.pools else self.subjects.token_name(query)

    def figure(
        self,
        image: int = 0,
        *,
        query: int | tuple[int, ...] | None = None,
        kinds: Sequence[str] = KINDS,
        picture: bool = True,
    ) -> Picture:
        """A column for each head, a row for each kind: what one query token sees of the image.

        Every map has its own scale, which is written below it: on a common one a head that rests on a corner
        leaves all others white. Patterns are coloured by their root, scores in proportion.

        Args:
            image: which.
            query: a token by its place, or a patch `(row, column)`, which is marked; of a clip `(frame, row,
                column)`. By default the first, which is the class token where there is one; of a sentence the
                last, at which it is read.
            kinds: which of `KINDS`.
            picture: whether the image lies behind.

        Raises:
            NameNotFoundError, OptionError: if there is no such image, query or kind.
        """
        from circuitvit.views import canvas

        if query is None:
            query = self.pattern.shape[2] - 1 if self.subjects.of_words and not self.pools else 0
        row, token, n_prefix = self.subjects.index(image), self.token(query), self.subjects.n_prefix
        heads = self.heads[:MOST_HEADS]
        where = "Pool" if self.pools else f"Layer {self.layer}"
        behind = self.subjects.pictures[row] if picture else None
        kinds = [kind for kind in kinds if not np.isnan(self.of_kind(kind)).any()]
        colours = canvas.rising_colours(clear=picture)
        title = f"{where}, query {self.query_name(token)}, {self.subjects.names[row]}"
        with canvas.styled():
            sheet = self.subjects.sheet
            wide, high = canvas.proportions(sheet, 1.55, 4.6)
            least = 3 if sheet.frames == 1 else 1
            figure = canvas.blank(wide * max(len(heads), least) + 0.5, (high + 0.2) * len(kinds) + 0.4, title)
            axes = figure.subplots(len(kinds), len(heads), squeeze=False)
            for line, kind in zip(axes, kinds, strict=True):
                maps = self.subjects.on_sheet(self.of_kind(kind)[row, :, token])
                elsewhere = self.of_kind(kind)[row, :, token, :n_prefix]
                for axis, values, off in zip(line, maps, elsewhere, strict=False):
                    values = np.where(np.isfinite(values), values, np.nan)  # what a causal mask hides is grey
                    norm = canvas.scale(values) if kind == "scores" else canvas.root_scale(values)
                    canvas.overlay(axis, values, behind, 0.6, sheet=sheet, cmap=colours, norm=norm)
                    if token >= n_prefix and not self.pools:
                        canvas.mark(axis, *sheet.place(token - n_prefix))
                    axis.set_xlabel(_range(values, off, kind), color=MUTED, fontsize=6.5)
                line[0].set_ylabel(_TITLES[kind])
            for axis, name in zip(axes[0], heads, strict=True):
                axis.set_title(name)
        return figure

    def __repr__(self) -> str:
        n_images, n_heads, n_tokens, _ = self.pattern.shape
        of = counted(n_images, "image")
        return f"AttentionPatterns(layer {self.layer}: {n_heads} heads, {n_tokens} tokens, {of})"


@running
def attention_patterns(
    model: Model,
    images: ImageSpec,
    layer: int = -1,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> AttentionPatterns:
    """Patterns, scores and value-weighted patterns of all heads of a layer.

    They take `3 * heads * token^2 * 4` bytes an image: 1.4 MB for ViT-Ti/16, 5.6 MB for ViT-B/16.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        layer: of the model; negative ones count from the last.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        OptionError: if there is no such layer.
        DataError: for images that cannot be used.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> view = attention_patterns(cv.load("catdog-tiny"), catdog_pairs(1, seed=0).clean, layer=0)
        >>> view.pattern.shape[2:], view.maps().shape[2:]
        ((37, 37), (6, 6))
    """
    found = images_of(model, images)
    place = attention_stage(model, layer)
    nodes, stages = model.stages[place].nodes, attentions(model, place)
    parts: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in KINDS}
    with torch.no_grad():
        for batch in watched_batches(model, found, batch_size, "attention", progress):
            stream = capture(model, batch).stream(place)
            seen = [_seen(stage, stage.read(stream)) for stage in stages]
            for kind, values in zip(KINDS, zip(*seen, strict=True), strict=True):
                parts[kind].append(torch.cat(values, dim=1).float().cpu().numpy())
    return AttentionPatterns(
        subjects_of(model, found),
        nodes.layer,
        tuple(name for stage in stages for name in stage.nodes.senders),
        *(np.concatenate(parts[kind]) for kind in KINDS),
    )


def attention_places(model: Model) -> list[int]:
    """The places among the model's stages of those whose senders are attention heads."""
    return [place for place in range(len(model.stages)) if attentions(model, place)]


def attentions(model: Model, place: int) -> list[Stage]:
    """The attentions of a stage: itself, or those that are side by side in it."""
    return [part for part in model.stages[place].branches if part.nodes.kind == "attention"]


def attention_stage(model: Model, layer: int) -> int:
    """The place of a layer's attention stage; negative layers count from the last.

    Raises:
        OptionError: if there is no such layer.
    """
    places = attention_places(model)
    layers = [model.stages[place].nodes.layer for place in places]
    given: object = layer
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise OptionError(f"a layer is a whole number, not {given!r}")
    wanted = layers[layer] if -len(layers) <= layer < 0 else layer
    if wanted not in layers:
        pool = ", of which the last is the pool" if _pools(model.stages[places[-1]].nodes.senders) else ""
        raise OptionError(f"no attention in layer {layer}: {model.name} has it in layers {layers}{pool}")
    return places[layers.index(wanted)]


def _pools(heads: Sequence[str]) -> bool:
    """Whether heads of these names are those of an attention pool."""
    return heads[0].startswith("pool.")


def _seen(stage: Stage, reads: Reads) -> tuple[Tensor, Tensor, Tensor]:
    """What there is of each of `KINDS`."""
    pattern = stage.pattern(reads)
    weighted = _known(partial(weighted_pattern, stage), reads, pattern)
    return pattern, _known(stage.scores, reads, pattern), weighted


def _known(of: Callable[[Reads], Tensor], reads: Reads, like: Tensor) -> Tensor:
    """What there is of a kind; NaN where the heads have none."""
    try:
        return of(reads)
    except UnsupportedModelError:
        return torch.full_like(like, torch.nan)


def weighted_pattern(stage: Stage, reads: Reads) -> Float[Tensor, "image head query key"]:
    """The length of what each key's value adds to the stream at each query: `|| pattern . v W_O ||`.

    A pattern alone misleads where values are short: heads rest on tokens that say nothing (Kobayashi et al.
    2020, "Attention is Not Only a Weight", arXiv:2004.10102).
    """
    pattern, value, gain = stage.pattern(reads).abs(), stage.carried(reads), stage.gain(reads)
    if gain is None:
        weighted: Tensor = pattern * stage.expand(value).norm(dim=-1).transpose(0, 1)[:, :, None, :]
        return weighted
    at_each = zip(*(part[:, :, :, None].unbind(2) for part in gain), strict=True)  # each query has its own
    alone = [stage.expand(value * factor + summand).norm(dim=-1) for factor, summand in at_each]
    return pattern * torch.stack(alone, dim=-2).transpose(0, 1)


def _range(values: NDArray[np.float32], elsewhere: NDArray[np.float32], kind: str) -> str:
    """The scale of a map in words, and what of a pattern falls on tokens that are no patches."""
    if kind == "scores":
        from circuitvit.views import canvas

        least, most = float(np.nanmin(values)), float(np.nanmax(values))
        digits = canvas.decimals(max(abs(least), abs(most)), 1)
        return f"{least:.{digits}f} to {most:.{digits}f} nats"
    if kind == "weighted":
        return f"at most {values.max():.2g}"
    off = f", {elsewhere.sum():.0%} off the image" if elsewhere.size else ""
    return f"at most {values.max():.0%}{off}"
