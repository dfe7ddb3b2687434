"""A page of all heads on a few images: point at a patch to see where it looks, and who looks at it.

The model runs an image at a time, and a layer's patterns are packed before those of the next are made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture, progress_bar
from circuitvit.errors import (
    ModelError,
    OptionError,
    UnsupportedModelError,
    check_number,
    counted,
    unknown_name,
)
from circuitvit.export.attention_page import Packed, Tokens, attention_html, pack
from circuitvit.export.maps import words_of
from circuitvit.export.svg import image_uri
from circuitvit.graph.files import clean, write_bytes
from circuitvit.models import Model, Stage
from circuitvit.models.stages import Reads
from circuitvit.views.attention import attention_places, attention_stage, attentions
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of

MOST_IMAGES = 16
"""Images that one page may have."""

ROLLOUT = "rollout"

Pattern = NDArray[np.float32]


@dataclass(frozen=True)
class HeadRow:
    """Heads that are beside each other in the overview: those of one attention.

    Attributes:
        name: "layer 3", "pool" or "rollout".
        heads: their names.
        latents: how many latents ask in place of tokens; 0 where tokens do.
        gated: whether what heads write goes through a gate or a norm of its own afterwards.
    """

    name: str
    heads: tuple[str, ...]
    latents: int = 0
    gated: bool = False


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPage:
    """Attention patterns of many heads, packed, and a page made of them.

    Attributes:
        model: its name.
        subjects: the images.
        rows: heads by layer; the last row may be the rollout.
        packed: for each image, each head of all rows in the compact form.
        overview: for each image, the row of every head that is shown at first, in the same form.
        words: for each sentence of a text tower what its tokens say; () for images.
    """

    model: str
    subjects: Subjects
    rows: tuple[HeadRow, ...]
    packed: tuple[tuple[Packed, ...], ...]
    overview: tuple[Packed, ...]
    words: tuple[tuple[str, ...], ...] = ()

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of all heads, with "rollout" if it is there."""
        return tuple(head for row in self.rows for head in row.heads)

    @property
    def tokens(self) -> Tokens:
        """How the page arranges tokens: of a clip the patches of all frames, line by line."""
        return Tokens(self.subjects.kinds[: self.subjects.n_prefix], self.subjects.sheet)

    @property
    def precision(self) -> float:
        """How far a value may be off at most, as a share of the largest in its row."""
        return max(pack.precision for packs in self.packed for pack in packs)

    def pattern(self, head: str, image: int = 0) -> Float[Pattern, "query key"]:
        """What the page holds of a head, in the model's order of tokens.

        Raises:
            NameNotFoundError: if there is no such head.
            OptionError: if there is no such image.
        """
        if head not in self.heads:
            raise unknown_name("head", head, self.heads)
        found = self.packed[self.subjects.index(image)][self.heads.index(head)].unpacked(self.tokens)
        back = np.argsort(self.tokens.order)
        return found[:, back] if len(found) != len(back) else found[back][:, back]

    def html(
        self,
        image: int = 0,
        *,
        head: str | None = None,
        query: int | tuple[int, ...] = 0,
        picture: bool = True,
    ) -> str:
        """The page, which asks for nothing from elsewhere.

        Args:
            image: that is shown first.
            head: that is shown first; the first of the last layer by default.
            query: token that is shown first, by place or as a patch `(row, column)`; without a class token 0
                is the mean of all.
            picture: whether the images are in it.

        Raises:
            NameNotFoundError, OptionError: if there is no such image, head or token.
        """
        row = self.subjects.index(image)
        last = [each for each in self.rows if each.name != ROLLOUT][-1].heads[0]
        if (chosen := head or last) not in self.heads:
            raise unknown_name("head", chosen, self.heads)
        token = self.subjects.patch(query) if isinstance(query, tuple) else query
        if not 0 <= token < len(self.tokens):
            raise OptionError(f"there is no token {token}: there are {len(self.tokens)}, from 0")
        first = int(np.flatnonzero(self.tokens.order == token)[0])
        images = [
            {
                "name": clean(name),
                "picture": image_uri(photo) if picture else None,
                "heads": packs,
                "overview": overview,
                "words": [clean(word) for word in words],
            }
            for name, photo, packs, overview, words in zip(
                self.subjects.names,
                self.subjects.pictures,
                self.packed,
                self.overview,
                self.words or ((),) * len(self.subjects),
                strict=True,
            )
        ]
        return attention_html(
            clean(f"Attention of {self.model}"),
            f"{sum(row.name != ROLLOUT for row in self.rows)} layers, {len(self.heads)} maps of "
            f"{len(self.tokens):,} tokens. " + self._precision(),
            self.tokens,
            [vars(row) for row in self.rows],
            images,
            {
                "image": row,
                "head": self.heads.index(chosen),
                "token": first if token or self._has_class_token else -1,
            },
        )

    def save(
        self,
        path: str | Path,
        *,
        image: int = 0,
        head: str | None = None,
        query: int | tuple[int, ...] = 0,
        picture: bool = True,
    ) -> Path:
        """Write the page; for the keywords see `html`.

        Raises:
            FileError: if it cannot be written.
            NameNotFoundError, OptionError: as of `html`.
        """
        return write_bytes(path, self.html(image, head=head, query=query, picture=picture).encode())

    @property
    def _has_class_token(self) -> bool:
        return bool(self.subjects.n_prefix) and self.subjects.kinds[0] == "cls"

    def _precision(self) -> str:
        pools = max(pack.pool for packs in self.packed for pack in packs)
        squares = "" if pools == 1 else f", some as means of squares of up to {pools} x {pools} patches"
        return (
            f"Values are right to within {100 * self.precision:.2g} % of the largest in their row{squares}."
        )

    def __repr__(self) -> str:
        size = sum(len(pack.content) for packs in self.packed for pack in packs) * 4 / 3e6
        return (
            f"AttentionPage({self.model}: {len(self.heads)} maps, {len(self.tokens)} tokens, "
            f"{counted(len(self.subjects), 'image')}, {size:.1f} MB)"
        )


