"""What the nodes of a circuit do on one image: attention of heads, sizes of writes of MLPs and of the input.

Plain arrays, apart from any format: the interactive page packs them, static figures show thumbnails of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from circuitvit.engine.runs import capture
from circuitvit.errors import OptionError, UnsupportedModelError
from circuitvit.export.picture import thumb_size
from circuitvit.export.sheet import Sheet
from circuitvit.export.written import written
from circuitvit.graph import is_residual, node_of
from circuitvit.models import Model, Stage
from circuitvit.models.sentences import TextSpec
from circuitvit.models.sites import heads_of
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks import PreparedTask, Task, prepare

Array = NDArray[np.float64]

UNSEEN = 1e3
"""How far below its score a token is put that a piece of a head takes nothing from: its share is 0 then."""

LEAST = 1e-12
"""Of what is attended to, where an edit has taken it away: a logarithm of 0 cannot be drawn."""


@dataclass(frozen=True, eq=False)
class HeadMap:
    """One head on one image.

    Attributes:
        scores: `(query, key)`, scaled dot products before the softmax; where an edit changes the pattern, the
            logarithms of that, so that it is seen in shares.
        weights: `(key,)`, norm of what the head would write if it attended to this token alone, ||v W_O||
            (Kobayashi et al. 2020, arXiv:2004.10102); before its gate, if it has one.
    """

    scores: Array
    weights: Array

    @property
    def pattern(self) -> Array:
        """`(query, key)`: the softmax of the scores over keys."""
        powers = np.exp(self.scores - self.scores.max(axis=1, keepdims=True))
        pattern: Array = powers / powers.sum(axis=1, keepdims=True)
        return pattern

    def row(self, of_class_token: bool) -> Array:
        """`(key,)`: the pattern of the class token, or without one the average over all queries."""
        row: Array = self.pattern[0] if of_class_token else self.pattern.mean(axis=0)
        return row


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two images of a pair.

    Attributes:
        image: `(height, width, 3)`, 8-bit colours as the model sees them; of a clip a strip of its frames.
        heads: by name.
        writes: `(token,)`, norm of what the input, each MLP and each head without scores (a differential one)
            add to the stream, by name.
        units: `(token,)`, how active each neuron and each feature is, by name.
        words: of a sentence what its tokens say; () of an image.
    """

    image: NDArray[np.uint8]
    heads: Mapping[str, HeadMap]
    writes: Mapping[str, Array]
    units: Mapping[str, Array] = field(default_factory=dict)
    words: tuple[str, ...] = ()

    def patches(self, node: str, maps: Maps) -> Array | None:
        """`(row, column)`: what a node's thumbnail shows, or None for a node without one."""
        if node in self.heads:
            values = self.heads[node].row(maps.has_class_token)
        elif node in self.units:
            values = self.units[node]
        elif node in self.writes:
            values = self.writes[node]
        else:
            return None
        patches: Array = values[len(maps.prefix) :].reshape(maps.grid)  # in the order of the sheet already
        return patches


@dataclass(frozen=True, eq=False)
class Maps:
    """Both images of a pair, with what every node does on them.

    Patches are in the order in which they lie on paper, row by row: of a clip not the order of its tokens.

    Attributes:
        sheet: how the patches lie there.
        prefix: kinds of the tokens before the patches.
        groups: the token group of each token by its place, or () where there is one group.
        sides: "clean", and "corrupt" where the task has counterfactuals.
    """

    sheet: Sheet
    prefix: tuple[str, ...]
    groups: tuple[int, ...]
    sides: Mapping[str, Side]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches on paper."""
        return self.sheet.shape

    @property
    def has_class_token(self) -> bool:
        return self.prefix[:1] == ("cls",)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the nodes that have a map."""
        side = next(iter(self.sides.values()))
        return (*side.heads, *side.units, *side.writes)


def maps_of(
    model: Model, task: Task | PreparedTask, pair: int = 0, nodes: Collection[str] | None = None
) -> Maps:
    """Run the model plainly on the two images of a pair and keep what its nodes do.

    Args:
        model: the circuit's.
        task: whose images are looked at.
        pair: which of its pairs.
        nodes: only these; all by default.

    Raises:
        OptionError: if there is no such pair.
        DataError: if the patches form no grid.

    Example:
        >>> import circuitvit as cv
        >>> task = cv.Task(torch.zeros(1, 3, 48, 48), metric=cv.logit(0), ablation="zero")
        >>> maps_of(cv.load("catdog-tiny"), task).grid
        (6, 6)
    """
    prepared = prepare(model, task)
    if not 0 <= pair < len(prepared):
        raise OptionError(f"pair is 0 to {len(prepared) - 1}, the places of the task's pairs, not {pair}")
    first, stop = (pair, pair + 1) if model.edited_images is None else (0, len(prepared))  # all or none
    images = {"clean": prepared.clean.take(first, stop)}
    if prepared.corrupt is not None:
        images["corrupt"] = prepared.corrupt.take(first, stop)
    sheet = Sheet(model.grid_at(*images["clean"].shape[-2:]))
    before = len(model.prefix)
    order = np.concatenate([np.arange(before), before + sheet.order])
    sides = {name: _side(prepared, own, pair - first, nodes, sheet, order) for name, own in images.items()}
    groups = _groups(prepared, pair)
    return Maps(sheet, model.prefix, tuple(groups[token] for token in order) if groups else (), sides)


