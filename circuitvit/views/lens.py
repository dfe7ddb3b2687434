"""The logit lens: what class would each token be, if the model stopped here?

Every position of the residual stream, of every token, is put through the model's own final norm and
classifier. nostalgebraist 2020, "interpreting GPT: the logit lens"; for Vision Transformers Vilas et al.
2023, "Analyzing Vision Transformers for Image Classification in Class Embedding Space", arXiv:2310.18969;
as a picture, Joseph and Nanda 2024, "Laying the Foundations for Vision and Multimodal Mechanistic
Interpretability".

A model was trained to read one token (or a pooled one) at the last layer only. What the lens shows of other
tokens and of early layers is a projection, not a prediction that the model makes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture, run_from
from circuitvit.errors import ModelError, NameNotFoundError, OptionError, counted, unknown_name
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import INK, MUTED
from circuitvit.export.written import is_written
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.sites import BESIDE
from circuitvit.tasks.classes import ClassSpec, class_indices, class_label
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches
from circuitvit.views.symbols import as_page, as_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuitvit.views.canvas import Picture

Detail = Literal["layer", "stage"]

MOST_PANELS = 6

OTHER = "#B4BAC2"
"""The colour of classes that have none of their own."""

ROOM_FOR_TEXT = 160
"""Cells are written in only where a panel has at most this many, else their text would be too small."""


class StreamMaps(Protocol):
    """What is done to the stream before it is read, at each position: `circuitvit.views.TunedLens`."""

    def check(self, model: Model, positions: Sequence[str]) -> None:
        """Refuse a model, or positions, that the maps were not made for."""

    def mapped(self, position: str, stream: Tensor) -> Tensor:
        """The stream `(image, token, d_model)` as it would look at the end."""


@dataclass(frozen=True, eq=False, repr=False)
class LogitLens(Result):
    """Class logits of every token at every position of the residual stream.

    Attributes:
        subjects: the images.
        positions: names of the positions: "embedding", then "layer 0" and so on, or the stages' names.
        classes: the classes whose logits were kept, as indices.
        logits: `(position, image, token, class)`, float32; the last axis runs over `classes`.
        pooled: `(position, image, class)`: what the model's whole readout, pooling included, makes of the
            position; at the last one these are the model's own logits.
        top: `(position, image, token)`: each token's top class among all of the model's, int64.
        confidence: `(position, image, token)`: its probability, 0 to 1.
        pooled_top: `(position, image)`: the top class of the whole readout.
        pooled_confidence: `(position, image)`: its probability.
        labels: short names of all classes that occur in `classes`, `top` and `pooled_top`.
        title: what to call the lens in figures: "Logit lens", or "Tuned lens".
    """

    subjects: Subjects
    positions: tuple[str, ...]
    classes: tuple[int, ...]
    logits: Float[NDArray[np.float32], "position image token class"]
    pooled: Float[NDArray[np.float32], "position image class"]
    top: Int64[NDArray[np.int64], "position image token"]
    confidence: Float[NDArray[np.float32], "position image token"]
    pooled_top: Int64[NDArray[np.int64], "position image"]
    pooled_confidence: Float[NDArray[np.float32], "position image"]
    labels: Mapping[int, str]
    title: str = "Logit lens"

    along = "subjects:image positions:position classes:class"

    def records(self) -> Iterator[Record]:
        """One row for each `position`, `image` and `token` ("readout" for the model's whole readout): the
        `top_class` by its short name, and its probability, `confidence`."""
        images, tokens = self.subjects.axes_of_tokens.values()
        for names, top, confidence in (
            (tokens, self.top, self.confidence),
            (("readout",), self.pooled_top[..., None], self.pooled_confidence[..., None]),
        ):
            axes = {"position": self.positions, "image": images, "token": names}
            for row in cells(axes, top_class=top, confidence=confidence):
                yield {**row, "top_class": self.labels.get(int(row["top_class"] or 0), str(row["top_class"]))}

    def _check(self) -> None:
        self.subjects.check_tokens(self.top.shape[2])

    def position(self, wanted: int | str) -> int:
        """The place of a position by name or number; negative numbers count from the last.

        Raises:
            NameNotFoundError: for an unknown name.
            OptionError: for a number out of range.
        """
        return position_index(self.positions, wanted)

    def of_class(self, index: int) -> NDArray[np.float32]:
        """The logits of one class by its index, `(position, image, token)`.

        Raises:
            NameNotFoundError: if its logits were not kept.
        """
        if index not in self.classes:
            raise NameNotFoundError(f"the lens kept no logits of class {index}: name it in classes=")
        return self.logits[..., self.classes.index(index)]

    def top_on_grid(self, position: int | str = -1) -> NDArray[np.int64]:
        """Each patch's top class at a position, `(image, row, column)`; of clips with time before rows."""
        return self.subjects.on_grid(self.top[self.position(position)])

    def table(
        self, image: int = 0, position: int | str = -1, symbols: Mapping[int, str] | None = None
    ) -> list[list[str]]:
        """The top class of each patch as rows of symbols; frames of a clip side by side.

        Args:
            image: which.
            position: by name or number.
            symbols: a symbol for each class index, such as an emoji (see `class_symbols`); the class's short
                name where it has none.
        """
        grid = self.subjects.on_sheet(self.top[self.position(position), self.subjects.index(image)])
        return [[(symbols or {}).get(int(cell), self.labels[int(cell)]) for cell in row] for row in grid]

    def to_text(
        self, image: int = 0, position: int | str = -1, symbols: Mapping[int, str] | None = None
    ) -> str:
        """The table as lines of text, columns aligned, emoji counted as two columns wide."""
        return as_text(self.table(image, position, symbols))

    def to_html(
        self,
        image: int = 0,
        positions: Sequence[int | str] | None = None,
        symbols: Mapping[int, str] | None = None,
        picture: bool = True,
    ) -> str:
        """A page without scripts: a table of symbols over the image, for each position.

        Args:
            image: which.
            positions: which; all by default.
            symbols: as in `table`.
            picture: whether the image lies behind the table, inside the page.
        """
        row = self.subjects.index(image)
        tables = [
            (
                self.positions[each],
                self.table(row, each, symbols),
                self.subjects.on_sheet(self.confidence[each, row]),
            )
            for each in map(self.position, positions or range(len(self.positions)))
        ]
        behind = self.subjects.pictures[row] if picture else None
        return as_page(f"{self.title} of {self.subjects.names[row]}", tables, behind)

    def figure(
        self,
        image: int = 0,
        *,
        positions: Sequence[int | str] | None = None,
        symbols: Mapping[int, str] | None = None,
        picture: bool = True,
    ) -> Picture:
        """A panel for each position: patches coloured by their top class, stronger where it is more probable.

        The eight classes of most patches have colours of their own, later positions counting more.

        Args:
            image: which.
            positions: which; by default six from the embedding to the end.
            symbols: a short text for each class; classes of one symbol are one to the figure, so that a
                hundred breeds can all be "dog". It is written into the patches where the font has it:
                matplotlib cannot draw colour emoji, which `to_html` shows.
            picture: whether the image lies behind.

        Raises:
            NameNotFoundError, OptionError: if there is no such image or position.
        """
        from circuitvit.views import canvas

        row = self.subjects.index(image)
        chosen = [self.position(each) for each in (self._spread() if positions is None else positions)]
        grids = [np.array(self.table(row, place, symbols), dtype=object) for place in chosen]
        wanted = _most_frequent(grids)[: len(canvas.PALETTE)]
        colours = dict(zip(wanted, canvas.PALETTE, strict=False))
        sheet = self.subjects.sheet
        across = min(len(chosen), 3 if len(chosen) <= 6 else 4) if sheet.frames == 1 else 1
        wide, high = canvas.proportions(sheet, 2.5, 9.0)
        with canvas.styled():
            size = max(wide * across, 5.0), (high + 0.25) * -(-len(chosen) // across) + 0.75
            figure = canvas.blank(*size, f"{self.title}, {self.subjects.names[row]}")
            axes = canvas.panels(figure, len(chosen), across)
            for axis, place, grid in zip(axes, chosen, grids, strict=True):
                shares = self.subjects.on_sheet(self.confidence[place, row])
                behind = self.subjects.pictures[row] if picture else None
                _draw_panel(axis, grid, shares, colours, behind, set((symbols or {}).values()), sheet)
                top, sure = self.labels[int(self.pooled_top[place, row])], self.pooled_confidence[place, row]
                axis.set_title(self.positions[place], loc="left", fontweight="bold")
                axis.set_xlabel(f"readout: {canvas.label(top, 26)} {sure:.0%}", color=MUTED)
            handles = [
                canvas.Patch(color=colours[name], label=self._legend_name(name, symbols)) for name in wanted
            ]
            if not all(np.isin(grid, wanted).all() for grid in grids):
                handles.append(canvas.Patch(color=OTHER, label="another class"))
            figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)),
                          frameon=False, handlelength=1.0, columnspacing=1.4)  # fmt: skip
        return figure

    def curve_figure(self, image: int = 0, *, classes: Sequence[int] | None = None) -> Picture:
        """The logit at the readout, and the share of patches whose top class it is, of some classes by layer.

        Args:
            image: which.
            classes: by default the four that the last position ranks highest; the lens must have kept them.

        Raises:
            NameNotFoundError, OptionError: if there is no such image, or a class was not kept.
        """
        from circuitvit.views import canvas

        row = self.subjects.index(image)
        last = np.argsort(-self.pooled[-1, row], kind="stable")
        steps = range(len(self.positions))
        look: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1.2}
        with canvas.styled():
            figure = canvas.blank(6.6, 2.9, f"{self.title} along the layers, {self.subjects.names[row]}")
            left, right = figure.subplots(1, 2)
            for index, colour in zip(
                classes or [self.classes[place] for place in last[:4]], canvas.PALETTE, strict=False
            ):
                self.of_class(index)  # says so if it was not kept
                share = self.subjects.on_sheet(self.top[:, row] == index).mean(axis=(1, 2))
                left.plot(steps, self.pooled[:, row, self.classes.index(index)], color=colour, **look)
                right.plot(steps, share, color=colour, label=canvas.label(self.labels[index], 28), **look)
            names = ["E" if name == "embedding" else name.removeprefix("layer ") for name in self.positions]
            for axes, title in (
                (left, "logit at the readout"),
                (right, "share of patches with this top class"),
            ):
                axes.set_title(title)
                axes.set_xticks(steps, names, rotation=0)
                axes.grid(axis="y", color="#E5E7EB", linewidth=0.5)
                axes.set_xlabel("after layer (E: embedding)")
            right.set_ylim(bottom=0)
            figure.legend(loc="outside lower center", ncols=4, frameon=False)
        return figure

    def _spread(self) -> list[int]:
        """Positions from the embedding to the end, as many as a figure has room for."""
        last = len(self.positions) - 1
        return [round(place) for place in np.linspace(0, last, min(last + 1, MOST_PANELS))]

    def _legend_name(self, name: str, symbols: Mapping[int, str] | None) -> str:
        """What the legend calls a symbol: itself, or some of its classes where the font lacks it."""
        from circuitvit.views import canvas

        inside: list[str] = []
        if not canvas.drawable(name):
            counts = Counter(self.top[-1].ravel().tolist())  # those of most patches at the end come first
            ranked = sorted(self.labels, key=lambda index: (-counts[index], index))
            inside = [self.labels[index] for index in ranked if (symbols or {}).get(index) == name]
        return canvas.label(", ".join(inside[:2]) + (", ..." if len(inside) > 2 else "") or name, 30)

    def __repr__(self) -> str:
        n_images, n_tokens = self.top.shape[1:]
        return f"LogitLens({len(self.positions)} positions, {n_tokens} tokens, {counted(n_images, 'image')})"