@running
def attention_page(
    model: Model,
    images: ImageSpec,
    layers: Sequence[int] | None = None,
    *,
    megabytes: float = 24.0,
    progress: bool = True,
) -> AttentionPage:
    """Patterns of all heads and layers, for a page in which one points at patches.

    A head of 197 tokens takes about 40 KB, so that ViT-Ti takes 1.5 MB an image. With 1,025 tokens a model of
    72 heads fills the 24 MB, with the precision that is possible then: `AttentionPage.precision`, and the
    page, say it. With all layers there is the rollout, too: how far each token is made of each other one, if
    heads of a layer are averaged and half of a token is what it was before (Abnar and Zuidema 2020,
    "Quantifying Attention Flow in Transformers", arXiv:2005.00928). It knows nothing of values and MLPs, and
    there is none where patterns are signed.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths; at most 16.
        layers: of the model, which makes a smaller page; negative ones count from the last. All by default.
        megabytes: that the page may be large.
        progress: whether to show a bar.

    Raises:
        OptionError: if there is no such layer, for too many images, or if not even the lowest precision fits.
        DataError: for images that cannot be used, or if patches form no grid.
        ModelError: if patterns are NaN.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> page = attention_page(cv.load("catdog-tiny"), catdog_pairs(2, seed=0).clean)
        >>> page.heads[-2:], page.pattern("a3.h1", image=1).shape, page.precision < 0.004
        (('a3.h3', 'rollout'), (37, 37), True)
        >>> page.save("attention.html")  # doctest: +SKIP
    """
    found = images_of(model, images)
    if len(found) > MOST_IMAGES:
        raise OptionError(f"a page has room for {MOST_IMAGES} images, not for {len(found)}: give fewer")
    check_number("the size of the page (megabytes)", megabytes)
    every = attention_places(model)
    places = every if layers is None else sorted({attention_stage(model, layer) for layer in layers})
    if not places:
        raise OptionError(f"{model.name} has no attention" if not every else "layers names no layer")
    subjects = subjects_of(model, found)
    tokens = Tokens(subjects.kinds[: subjects.n_prefix], subjects.sheet)
    heads = sum(len(part.nodes.senders) for place in places for part in attentions(model, place))
    room = _Room(megabytes, subjects, heads + (layers is None), tokens)
    rows: list[HeadRow] = []
    packed, overview = [], []
    with progress_bar(len(found) * len(places), "attention", progress, "layer") as bar:
        for row in range(len(found)):
            rows, heads_of_image, first = [], [], []
            maker = _Looks(model, found.take(row, row + 1), tokens, layers is None)
            for place in places:
                for about, pattern, weights in maker.at(place):
                    rows.append(about)
                    first.append(_first(pattern, tokens))
                    heads_of_image += [
                        room.pack(each, None if weights is None else weights[head])
                        for head, each in enumerate(pattern)
                    ]
                bar.update()
            if maker.rollout is not None:
                rows.append(HeadRow(ROLLOUT, (ROLLOUT,)))
                first.append(_first(maker.rollout[None], tokens))
                heads_of_image.append(room.pack(maker.rollout, None))
            packed.append(tuple(heads_of_image))
            overview.append(pack(np.concatenate(first), None, tokens, np.inf))
    words = tuple(words_of(found.take(row, row + 1)[0], model.preprocessing) for row in range(len(found)))
    return AttentionPage(
        model.name, subjects, tuple(rows), tuple(packed), tuple(overview), words if any(words) else ()
    )


