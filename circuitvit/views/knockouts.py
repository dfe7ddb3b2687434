"""Attention knock-outs: who must attend to whom?

The attention that one group of tokens pays to another is taken away, in a layer, a window of layers or a
head, and the answer is asked for again (Geva et al. 2023, arXiv:2304.14767). A softmax shares out all of its
attention, so there is a choice of what comes in its place:

| way | what a query that loses keys gets instead |
| --- | --- |
| `renormalise` | more of the keys that are left, as if the scores of the others were minus infinity |
| `corrupt` | what the same keys sent to it on the corrupt image of the pair, with the pattern of that run |
| `mean` | the same on the mean of all images |
| `zero` | nothing: less attention than the head ever pays, which no image brings about |
| `causal-last`, `causal-first` | attention to itself and to earlier tokens alone, see `circuitvit.causal` |
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import capture
from circuitvit.errors import OptionError, UnsupportedModelError, check_whole, counted, unknown_name
from circuitvit.export.style import INK
from circuitvit.graph import is_residual
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model, add, causal, knock_out
from circuitvit.models.sites import heads_of
from circuitvit.tasks import Batch, PreparedTask, Task, TokenGroups
from circuitvit.verification.statistics import Estimate
from circuitvit.views.attention import attention_places, attentions
from circuitvit.views.outcomes import (
    FIGURES,
    Changed,
    Figure,
    MetricSpec,
    Outcomes,
    always,
    few_images,
    outcomes,
    question,
    told,
)
from circuitvit.views.subjects import ImageSpec

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Way = Literal["renormalise", "corrupt", "mean", "zero", "causal-last", "causal-first"]
By = Literal["layer", "head"]
LATER = ("later tokens", "all")
"""What causal attention takes away."""

_CAVEATS = {
    "zero": "a plain 0 leaves a head less attention than it ever pays, and part of the effect is that of "
    "this alone: renormalise, or take the message from a reference run",
    "mean": "the mean of all images is no image, and what keys send on it may be unlike anything they send",
}
_SINGLE = (
    "of single layers or heads: what one does not bring, another may, so that no effect is no proof that "
    "nobody needs it; widen window="
)


@dataclass(frozen=True)
class Place:
    """Where attention is taken away.

    Attributes:
        name: such as "layer 3", "layers 0-5" or "a3.h1".
        layer: the first of its layers.
        heads: all heads of it.
    """

    name: str
    layer: int
    heads: tuple[str, ...]


@dataclass(frozen=True, eq=False, repr=False)
class KnockOuts(Result):
    """What is lost when one group of tokens no longer attends to another.

    Attributes:
        pairs: (source, target): attention *from* the keys of the source *to* the queries of the target, in
            the direction in which information goes, as edges are written.
        places: where it was taken away.
        way: what came instead.
        by: "layer" (or windows of layers) or "head".
        outcomes: for every pair and place, arrays `(pair, place, image)`; see `Outcomes`.
        caveats: what to bear in mind.
    """

    pairs: tuple[tuple[str, str], ...]
    places: tuple[Place, ...]
    way: str
    by: str
    outcomes: Outcomes
    caveats: tuple[str, ...]

    def records(self) -> Iterator[Record]:
        """One row for each pair of groups (`attention`, as "source->target"), `place` and `image`: the
        metric `before` and `after`, `kl` in nats, and whether the top class `flips`."""
        pairs, places = [f"{a}->{b}" for a, b in self.pairs], [each.name for each in self.places]
        return self.outcomes.columns({"attention": pairs, "place": places}, self.outcomes.after.shape[:-1])

    def _check(self) -> None:
        self.outcomes.check_changes(len(self.pairs), len(self.places))

    def effects(self, of: Figure = "metric") -> Float[NDArray[np.float64], "pair place"]:
        """Means over images: of the change of the metric, of the KL in nats, or shares of flips."""
        return np.asarray(self.outcomes.values(of).mean(axis=-1))

    def estimate(self, source: str, target: str, place: str, of: Figure = "metric") -> Estimate:
        """One effect with its bootstrap interval over images.

        Raises:
            NameNotFoundError: for another pair or place.
        """
        pairs, places = [f"{a}->{b}" for a, b in self.pairs], [each.name for each in self.places]
        for name, known, kind in ((f"{source}->{target}", pairs, "pair"), (place, places, "place")):
            if name not in known:
                raise unknown_name(kind, name, known)
        return self.outcomes.estimate((pairs.index(f"{source}->{target}"), places.index(place)), of)

    def strongest(self, count: int = 10, of: Figure = "metric") -> list[tuple[str, str, str, Estimate]]:
        """The largest mean effects, up or down: source, target, place and estimate."""
        effects = self.effects(of)
        order = np.argsort(-np.abs(effects), axis=None, kind="stable")[:count]
        where = [np.unravel_index(each, effects.shape) for each in order]
        named = [(*self.pairs[int(pair)], self.places[int(place)].name) for pair, place in where]
        return [(*each, self.estimate(*each, of)) for each in named]

    def figure(self, *, of: Figure = "metric") -> Picture:
        """A heat map: pairs of groups by layers; of heads one map for each pair, layers by heads.

        A dot marks what differs from no effect: the 95 % interval leaves out 0 (and the effect is more than a
        thousandth of the largest, below which rounding is in play).

        Args:
            of: "metric", "kl" or "flips".
        """
        from circuitvit.views import canvas

        effects, sure = self.effects(of), self._sure(of)
        signed = of == "metric"
        look: dict[str, Any] = {
            "cmap": canvas.signed_colours() if signed else canvas.rising_colours(),
            "norm": canvas.even_norm(effects) if signed else canvas.scale(np.append(effects, 0.0)),
        }
        names = [f"{source} → {target}" for source, target in self.pairs]
        panels = [(name, effects[row], sure[row]) for row, name in enumerate(names)]
        with canvas.styled():
            title = f"Attention knocked out ({self.way}): {self.outcomes.metric}"
            if self.by == "layer":
                figure = canvas.blank(2.4 + 0.36 * len(self.places), 1.5 + 0.26 * len(names), title)
                (axis,) = canvas.panels(figure, 1, 1)
                drawn = axis.imshow(effects, aspect="auto", **look)
                axis.set_yticks(range(len(names)), names)
                short = [place.name.removeprefix("layer ") for place in self.places]
                axis.set_xticks(range(len(short)), short, rotation=0 if max(map(len, short)) < 3 else 90)
                axis.set_xlabel("layer" if all(len(name) < 3 for name in short) else "layers")
                axis.plot(*sure.nonzero()[::-1], ".", color=INK, markersize=2.5)
                axes = [axis]
            else:
                across = min(len(panels), 4)
                figure = canvas.blank(1.9 * across + 1.2, 2.2 * -(-len(panels) // across) + 0.6, title)
                axes = canvas.panels(figure, len(panels), across)
                for axis, (name, row, dots) in zip(axes, panels, strict=True):
                    table, layers = self._by_head(row)
                    drawn = axis.imshow(table, origin="lower", aspect="auto", **look)
                    marks = np.nan_to_num(self._by_head(dots.astype(float))[0]) > 0
                    axis.plot(*marks.nonzero()[::-1], ".", color=INK, markersize=2.5)
                    axis.set_yticks(range(len(layers)), [str(layer) for layer in layers])
                    axis.set(title=name, xlabel="head", ylabel="layer")
            figure.colorbar(drawn, ax=axes, shrink=0.8, label=FIGURES[of].split(",")[0])
        return figure

    def _sure(self, of: Figure) -> NDArray[np.bool_]:
        """Which cells have a dot, `(pair, place)`."""
        found = np.abs(effects := self.effects(of)) > 1e-3 * np.abs(effects).max()
        for at in zip(*found.nonzero(), strict=True):
            found[at] = self.outcomes.is_sure(at, of)
        return np.asarray(found)

    def _by_head(self, row: NDArray[np.float64]) -> tuple[NDArray[np.float64], list[int]]:
        """One pair's effects `(place,)` as a table `(layer, head)`, and the layers."""
        layers = list(dict.fromkeys(place.layer for place in self.places))
        inside = [[value for place, value in zip(self.places, row, strict=True) if place.layer == layer]
                  for layer in layers]  # fmt: skip
        table = np.full((len(layers), max(map(len, inside))), np.nan)
        for line, values in enumerate(inside):
            table[line, : len(values)] = values
        return table, layers

    def __repr__(self) -> str:
        source, target, place, effect = self.strongest(1)[0]
        pairs, places = counted(len(self.pairs), "pair"), counted(len(self.places), "place")
        count = f"{pairs} of groups at {places}, {self.way}"
        return f"KnockOuts({count}; most {source}->{target} at {place}: {told(effect, 'metric')})"