def _side(
    prepared: PreparedTask,
    images: Tensor,
    place: int,
    nodes: Collection[str] | None,
    sheet: Sheet,
    order: NDArray[np.int64],
) -> Side:
    model, image = prepared.model, images[place]
    base = capture(model, images.to(model.device, model.dtype))
    heads: dict[str, HeadMap] = {}
    units: dict[str, Array] = {}
    writes: dict[str, Array] = {}
    for at, stage in enumerate(model.stages):
        if stage.is_readout:
            continue
        for part, compact in zip(stage.branches, stage.split(base.compacts[at]), strict=True):
            every = {} if part.nodes.kind != "attention" else _attention(part, base.stream(at), place, order)
            heads.update({name: own for name, own in every.items() if nodes is None or name in nodes})
            if not is_residual(part.nodes.writes_to):  # latents have no place on the image
                continue
            for name, added in zip(part.nodes.senders, part.expand(compact)[:, place], strict=True):
                if name in every or (nodes is not None and name not in nodes):
                    continue
                if (direction := part.direction(name)) is None:
                    writes[name] = _array(added.norm(dim=-1))[order]
                else:
                    units[name] = _array(added @ per_unit(direction))[order]
    return Side(picture_on(sheet, image, prepared.spec), heads, writes, units, words_of(image, prepared.spec))