class _Room:
    """What is left of a page's size: every head gets an equal share of what others left.

    Raises:
        OptionError: if not even the lowest precision fits.
    """

    def __init__(self, megabytes: float, subjects: Subjects, heads: int, tokens: Tokens) -> None:
        self.tokens, self.heads = tokens, heads * len(subjects)
        fixed = 200_000 + sum(len(image_uri(photo)) for photo in subjects.pictures)
        self.left = 0.75 * (1e6 * megabytes - fixed) - len(subjects) * heads * 1.1 * len(tokens)
        if not self.left >= self.heads * tokens.least:
            least = (self.heads * (tokens.least + 1.1 * len(tokens)) / 0.75 + fixed) / 1e6
            raise OptionError(
                f"{self.heads:,} maps of {len(tokens):,} tokens do not fit into {megabytes:g} megabytes: "
                f"give fewer images, fewer layers or at least {np.ceil(10 * least) / 10:g} megabytes"
            )

    def pack(self, pattern: Pattern, weights: Pattern | None) -> Packed:
        packed = pack(pattern, weights, self.tokens, self.left / self.heads)
        self.left -= len(packed.content)
        self.heads -= 1
        return packed


class _Looks:
    """What the heads of a model do on one image, layer by layer, with tokens in the order of the page."""

    def __init__(self, model: Model, image: Tensor, tokens: Tokens, rolls: bool) -> None:
        self.model, self.order, self.n_tokens = model, tokens.order, len(tokens)
        self.run = capture(model, image.to(model.device, model.dtype))
        self.rollout = np.eye(len(tokens), dtype=np.float32) if rolls else None

    @torch.no_grad()
    def at(self, place: int) -> Iterator[tuple[HeadRow, Pattern, Pattern | None]]:
        """Each attention of a stage: what it is, its pattern, and the sizes of values, `(head, key)`."""
        for part in attentions(self.model, place):
            reads = part.read(self.run.stream(place))
            pattern = self._arranged(part.pattern(reads)[0])
            if not np.isfinite(pattern).all():
                raise ModelError(
                    f"patterns of {part.nodes.name} are NaN: check the model's weights and the images"
                )
            pools = part.nodes.begins
            if not pools:
                self._roll(pattern)
            weights, gated = _weights(part, reads)
            row = HeadRow(_row_name(part), part.nodes.senders, pattern.shape[1] * pools, gated)
            yield row, pattern, None if weights is None else _array(weights)[:, self.order]

    def _arranged(self, pattern: Tensor) -> Pattern:
        found = _array(pattern)[:, :, self.order]
        return found[:, self.order] if found.shape[1] == self.n_tokens else found

    def _roll(self, pattern: Pattern) -> None:
        """One layer more of the rollout; signed patterns have none."""
        if self.rollout is None or (pattern < 0).any():
            self.rollout = None
            return
        mixed = pattern.mean(axis=0) + np.eye(self.n_tokens, dtype=np.float32)
        self.rollout = (mixed / mixed.sum(axis=1, keepdims=True)) @ self.rollout


def _weights(part: Stage, reads: Reads) -> tuple[Tensor | None, bool]:
    """The size of what each key's value adds, `(head, key)`, if any; and whether a gate comes after."""
    try:
        gated = part.gain(reads) is not None
        return part.expand(part.carried(reads))[:, 0].norm(dim=-1), gated
    except UnsupportedModelError:
        return None, False


def _first(pattern: Pattern, tokens: Tokens) -> Pattern:
    """What is shown at first, `(head, key)`: the class token's row; without one, or of latents, the mean."""
    own = tokens.prefix[:1] == ("cls",) and pattern.shape[1] == len(tokens)
    found: Pattern = pattern[:, 0] if own else pattern.mean(axis=1)
    return found


def _row_name(part: Stage) -> str:
    """What a row of the overview is called."""
    return "pool" if part.nodes.begins else f"layer {part.nodes.layer}"


def _array(values: Tensor) -> Pattern:
    return np.asarray(values.detach().float().cpu().numpy(), dtype=np.float32)