@running
def logit_lens(
    model: Model,
    images: ImageSpec,
    *,
    detail: Detail = "layer",
    classes: ClassSpec | None = None,
    tuned: StreamMaps | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> LogitLens:
    """The model's final norm and classifier at every position of the residual stream.

    All logits of an ImageNet ViT at 197 tokens and 13 positions take 10 MB an image; name `classes` to keep
    fewer for many images.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        detail: "layer" for the embedding and the end of each layer, "stage" also after each attention.
        classes: those whose logits are kept, a set or a group; all by default. The top class is always that
            among all.
        tuned: a tuned lens of this model, whose maps are applied first, to every token alike.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown class.
        OptionError: for an unknown detail, a model without classes, or a tuned lens of another model.
        DataError: for images that cannot be used.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> lens = logit_lens(cv.load("catdog-tiny"), catdog_pairs(1, seed=0).clean)
        >>> lens.positions[0], lens.positions[-1], lens.top_on_grid().shape
        ('embedding', 'layer 3', (1, 6, 6))
    """
    refuse_without_classes(model)
    places = positions_of(model, detail)
    if tuned is not None:
        tuned.check(model, tuple(places.values()))
    found = images_of(model, images)
    columns = list(range(model.n_logits) if classes is None else class_indices(model, classes))
    batches = watched_batches(model, found, batch_size, "lens", progress)
    parts = [_looked(model, batch, places, columns, tuned) for batch in batches]
    logits, pooled, top, confidence, pooled_top, pooled_confidence = (
        np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)
    )
    if not np.isfinite(confidence[-1]).all():
        row = int(np.argwhere(~np.isfinite(confidence[-1]).all(axis=-1))[0, 0])
        raise ModelError(
            f"the model gives NaN or infinite logits on {found.names[row]}: check its weights and the image"
        )
    seen = sorted({*columns, *np.unique(top).tolist(), *np.unique(pooled_top).tolist()})
    return LogitLens(
        subjects_of(model, found),
        tuple(places.values()),
        tuple(columns),
        logits,
        pooled,
        top,
        confidence,
        pooled_top,
        pooled_confidence,
        {index: class_label(model, index) for index in seen},
        "Logit lens" if tuned is None else "Tuned lens",
    )


