"""Attention patterns, scores before the softmax, and value-weighted patterns of all heads of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.engine import capture
from circuitvit.errors import OptionError, unknown_name
from circuitvit.models import Model
from circuitvit.views.heads import attention_stage, spoken_of
from circuitvit.views.subjects import ImageSpec, Subjects, batches_of, images_of, subjects_of

if TYPE_CHECKING:
    from circuitvit.views.figures.canvas import Picture

KINDS = ("pattern", "scores", "weighted")
"""What can be shown: the pattern, the scores before the softmax, the value-weighted pattern."""


@dataclass(frozen=True, eq=False, repr=False)
class AttentionPatterns:
    """Where the heads of one layer look. All arrays are `(image, head, query, key)`, float32.

    Attributes:
        subjects: the images.
        layer: of the model.
        heads: names of the heads.
        pattern: after the softmax; each row sums to 1.
        scores: before it, in nats.
        weighted: length of what each key's value adds to the stream at each query, in units of the stream.
    """

    subjects: Subjects
    layer: int
    heads: tuple[str, ...]
    pattern: NDArray[np.float32]
    scores: NDArray[np.float32]
    weighted: NDArray[np.float32]

    def of_kind(self, kind: str) -> NDArray[np.float32]:
        """One of the three arrays by name.

        Raises:
            NameNotFoundError: if `kind` is none of `KINDS`.
        """
        if kind not in KINDS:
            raise unknown_name("kind of attention", kind, KINDS)
        found: NDArray[np.float32] = getattr(self, kind)
        return found

    def maps(self, query: int | tuple[int, int] = 0, kind: str = "pattern") -> NDArray[np.float32]:
        """What one query token sees: `(image, head, row, column)`.

        Args:
            query: a token by its place, 0 being the class token where there is one; or a patch by row and
                column.
            kind: one of `KINDS`.

        Raises:
            OptionError: if there is no such token.
        """
        token = self.token(query)
        return self.subjects.on_grid(self.of_kind(kind)[:, :, token])

    def token(self, query: int | tuple[int, int]) -> int:
        """The place of a query token, given by place or as a patch `(row, column)`."""
        rows, columns = self.subjects.grid
        if isinstance(query, tuple):
            row, column = query
            if not (0 <= row < rows and 0 <= column < columns):
                raise OptionError(f"there is no patch {query}: the grid has {rows} rows, {columns} columns")
            return self.subjects.n_prefix + row * columns + column
        if not 0 <= query < len(self.subjects.kinds):
            raise OptionError(f"there is no token {query}: there are {len(self.subjects.kinds)}, from 0")
        return query

    def figure(self, image: int = 0, **options: Any) -> Picture:
        """All heads of the layer over an image.

        See `circuitvit.views.figures.attention.draw`.
        """
        from circuitvit.views.figures.attention import draw

        return draw(self, image, **options)

    def __repr__(self) -> str:
        n_images, n_heads, n_tokens, _ = self.pattern.shape
        return f"AttentionPatterns(layer {self.layer}: {n_heads} heads, {n_tokens} tokens, {n_images} images)"


def attention_patterns(
    model: Model, images: ImageSpec, layer: int = -1, *, batch_size: int | None = None
) -> AttentionPatterns:
    """Patterns, scores and value-weighted patterns of all heads of a layer.

    They take `3 * heads * token^2 * 4` bytes an image: 1.4 MB for ViT-Ti/16, 5.6 MB for ViT-B/16.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        layer: of the model; negative ones count from the last.
        batch_size: images run at once.

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
    stage = model.stages[place]
    parts: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in KINDS}
    with torch.no_grad():
        for batch in batches_of(model, found, batch_size):
            reads = stage.read(capture(model, batch).stream(place))
            for kind, values in zip(
                KINDS, (stage.pattern(reads), stage.scores(reads), spoken_of(stage, reads)), strict=True
            ):
                parts[kind].append(values.float().cpu().numpy())
    return AttentionPatterns(
        subjects_of(model, found),
        stage.nodes.layer,
        stage.nodes.senders,
        *(np.concatenate(parts[kind]) for kind in KINDS),
    )