@running
def knock_outs(
    model: Model,
    images: ImageSpec | Task,
    *,
    groups: TokenGroups | str | None = None,
    sources: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    layers: Sequence[int | Sequence[int]] | None = None,
    window: int = 1,
    by: By = "layer",
    way: Way = "renormalise",
    metric: MetricSpec | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> KnockOuts:
    """The effect of taking away the attention between every two groups of tokens, place by place.

    Attention of blocks is meant, not that of a pool: `model.edit` reaches it by name. Cost: one run from the
    layer in question for each pair of groups, place and image.

    Args:
        model: from `load`, `wrap` or `edit`.
        images: preprocessed images or paths; or a task, whose clean images, metric and groups are meant.
        groups: "kind" (class token, registers, patches; the default), "frame", or `TokenGroups`, such as
            `TokenGroups.from_masks` of objects.
        sources: groups whose keys are no longer attended to; all by default.
        targets: groups whose queries no longer attend; all by default.
        layers: which, one after the other, and together where several stand in one: `[0, 1, range(6, 12)]`.
        window: without `layers`: how many consecutive layers at a time.
        by: "layer", or "head" for each head of each layer alone.
        way: what comes in its place, see `circuitvit.views.knockouts`.
        metric: for images: a metric or its name; the logit of the predicted class by default.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown way, group, metric or class.
        OptionError: for layers that there are not, or "corrupt" without corrupt images.
        DataError: if images cannot be read or do not fit the model.
        UnsupportedModelError: if the model has no attention pattern, or a head's output is no sum over keys.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> found = knock_outs(cv.load("catdog-tiny"), catdog_pairs(6, seed=0).clean, targets=["cls"])
        >>> found.pairs, found.outcomes.after.shape
        ((('cls', 'cls'), ('patch', 'cls')), (2, 4, 6))
    """
    if way not in get_args(Way):
        raise unknown_name("way of knocking out", way, get_args(Way))
    if by not in get_args(By):
        raise unknown_name("kind of place", by, get_args(By))
    own = images.groups if isinstance(images, Task) else None
    prepared = question(model, images, metric, groups or (None if own else "kind"))
    places = _places(model, layers, window, by)
    if way.startswith("causal"):
        if sources is not None or targets is not None:
            raise OptionError("causal attention has no sources and targets: leave them out")
        pairs: tuple[tuple[str, str], ...] = (LATER,)
    else:
        known = prepared.graph.groups
        pairs = tuple((a, b) for a in _known(sources, known) for b in _known(targets, known))
    if way == "corrupt" and prepared.corrupt is None:
        raise OptionError("there are no corrupt images: give a task with some, or way='mean'")
    mean = _mean_image(prepared, batch_size) if way == "mean" else None
    changes = [_change(prepared, pair, place, way, mean) for pair in pairs for place in places]
    found = outcomes(prepared, changes, "knock-outs", batch_size, progress)
    several = by == "layer" and any(len(place.name) > len("layer 99") for place in places)
    caveats = (
        *((_CAVEATS[way],) if way in _CAVEATS else ()),
        *(() if several else (_SINGLE,)),
        *few_images(len(prepared)),
    )
    return KnockOuts(pairs, places, way, by, found.reshaped(len(pairs), len(places)), caveats)


# -- where ---------------------------------------------------------------------------------------


def _known(wanted: Sequence[str] | None, known: Sequence[str]) -> Sequence[str]:
    for name in wanted or ():
        if name not in known:
            raise unknown_name("token group", name, known)
    return wanted or known


def heads_by_layer(model: Model) -> dict[int, tuple[str, ...]]:
    """The heads of the blocks whose patterns can be changed, by layer.

    Raises:
        UnsupportedModelError: if there are none.
    """
    stages, found = (model.bare or model).stages, dict[int, tuple[str, ...]]()
    for site in model.all_sites:
        nodes = stages[site.stage].nodes
        if site.kind == "pattern" and not nodes.begins and is_residual(nodes.reads_from):
            found[nodes.layer] = (*found.get(nodes.layer, ()), site.node)
    if not found:
        raise UnsupportedModelError(f"{model.name} has no attention patterns that could be changed")
    return found


def _places(
    model: Model, layers: Sequence[int | Sequence[int]] | None, window: int, by: By
) -> tuple[Place, ...]:
    heads = heads_by_layer(model)
    check_whole("the window", window)
    if window > 1 and (layers is not None or by == "head"):
        raise OptionError("a window is of all layers, one after the other: leave out layers= and by='head'")
    if window > len(heads):
        raise OptionError(f"a window of {window} layers, and {model.name} has attention in {len(heads)}")
    known = list(heads)
    steps = range(len(known) - window + 1)
    wanted = [known[step : step + window] for step in steps] if layers is None else layers
    if not wanted:
        raise OptionError("no layers are named: leave out layers= for all")
    places = []
    for each in wanted:
        together = [each] if isinstance(each, int) else list(each)
        for layer in together:
            if layer not in heads:
                raise OptionError(f"there is no attention in layer {layer!r}: there is in layers {known}")
        if not together:
            raise OptionError("a place without layers: write numbers, or several together as in range(0, 6)")
        first, last = together[0], together[-1]
        run = together == list(range(first, last + 1))
        span = f"{first}-{last}" if run else ", ".join(map(str, together))
        name = f"layer {first}" if len(together) == 1 else f"layers {span}"
        if by == "head":
            places += [Place(head, layer, (head,)) for layer in together for head in heads[layer]]
        else:
            places.append(Place(name, first, tuple(head for layer in together for head in heads[layer])))
    return tuple(places)


# -- what is changed -----------------------------------------------------------------------------


def _change(
    prepared: PreparedTask, pair: tuple[str, str], place: Place, way: Way, mean: Tensor | None
) -> Changed:
    """One knock-out, which is made once where it is the same for all images."""
    model = prepared.model
    if way.startswith("causal"):
        order = causal(way.removeprefix("causal-"))
        return always(model.edit({f"{head}.pattern": order for head in place.heads}))
    groups = prepared.groups
    assert groups is not None, "knock-outs are always asked for by groups"
    if way in ("renormalise", "zero") and groups.members.ndim == 1:
        return always(_knocked(model, groups, pair, place, way))
    return partial(_for_batch, model, groups, pair, place, way, mean)


def _for_batch(
    model: Model,
    groups: TokenGroups,
    pair: tuple[str, str],
    place: Place,
    way: Way,
    mean: Tensor | None,
    batch: Batch,
) -> Model:
    assert batch.members is not None, "knock-outs are always asked for by groups"
    own = TokenGroups(groups.names, batch.members.cpu())
    reference = batch.reference if way == "corrupt" else mean
    if way in ("renormalise", "zero") or reference is None:
        return _knocked(model, own, pair, place, way)
    source, target = (batch.members == own.names.index(name) for name in pair)
    lost = target[..., :, None] & source[..., None, :]
    sent = messages(model, reference, lost if lost.ndim == 3 else lost[None], place.heads)
    return _knocked(model, own, pair, place, "zero").edit(
        {f"{head}.z": add(message) for head, message in sent.items()}
    )


def _knocked(model: Model, groups: TokenGroups, pair: tuple[str, str], place: Place, way: str) -> Model:
    source, target = pair
    kept = {f"{head}.pattern@{source}->{target}": knock_out() if way == "renormalise" else 0
            for head in place.heads}  # fmt: skip
    return model.edit(kept, groups=groups)


@torch.no_grad()
def messages(
    model: Model, images: Tensor, keep: Tensor, heads: Sequence[str]
) -> Mapping[str, Float[Tensor, "image token d_head"]]:
    """What some keys send to some queries, as a part of each head's `z`.

    Args:
        model: to run.
        images: `(image, *shape)`.
        keep: which attention counts, boolean `(image or 1, query, key)`.
        heads: of which it is wanted.

    Raises:
        UnsupportedModelError: if a head's z is no sum over keys, as where it is normed afterwards.
    """
    run, found = capture(model, images), dict[str, Tensor]()
    for place in attention_places(model):
        for part in attentions(model, place):
            wanted = [head for head in heads_of(part) if head in heads]
            if not wanted:
                continue
            reads = part.read(run.stream(place))
            pattern = part.pattern(reads)
            kept = keep[:, None, : pattern.shape[-2]]
            sent, rest = (part.mixed(reads, part.attend(reads, pattern * each)) for each in (kept, ~kept))
            whole = part.mixed(reads, part.attend(reads, pattern)).expand_as(sent)
            largest = float(torch.maximum(sent.abs(), rest.abs()).max())  # what is lost to rounding is of it
            if float((sent + rest - whole).abs().max()) > 1e-3 * largest:
                raise UnsupportedModelError(
                    f"what heads of {part.nodes.name} mix is normed afterwards, so that there is no message "
                    "of some keys alone: use way='renormalise'"
                )
            found.update({head: sent[:, heads_of(part).index(head)] for head in wanted})
    return found


def _mean_image(prepared: PreparedTask, batch_size: int | None) -> Tensor:
    """The mean of all clean images, as one image."""
    total = sum(batch.base.double().sum(dim=0) for batch in prepared.batches(batch_size or 32))
    assert isinstance(total, Tensor), "there is at least one image"
    return (total / len(prepared)).to(prepared.model.dtype)[None]