def refuse_without_classes(model: Model) -> None:
    """Refuse a model whose outputs are features.

    Raises:
        OptionError: saying how to put a classifier on it.
    """
    if not model.has_classes:
        how = "put a classifier on its features with cv.fit_head or cv.with_head"
        if model.words is not None:
            how = "give it sentences for classes with model.with_prompts"
        raise OptionError(f"{model.name} has no classes, so no token can be seen as one: {how}")


def positions_of(model: Model, detail: Detail) -> dict[int, str]:
    """The stages before which the stream is looked at, with the names of those positions.

    Raises:
        OptionError: for an unknown detail.
    """
    if detail not in ("layer", "stage"):
        raise OptionError(f"the detail of a lens is 'layer' or 'stage', not {detail!r}")
    # An edit of the stream, or a dictionary of it, is a stage of its own: what is looked at is what
    # the next one reads.
    places = [place for place in range(1, model.reading + 1) if model.stages[place].nodes.kind not in BESIDE]
    named = {places[0]: "embedding"}
    for last, place in pairwise(places):
        before, here = model.stages[last].nodes, model.stages[place].nodes
        if detail == "stage":
            named[place] = before.name
        elif before.layer != here.layer:
            named[place] = before.block
    return named


def position_index(names: Sequence[str], wanted: int | str) -> int:
    """The place of a position among others by name or number; negative numbers count from the last.

    Raises:
        NameNotFoundError: for an unknown name.
        OptionError: for a number out of range.
    """
    if isinstance(wanted, str):
        if wanted not in names:
            raise unknown_name("position", wanted, names)
        return names.index(wanted)
    if not -len(names) <= wanted < len(names):
        raise OptionError(f"there is no position {wanted}: the lens has {len(names)}, from 0")
    return wanted % len(names)


