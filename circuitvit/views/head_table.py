"""What kind of head is it? Every head against every kind: looks at a match, at a place, at a kind of token.

**Repeated patches.** In an image of random patches a block of them is copied to a second place that comes
later in reading order; nothing else in the image is alike. A query is a patch of the second copy, its *twin*
the patch of the first copy that looks the same.

| kind | the key that is looked at |
| --- | --- |
| `same patch` | the twin: a duplicate head |
| `induction` | the patch after the twin (right of it): what followed an earlier match |
| `induction left`, `induction above`, `induction below` | the other neighbours of the twin |
| `same context` | of queries around the second copy: the patch at the same place beside the first |

A pair of the same context looks different: only what is beside it is alike. What a head does by position it
does without the repetition as well. So the *control* is the same query and key on the same image with fresh
patches in place of the first copy.

**Places and tokens.** On ordinary images: the patch itself, its neighbours, corners, edges, the class token,
registers. Here the control is a head that looks everywhere alike. What each head has to do with position in
general is asked of `position_heads`.

Induction heads: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Olsson et al. 2022,
"In-context Learning and Induction Heads", arXiv:2209.11895. Duplicate heads: Wang et al. 2023,
"Interpretability in the Wild", arXiv:2211.00593.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.stats import t as student
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture, progress_bar
from circuitvit.errors import DataError, ModelError, OptionError, UnsupportedModelError, unknown_name
from circuitvit.export.style import MUTED
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, Stage
from circuitvit.models.stages import Reads
from circuitvit.tasks.images import Images, TensorImages
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.tasks.task import batches_of
from circuitvit.views.attention import attention_places, attentions
from circuitvit.views.position import PositionHeads, position_heads, templates
from circuitvit.views.repeated import Look, repeated_patches
from circuitvit.views.subjects import ImageSpec, Subjects, images_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

PLACES = ("self", "previous", "next", "above", "below", "corners", "edges")
"""Kinds of `circuitvit.views.position.templates`; those of tokens before the patches come after them."""


class KindScore(NamedTuple):
    """How far one head is of one kind; see `HeadKinds` for units."""

    head: str
    kind: str
    attention: float
    control: float
    low: float
    high: float
    preference: float


@dataclass(frozen=True, eq=False, repr=False)
class HeadKinds(Result):
    """Every head against every kind. Arrays are `(head, kind)`, float64; NaN where a kind cannot be asked.

    Attributes:
        heads: names, in running order.
        layers: of the model, one for each head.
        kinds: names, see the top of this module.
        attention: share of a query's attention that falls on the kind's keys, 0 to 1, mean.
        control: the same without the repetition; of places and tokens what looking everywhere alike gives.
        low: lower end of the 95 % interval (t, over images) of attention minus control.
        high: upper end.
        preference: before the softmax, in nats: score of those keys over the query's mean score, for
            repeated patches less the same without the repetition; NaN where heads have no scores.
        spread: entropy of the patterns as a share of the most there can be, `(head,)`; 1 is uniform.
        positions: what each head has to do with position.
        natural: whether the repeated patches were cut out of images; else they are noise.
    """

    heads: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    attention: Float[NDArray[np.float64], "head kind"]
    control: Float[NDArray[np.float64], "head kind"]
    low: Float[NDArray[np.float64], "head kind"]
    high: Float[NDArray[np.float64], "head kind"]
    preference: Float[NDArray[np.float64], "head kind"]
    spread: Float[NDArray[np.float64], " head"]
    positions: PositionHeads
    natural: bool

    along = "heads:head layers:head kinds:kind"
    may_be_nan = "attention control low high preference spread"

    def records(self) -> Iterator[Record]:
        """One row for each `head` and `kind`: `attention`, `control`, the ends `low` and `high` of the
        interval of their difference, and `preference`; NaN where the kind cannot be asked."""
        names = ("attention", "control", "low", "high", "preference")
        figures = {name: getattr(self, name) for name in names}
        return cells({"head": self.heads, "kind": self.kinds}, **figures)

    @property
    def excess(self) -> NDArray[np.float64]:
        """Attention minus control `(head, kind)`."""
        return self.attention - self.control

    @property
    def caveats(self) -> tuple[str, ...]:
        """What should not be read into the numbers."""
        found = ["where a head looks is not what it does: knock the attention out to see what hangs on it"]
        if not self.natural:
            found.append("patches of noise are like no photograph: give images to cut patches out of them")
        return tuple(found)

    def only(self, kind: str, at_least: float = 0.1) -> list[KindScore]:
        """The heads of a kind, the surest first: the interval of attention minus control lies above this.

        Raises:
            NameNotFoundError: if there is no such kind.
        """
        column = self._column(kind)
        order = np.argsort(-self.excess[:, column], kind="stable")
        return [self[int(row), column] for row in order if self.low[row, column] >= at_least]

    def __getitem__(self, place: tuple[int | str, int | str]) -> KindScore:
        """By head and kind, each by name or number: `kinds["a5.h2", "induction"]`."""
        head, kind = place
        row = self._row(head) if isinstance(head, str) else head
        column = self._column(kind) if isinstance(kind, str) else kind
        arrays = (self.attention, self.control, self.low, self.high, self.preference)
        return KindScore(
            self.heads[row], self.kinds[column], *(float(values[row, column]) for values in arrays)
        )

    def _row(self, head: str) -> int:
        if head not in self.heads:
            raise unknown_name("head", head, self.heads)
        return self.heads.index(head)

    def _column(self, kind: str) -> int:
        if kind not in self.kinds:
            raise unknown_name("kind of head", kind, self.kinds)
        return self.kinds.index(kind)

    def figure(self, kinds: Sequence[str] | None = None, *, top: int = 3) -> Picture:
        """A map of layers by heads for each kind, and for position and spread; below each its first heads.

        Args:
            kinds: which; all by default.
            top: how many heads are named below each map, of those that are of the kind.

        Raises:
            NameNotFoundError: if there is no such kind.
        """
        from circuitvit.views import canvas

        columns = [self._column(kind) for kind in (self.kinds if kinds is None else kinds)]
        shown = [(self.kinds[at], self.excess[:, at], self._first(at, top)) for at in columns]
        if kinds is None:
            named = [f"{head.head} {head.name}" for head in self.positions.only()[:top]]
            shares = np.array([head.share for head in self.positions.heads])
            shown += [("position (share)", shares, named), ("spread (1: uniform)", self.spread, [])]
        across = min(6, len(shown))
        rows, places = list(dict.fromkeys(self.layers)), [self.layers.index(layer) for layer in self.layers]
        width = max(self.layers.count(layer) for layer in rows)
        with canvas.styled():
            size = (1.5 * across + 0.9, (0.11 * len(rows) + 1.0) * -(-len(shown) // across) + 0.5)
            figure = canvas.blank(*size, "Kinds of heads: attention above the control")
            norm, colours = canvas.root_scale(np.array([1.0])), canvas.rising_colours()
            for axis, (name, values, found) in zip(
                canvas.panels(figure, len(shown), across), shown, strict=True
            ):
                table = np.full((len(rows), width), np.nan)
                for head, value in enumerate(values):
                    table[rows.index(self.layers[head]), head - places[head]] = value
                drawn = axis.imshow(
                    table.clip(0),
                    origin="lower",
                    aspect="auto",
                    interpolation="none",
                    norm=norm,
                    cmap=colours,
                )
                axis.set_title(name, fontsize=7)
                axis.set_xticks(range(width) if width <= 6 else [0, width - 1])
                axis.set_yticks([0, len(rows) - 1], [str(rows[0]), str(rows[-1])])
                axis.tick_params(length=0, labelsize=6)
                axis.set_xlabel("\n".join(found) or "none", color=MUTED, fontsize=6)
            figure.colorbar(drawn, ax=figure.axes, shrink=0.6, label="share of attention")
            figure.supylabel("layer", fontsize=7)
        return figure

    def _first(self, column: int, top: int) -> list[str]:
        return [f"{each.head} {each.attention:.0%}" for each in self.only(self.kinds[column])[:top]]

    def __repr__(self) -> str:
        named = [f"{found[0].head} {kind}" for kind in self.kinds if (found := self.only(kind))]
        more = f"; {', '.join(named[:5])}" if named else ""
        return f"HeadKinds({len(self.heads)} heads x {len(self.kinds)} kinds{more})"


@running
def head_kinds(
    model: Model,
    images: ImageSpec | None = None,
    *,
    n: int = 32,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> HeadKinds:
    """Which heads are which: every head's attention to matches, places and kinds of tokens, with controls.

    Args:
        model: from `load`, `wrap` or `edit`.
        images: on which places and tokens are asked, and out of which repeated patches are cut; at least 2
            that have little in common. By default all is asked of patches of noise.
        n: images of repeated patches, at least 8.
        seed: of the patches and where they are repeated.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: if the images cannot be used, or the grid has no room for a block and its copy.
        OptionError: for settings out of range, or a model without attention on its patches.

    Example:
        >>> import circuitvit as cv
        >>> found = head_kinds(cv.compiled("induction").model, progress=False)
        >>> [score.head for score in found.only("induction")]
        ['a1.h0']
    """
    refuse_sentences(model.preprocessing, "kinds of heads are told apart by where patches lie")
    given = None if images is None else images_of(model, images)
    if given is not None and len(given) < 2:
        raise DataError("what a head does shows across images: give at least 2, or none for patches of noise")
    places = [place for place in attention_places(model) if not model.stages[place].nodes.begins]
    if not places:
        raise OptionError(f"{model.name} has no attention on its patches")
    drawn = repeated_patches(model, given, n=n, seed=seed)
    ordinary = TensorImages(drawn.controls) if given is None else given
    positions = position_heads(model, ordinary, batch_size=batch_size, progress=False)
    fixed = _fixed(positions.subjects)
    matches = [drawn.looks(row, positions.subjects.n_prefix) for row in range(n)]
    steps = 2 * n + len(ordinary)
    with progress_bar(steps, "kinds of heads", progress, unit=model.preprocessing.what) as bar:

        def measured(of: Images, looks: Sequence[Mapping[str, Look]]) -> _Measured:
            return _measured(model, places, of, looks, batch_size, bar)

        with_copy = measured(TensorImages(drawn.images), matches)
        without = measured(TensorImages(drawn.controls), matches)
        at_places = measured(ordinary, [fixed])
    chance = np.broadcast_to(np.array([look.chance for look in fixed.values()]), at_places.attention.shape)
    attention, control, preference = (
        np.concatenate([_mean(one)[0], _mean(two)[0]], axis=1)
        for one, two in [
            (with_copy.attention, at_places.attention),
            (without.attention, chance),
            (with_copy.preference - without.preference, at_places.preference),
        ]
    )
    sure = [_mean(with_copy.attention - without.attention), _mean(at_places.attention - chance)]
    names = [name for place in places for part in attentions(model, place) for name in part.nodes.senders]
    return HeadKinds(
        heads=tuple(names),
        layers=tuple(each.layer for each in positions.heads),
        kinds=(*matches[0], *fixed),
        attention=attention,
        control=control,
        low=np.concatenate([low for _, low, _ in sure], axis=1),
        high=np.concatenate([high for _, _, high in sure], axis=1),
        preference=preference,
        spread=at_places.spread.mean(axis=0),
        positions=positions,
        natural=given is not None,
    )


def _mean(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """The mean over the first axis and the ends of its 95 % t interval; NaN says nothing and is left out."""
    with np.errstate(invalid="ignore", divide="ignore"):
        count = np.isfinite(values).sum(axis=0)
        mean = np.nansum(values, axis=0) / count
        spread = (np.nansum((values - mean) ** 2, axis=0) / (count - 1)) ** 0.5
        half = student.ppf(0.975, count - 1) * spread / count**0.5
    return mean, mean - half, mean + half


# -- measuring -----------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """Of each image: attention and preference `(image, head, kind)`, spread `(image, head)`."""

    attention: NDArray[np.float64]
    preference: NDArray[np.float64]
    spread: NDArray[np.float64]


def _fixed(subjects: Subjects) -> dict[str, Look]:
    """Where heads of the kinds of places and tokens would look."""
    shapes, found = templates(subjects.grid, subjects.kinds), {}
    for name in (*PLACES, *dict.fromkeys(subjects.kinds[: subjects.n_prefix])):
        if name in shapes:
            query, key = shapes[name].nonzero()
            queries = len(np.unique(query))
            found[name] = Look(query, key, queries, len(key) / queries / len(subjects.kinds))
    return found


def _measured(
    model: Model,
    places: Sequence[int],
    images: Images,
    looks: Sequence[Mapping[str, Look]],
    batch_size: int | None,
    bar: Any,
) -> _Measured:
    """What heads do at the looks of each image; where there is one only it is that of all images."""
    parts: list[_Measured] = []
    start = 0
    for batch in batches_of(model, images, batch_size):
        own = [looks[(start + row) % len(looks)] for row in range(len(batch))]
        with torch.no_grad():
            run = capture(model, batch)
            found = [
                _of_stage(stage, stage.read(run.stream(place)), own)
                for place in places
                for stage in attentions(model, place)
            ]
        parts.append(_Measured(*(np.concatenate(each, axis=1) for each in zip(*found, strict=True))))
        start += len(batch)
        bar.update(len(batch))
    return _Measured(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def _of_stage(stage: Stage, reads: Reads, looks: Sequence[Mapping[str, Look]]) -> _Measured:
    """What the heads of one attention do at the looks of each image."""
    pattern = stage.pattern(reads).double().cpu()
    if not bool(pattern.isfinite().all()):
        raise ModelError(f"patterns of {stage.nodes.name} are NaN: check the model's weights and the images")
    try:
        scores = stage.scores(reads).double().cpu()
    except UnsupportedModelError:  # two softmaxes have no one score
        scores = torch.full_like(pattern, torch.nan)
    blocked = scores == -torch.inf
    scores = scores.masked_fill(blocked, 0.0)
    usual = scores.sum(dim=-1, keepdim=True) / (~blocked).sum(dim=-1, keepdim=True).clamp(min=1)
    preference = (scores - usual).masked_fill(blocked, 0.0)
    shares = pattern.abs() / pattern.abs().sum(dim=-1, keepdim=True).clamp(min=1e-12)
    spread = torch.special.entr(shares).sum(dim=-1).mean(dim=-1) / log(pattern.shape[-1])
    return _Measured(
        np.stack([_at(values, own, per_query=True) for values, own in zip(pattern, looks, strict=True)]),
        np.stack([_at(values, own, per_query=False) for values, own in zip(preference, looks, strict=True)]),
        spread.numpy(),
    )


def _at(values: Tensor, looks: Mapping[str, Look], *, per_query: bool) -> NDArray[np.float64]:
    """Values `(head, query, key)` at the looks, `(head, kind)`: sums by query, or the mean of pairs."""
    found = []
    for look in looks.values():
        cells = values[:, torch.from_numpy(look.query), torch.from_numpy(look.key)]
        found.append(cells.sum(dim=-1) / (look.queries if per_query else len(look.key)))
    return torch.stack(found, dim=1).numpy()