def per_unit(direction: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """What to multiply a unit's write with to have its activation again; 0 of one that writes nothing."""
    size = direction.square().sum()
    return direction / size if size > 0 else torch.zeros_like(direction)


@torch.no_grad()
def _attention(stage: Stage, stream: Tensor, place: int, order: NDArray[np.int64]) -> dict[str, HeadMap]:
    """The heads of a stage by name, and pieces of them by the tokens they look at; none without scores."""
    reads = stage.read(stream)
    try:
        scores = _seen(stage.scores(reads)[place], stage.pattern(reads)[place])
        alone = stage.expand(stage.carried(reads))[:, place]
    except UnsupportedModelError:
        return {}
    if stage.nodes.begins:  # a pool asks for all tokens alike, whichever of them is looked at
        mean = _array(stage.pattern(reads)[place].mean(dim=1, keepdim=True).log())
        scores = mean.repeat(mean.shape[2], axis=1)
    scores = scores[:, order][:, :, order]
    found = {}
    for head, name in enumerate(heads_of(stage)):
        pieces = _pieces(stage, name)
        weights = _array(alone[list(pieces.values())].sum(dim=0).norm(dim=-1))[order]
        found[name] = HeadMap(scores[head], weights)
        for piece in pieces:
            sources = stage.sources(piece)
            if sources is not None:
                own = (sources if sources.ndim == 1 else sources[place]).cpu().numpy()[order]
                found[piece] = HeadMap(scores[head] - UNSEEN * ~own, weights * own)
    return found


def _pieces(stage: Stage, head: str) -> dict[str, int]:
    """The senders of a head by their places: itself, or its pieces."""
    nodes = stage.nodes
    own = next(place for place, receiver in enumerate(nodes.receivers) if node_of(receiver) == head)
    return {nodes.senders[place]: place for place in (nodes.feeds or ())[own]}


def _seen(scores: Tensor, pattern: Tensor) -> Array:
    """What a pattern is the softmax of: the scores, or where it is edited its logarithms."""
    own = torch.allclose(scores.softmax(dim=-1), pattern, atol=1e-5)
    return _array(scores if own else pattern.clamp(min=LEAST).log())


def _array(values: Tensor) -> Array:
    return np.asarray(values.detach().double().cpu().numpy(), dtype=np.float64)


def _groups(prepared: PreparedTask, pair: int) -> tuple[int, ...]:
    if prepared.groups is None:
        return ()
    members = prepared.groups.members
    chosen: list[Any] = (members[pair] if members.ndim == 2 else members).tolist()
    return tuple(chosen)


def words_of(image: Float[Tensor, "*shape"], spec: InputSpec) -> tuple[str, ...]:
    """What the tokens of a sentence say; nothing for an image."""
    return tuple(spec.words(image)) if isinstance(spec, TextSpec) else ()


def picture_on(sheet: Sheet, image: Float[Tensor, "*shape"], spec: InputSpec) -> NDArray[np.uint8]:
    """A preprocessed image, a clip as a strip of frames, or a sentence as its words, as people see it,
    `(height, width, 3)`.
    """
    if isinstance(spec, TextSpec):
        return written(spec.words(image), sheet.shape)
    if image.ndim == 3:
        return as_picture(image, spec)
    frames = np.stack([as_picture(image[place], spec) for place in sheet.shown(len(image))])
    return np.moveaxis(sheet.tile(np.moveaxis(frames, -1, 0)), 0, -1)


def as_picture(image: Float[Tensor, "channel height width"], spec: InputSpec) -> NDArray[np.uint8]:
    """A preprocessed image as people see it, `(height, width, 3)`; other than 3 channels become grey."""
    mean, std = (np.array(values, dtype=np.float64)[:, None, None] for values in (spec.mean, spec.std))
    pixels = np.moveaxis(_array(image) * std + mean, 0, -1)
    if pixels.shape[-1] != 3:
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    return np.asarray(np.clip(np.rint(255 * pixels), 0, 255), dtype=np.uint8)


# -- heat maps: patch values as colours over a dimmed image, for thumbnails in figures and in the page ----

RAMP = (
    (13, 8, 53),
    (84, 18, 110),
    (155, 35, 100),
    (212, 72, 66),
    (245, 125, 21),
    (250, 194, 40),
    (252, 255, 164),
)
"""Dark to light in even steps of lightness, so that it is read alike in print and by the colour-blind."""

CUT = 0.97  # the ramp ends at this quantile of the patches
LEAST_CUT = 0.25  # but not below this share of the largest value
LEAST_TIMES_MEAN = 3.0  # for attention, nor below this many times the mean

_SIDE = 92  # pixels of a square heat map


def heat(
    image: NDArray[np.uint8],
    patches: Array,
    size: tuple[int, int] = (_SIDE, _SIDE),
    least_end: float = 0.0,
    inked: bool = False,
) -> NDArray[np.uint8]:
    """`(height, width, 3)`: patch values `(row, column)` as colours over the image in dark grey.

    Large values are opaque and at the light end of the ramp; 0 and below show the image alone. The ramp ends
    at the 97th percentile, though not below a quarter of the largest value: a few patches of Vision
    Transformers have values far above all others (Darcet et al. 2024, arXiv:2309.16588), which would leave
    the rest in the dark. It also does not end below `least_end`. `size` is (width, height). Where the image
    is `inked`, black on white, its ink stays on top.

    Example:
        >>> blank = np.zeros((8, 8, 3), dtype=np.uint8)
        >>> heat(blank, np.array([[0.0, 1.0]]), size=(4, 4))[0, :, 0].tolist()
        [0, 0, 252, 252]
    """
    grey = Image.fromarray(image).convert("L").resize(size, Image.Resampling.BOX)
    base = np.repeat(0.55 * np.asarray(grey, dtype=np.float64)[:, :, None], 3, axis=2)
    end = max(float(np.quantile(patches, CUT)), LEAST_CUT * float(patches.max()), least_end)
    share = np.clip(patches / end, 0, 1) if end > 0 else np.zeros_like(patches)
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(size[::-1], share.shape, strict=True)
    )
    share = share[rows][:, columns]
    stops = np.linspace(0, 1, len(RAMP))
    colours = np.stack([np.interp(share, stops, [stop[i] for stop in RAMP]) for i in range(3)], axis=-1)
    opacity = np.minimum(1, share**0.6)[:, :, None]
    mixed = base * (1 - opacity) + colours * opacity
    if inked:
        mixed *= np.asarray(grey, dtype=np.float64)[:, :, None] / 255
    return np.asarray(np.rint(mixed), dtype=np.uint8)


def thumbnails(maps: Maps, image: str = "clean") -> dict[str, NDArray[np.uint8]]:
    """A small heat map for every node that has a map.

    Args:
        maps: of the nodes.
        image: whose: "clean" or "corrupt".

    Raises:
        OptionError: if there is no such image.
    """
    if image not in maps.sides:
        raise OptionError(f"image is {' or '.join(map(repr, maps.sides))}, not {image!r}")
    side, found = maps.sides[image], {}
    width, height = thumb_size(maps.grid)
    size = round(2 * width), round(2 * height)  # twice what it is drawn at, for sharp print
    for node in maps.nodes:
        patches = side.patches(node, maps)
        if patches is None:
            continue
        if node in side.heads:  # attention that is spread evenly shall look dull, not bright
            least = LEAST_TIMES_MEAN * float(patches.mean())
            found[node] = heat(side.image, patches, size, least, bool(side.words))
        elif node in side.units:
            found[node] = heat(side.image, patches.clip(min=0), size, inked=bool(side.words))
        else:  # norms are never near 0, so they are shown from the least one up
            found[node] = heat(side.image, patches - patches.min(), size, inked=bool(side.words))
        for place in range(1, maps.sheet.across):  # a hair between the frames of a clip
            found[node][:, place * size[0] // maps.sheet.across] = 128
    return found