def token_logits(model: Model, stream: Tensor) -> Float[Tensor, "image token class"]:
    """Each token's own logits, from the readout of a stream in which every token is this one.

    That serves any way of pooling: the mean, the maximum and the first of equal tokens are that token, and
    whatever the queries of a pool, it finds that token's values alone.
    Distilled models read two tokens with a classifier each, and get the mean of both.
    """
    n_images, n_tokens, width = stream.shape
    copies = len(model.prefix) + 1
    repeated = stream.reshape(n_images * n_tokens, 1, width).expand(-1, copies, -1)
    return _read(model, repeated).view(n_images, n_tokens, -1)


# -- inside --------------------------------------------------------------------------------------


@torch.no_grad()
def _looked(
    model: Model,
    images: Tensor,
    places: Mapping[int, str],
    columns: list[int],
    tuned: StreamMaps | None,
) -> Iterator[NDArray[Any]]:
    """Arrays with the position first and the image second, in the order of the fields of `LogitLens`."""
    run = capture(model, images)
    found: list[tuple[Tensor, ...]] = []
    for place, name in places.items():
        stream = run.stream(place)
        if tuned is not None:
            stream = tuned.mapped(name, stream)
        logits, pooled = token_logits(model, stream), _read(model, stream)
        best, best_pooled = logits.softmax(dim=-1).max(dim=-1), pooled.softmax(dim=-1).max(dim=-1)
        found.append((logits[..., columns], pooled[..., columns], best.indices, best.values,
                      best_pooled.indices, best_pooled.values))  # fmt: skip
    return iter([torch.stack(each).cpu().numpy() for each in zip(*found, strict=True)])


def _read(model: Model, stream: Tensor) -> Float[Tensor, "image class"]:
    return run_from(model, model.reading, stream).float()


# -- the figure ----------------------------------------------------------------------------------


def _draw_panel(
    axes: Axes,
    grid: NDArray[np.object_],
    shares: NDArray[np.float32],
    colours: Mapping[str, str],
    picture: NDArray[np.uint8] | None,
    written: set[str],
    sheet: Sheet,
) -> None:
    """The names `(row, column)` of one position as colours, and as text where it fits."""
    from circuitvit.views import canvas

    # Probabilities of 1000 classes are small far into the model: the root keeps them visible.
    strength = 0.2 + 0.5 * np.sqrt(np.clip(shares, 0, 1))
    cells = [
        [
            canvas.to_rgba(colours.get(name, OTHER), each if name in colours else 0.5 * each)
            for name, each in zip(*line, strict=True)
        ]
        for line in zip(grid, strength, strict=True)
    ]
    canvas.overlay(axes, np.array(cells), picture, sheet=sheet)
    rows, columns = grid.shape
    if picture is not None and is_written(picture, grid.shape):
        return  # the words of the sentence stand there
    if not written and rows * columns <= ROOM_FOR_TEXT:
        written = set(colours)
    fonts = {name for name in written.intersection(colours) if canvas.drawable(name)}
    for (row, column), name in np.ndenumerate(grid):
        if name in fonts:
            text = canvas.label(name, 99)[: 3 if columns > 8 else 5]
            drawn = axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", clip_on=True)
            drawn.set(fontsize=min(7.0, 80.0 / columns), color=INK, path_effects=canvas.HALO)


def _most_frequent(grids: Sequence[NDArray[np.object_]]) -> list[str]:
    """The names of most patches, later positions counting more: early ones are all noise."""
    votes: Counter[str] = Counter()
    for place, grid in enumerate(grids):
        for name in grid.ravel():
            votes[name] += (place + 1) ** 2
    return sorted(votes, key=lambda name: (-votes[name], name))
