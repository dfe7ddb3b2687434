"""From patch to class token: how much of a behaviour crosses from each group of tokens to each other.

Only attention carries anything from token to token. With every head cut by the tokens that it takes values
from (`split_sources`), what crosses in a layer from the group `s` to the group `t` is the effect of replacing
what its heads write at `t` by values of `s`. The stream itself carries each group on to the next layer, and
what it holds there is the effect of replacing it at the group's tokens:

    crossing(l, s, t) = sum over heads h of layer l, and tokens of t, of (change of h[s]) . g after l
    held(l, t)        = sum over tokens of t of (change of the stream before l) . g before l
    read(l, t)        = sum over tokens of t of (change of the stream before l) . (g before l - g after l)

with `g` the gradient of the metric at the stream, all that comes later included. Then, whatever the method,

    what is left after l at t = held(l, t) - read(l, t) + sum over s of crossing(l, s, t)

and the MLP makes of it held(l + 1, t). By "ceap" (conductance) no cut loses anything: as the steps grow
`held` sums to the whole effect at each of them, attention gives out what it reads, and an MLP does so token
by token. By "eap", to first order, each cut has an estimate of its own; `unexplained` says how far it is off.

Dhamdhere, Sundararajan and Yan 2018, "How important is a neuron?", arXiv:1805.12233 (conductance).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.attribution.scoring import require_gradient, require_slope
from circuitvit.engine import (
    BatchRun,
    batch_runs,
    choose_batch_size,
    progress_bar,
)
from circuitvit.errors import DataError, OptionError, UnsupportedModelError, check_whole, unknown_name
from circuitvit.graph import RESIDUAL
from circuitvit.graph import Direction as Way
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, split_sources
from circuitvit.models.sites import heads_of
from circuitvit.tasks import Patch, PreparedTask, Task, TokenGroups, prepare
from circuitvit.views.crossed import Sums, add_exact, add_leg, effect_of, legs

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture
    from circuitvit.views.lanes import Lanes

Method = Literal["eap", "ceap", "exact"]


@dataclass(frozen=True, eq=False, repr=False)
class Flow(Result):
    """How much of a behaviour crosses between groups of tokens, layer by layer, in units of the metric.

    As scores of edges are, numbers are effects of noising or denoising; see `support`.

    Attributes:
        groups: of tokens.
        layers: names of the layers with attention, in order.
        crossing: what the heads of a layer carry from a group to a group, also to itself.
        before: what each group holds before each of the layers.
        readout: what it holds before the readout.
        read: what a layer's attention reads of each group (in a parallel block, where both are one stage,
            with its MLP); None of exact effects, which do not add up.
        heads: names of all heads, where they were asked for.
        by_head: what each of them carries.
        effect: the metric of the reference run minus that of the base run, which all of it together has.
        metric: what is measured, in words.
        method: "eap", "ceap" or "exact".
        direction: "noising" or "denoising".
        pairs: how many the numbers are means over.
    """

    groups: tuple[str, ...]
    layers: tuple[str, ...]
    crossing: Float[NDArray[np.float64], "layer group group"]
    before: Float[NDArray[np.float64], "layer group"]
    readout: Float[NDArray[np.float64], " group"]
    read: Float[NDArray[np.float64], "layer group"] | None
    heads: tuple[str, ...]
    by_head: Float[NDArray[np.float64], "head group group"] | None
    effect: float
    metric: str
    method: str
    direction: Way
    pairs: int

    along = "groups:group layers:layer heads:head"

    def records(self) -> Iterator[Record]:
        """One row for each `place` (a layer, or a head), `source` and `target`: the `effect` in units of the
        metric."""
        groups = {"source": self.groups, "target": self.groups}
        yield from cells({"place": self.layers, **groups}, effect=self.crossing)
        if self.by_head is not None:
            yield from cells({"place": self.heads, **groups}, effect=self.by_head)

    @property
    def cuts(self) -> tuple[str, ...]:
        """Where the stream is looked at: before each layer, and before the readout."""
        return (*self.layers, "readout")

    @property
    def held(self) -> Float[NDArray[np.float64], "cut group"]:
        """What each group holds at each cut."""
        return np.concatenate([self.before, self.readout[None]])

    @property
    def sign(self) -> float:
        """What makes effects that support the behaviour positive."""
        return -1.0 if self.direction == "noising" else 1.0

    def between(self, source: str, target: str) -> NDArray[np.float64]:
        """What crosses from a group to another in each layer; positive supports the behaviour.

        Raises:
            NameNotFoundError: for another group.
        """
        return np.asarray(self.sign * self.crossing[:, self._place(source), self._place(target)])

    def share(self, group: str) -> NDArray[np.float64]:
        """What part of the whole effect a group holds at each cut: 1 means all of it.

        Raises:
            NameNotFoundError: for another group.
            DataError: if there is no effect.
        """
        if self.effect == 0:
            raise DataError(f"{self.metric} is the same in both runs: there is nothing to have a share of")
        return np.asarray(self.held[:, self._place(group)] / self.effect)

    @property
    def unexplained(self) -> NDArray[np.float64]:
        """What part of the effect each cut does not account for: 1 minus the sum of all groups' shares."""
        return np.asarray(1 - np.sum([self.share(group) for group in self.groups], axis=0))

    @property
    def worked(self) -> NDArray[np.float64]:
        """What a group has more before the next cut than it had after a layer's attention, `(layer, group)`.

        It is due to the MLP alone, which takes nothing from other tokens: 0 of "ceap" as the steps grow, and
        an error of first order, token by token, of "eap". Of a parallel block it is what its MLP writes.

        Raises:
            OptionError: for exact effects, which do not add up.
        """
        if self.read is None:
            raise OptionError("exact effects do not add up: ask for method='ceap' or 'eap'")
        return np.asarray(self.held[1:] - (self.held[:-1] - self.read + self.crossing.sum(axis=1)))

    def strongest(self, count: int = 10) -> list[tuple[str, str, str, float]]:
        """The most that crosses from a group to another: place, source, target, effect. Places are heads
        where they were asked for."""
        places, values = (self.layers, self.crossing) if self.by_head is None else (self.heads, self.by_head)
        off = np.abs(values) * (1 - np.eye(len(self.groups)))
        order = np.argsort(-off, axis=None, kind="stable")[: max(count, 0)]
        where = [np.unravel_index(each, off.shape) for each in order]
        return [
            (places[at], self.groups[source], self.groups[target], float(values[at, source, target]))
            for at, source, target in where
            if source != target
        ]

    def _place(self, group: str) -> int:
        if group not in self.groups:
            raise unknown_name("token group", group, self.groups)
        return self.groups.index(group)

    def table(self) -> str:
        """What each group holds at each cut and what crosses to it, as text."""
        pairs = [(a, b) for b in self.groups for a in self.groups if a != b and self.between(a, b).any()]
        heads = ["", *self.groups, "together", "", *(f"{a}->{b}" for a, b in pairs)]
        rows = [heads]
        for place, cut in enumerate(self.cuts):
            together = _percent(1 - self.unexplained[place])
            crossed = [f"{self.between(a, b)[place]:+.3f}" for a, b in pairs if place < len(self.layers)]
            rows.append([cut, *self._shares(place), together, "", *crossed])
        widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(heads))]
        lines = [
            " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=False)) for row in rows
        ]
        return "\n".join(line.rstrip() for line in lines)

    def figure(self, *, upto: int | None = None) -> Picture:
        """Lanes of groups, as wide as what they hold, and what crosses between them, as wide as it is.

        Args:
            upto: only so many of the first layers.

        Raises:
            OptionError: if there are more groups than can be told apart, or no such layer.
        """
        from circuitvit.views.lanes import draw

        return draw(self._lanes(), len(self.layers) if upto is None else upto)

    def film(self, path: str | Path, *, seconds: float = 0.7) -> Path:
        """Write the figure as an animation (`.gif`) that goes from layer to layer.

        Args:
            path: with this ending.
            seconds: that each layer is shown.

        Raises:
            OptionError: for another ending, or as `figure` does.
            FileError: if the file cannot be written.
        """
        from circuitvit.views.lanes import film

        return film(self._lanes(), Path(path), seconds)

    def _shares(self, cut: int) -> list[str]:
        return [_percent(self.share(group)[cut]) for group in self.groups]

    def _lanes(self) -> Lanes:
        from circuitvit.views.lanes import Lanes

        missed = _percent(np.abs(self.unexplained).max())
        return Lanes(
            f"What crosses between tokens: {self.metric} ({self.method})",
            f"of {self.effect:+.3g} in all, of which a cut misses up to {missed}; hatched: opposes",
            self.groups,
            [each.removeprefix("layer ") for each in self.cuts],
            self.sign * self.held,
            self.sign * self.crossing,
            [self._shares(cut) for cut in range(len(self.cuts))],
        )

    def __repr__(self) -> str:
        said = ", ".join(f"{a}->{b} in {place} {value:+.3g}" for place, a, b, value in self.strongest(3))
        kinds = f"{len(self.groups)} groups, {len(self.layers)} layers, {self.method}"
        off = f"; a cut misses up to {np.abs(self.unexplained).max():.0%}" if self.effect else ""
        return f"Flow({kinds}; of {self.effect:+.3g}: {said}{off})"


def _percent(share: float) -> str:
    return f"{round(float(share), 2) + 0.0:.0%}"


@running
def flow(
    model: Model,
    task: Task | PreparedTask,
    groups: TokenGroups | str | None = None,
    *,
    method: Method = "ceap",
    heads: bool = False,
    steps: int = 10,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Flow:
    """How much of a behaviour crosses from each group of tokens to each other, by layer, and by head.

    Cost: of "eap" 2 forwards and 1 backward, and attention once for each group in both runs; of "ceap" about
    that for each step; of "exact" a part of a forward for each two groups and layer (and head). Pieces of
    heads exist for one layer at a time.

    Args:
        model: from `load`, `wrap` or `edit`.
        task: pairs of images; its ablation is "patch".
        groups: "kind" (class token, registers, patches), "frame", "token", or `TokenGroups`, such as
            `TokenGroups.from_masks` of objects or `TokenGroups.rings` around one; by default those of the
            task, or else "kind".
        method: "ceap": conductance, which adds up at every cut; "eap": to first order; "exact": each alone
            replaced and run.
        heads: whether to tell heads apart, too.
        steps: of "ceap"; more where `unexplained` is large.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: for another ablation, groups that a prepared task does not have, or a metric without
            gradient.
        DataError: if images or groups cannot be used.
        UnsupportedModelError: if something else than attention carries anything between tokens, or a head is
            not linear in its values.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(4, seed=0)
        >>> task = cv.Task(pairs.clean, pairs.corrupt, cv.logit_diff("cat", "dog"))
        >>> found = cv.flow(model, task, method="ceap", progress=False)
        >>> bool(found.share("patch")[0] > 0.99 and found.share("cls")[-1] > 0.99)
        True
    """
    if method not in get_args(Method):
        raise unknown_name("method", str(method), get_args(Method))
    check_whole("steps", steps)
    prepared = _prepared(model, task, groups)
    if method != "exact":
        (require_slope if method == "eap" else require_gradient)(prepared, method)
    places = _attentions(model)
    split = _splitter(prepared)
    found = Sums(prepared, places, heads)
    size = _batch_size(prepared, places, memory) if batch_size is None else batch_size
    with progress_bar(len(prepared), f"flow, {method}", progress) as bar:
        for run in batch_runs(prepared, size):
            pieces = split(run)
            if method == "exact":
                add_exact(found, run, pieces)
            else:
                for leg in legs(run, None if method == "eap" else steps):
                    add_leg(found, run, pieces, leg)
            found.effect += effect_of(run)
            bar.update(len(run.batch.rows))
    return _result(found, method)


# -- what is asked -------------------------------------------------------------------------------


def _prepared(model: Model, task: Task | PreparedTask, groups: TokenGroups | str | None) -> PreparedTask:
    if groups is not None and not isinstance(groups, (TokenGroups, str)):
        raise OptionError(f"groups are 'kind', 'frame', 'token' or TokenGroups, not {groups!r}")
    if isinstance(task, Task):
        wanted = groups if groups is not None else task.groups if task.groups is not None else "kind"
        task = task.with_options(groups=wanted)
    elif groups is not None:
        raise OptionError("a prepared task keeps its token groups: give the task itself, with groups=")
    prepared = prepare(model, task)
    if prepared.groups is None:
        raise OptionError("the task was prepared without token groups: give the task itself")
    if not isinstance(prepared.ablation, Patch):
        raise OptionError(
            f"what crosses is what two images of a pair differ in, which {prepared.ablation.name!r} ablation "
            "does not look at: use 'patch', with corrupt images"
        )
    return prepared


def _attentions(model: Model) -> dict[int, dict[str, int]]:
    """By number of stage, the heads that take values from other tokens, numbered from first to last.

    Raises:
        UnsupportedModelError: if there are none, or anything else carries something between tokens, or the
            stream is cut into features.
        OptionError: if a head is cut already.
    """
    cut = sorted({each.nodes.name for each in model.stages if each.nodes.kind == "stream"})
    own = (model.bare or model).refinements
    if cut:
        raise UnsupportedModelError(
            f"{cut[0]} of {model.name} is a stream cut into features, past which nothing is carried: ask the "
            "model without that"
        )
    found: dict[int, dict[str, int]] = {}
    count = 0
    for index, stage in enumerate(model.stages):
        if stage.is_source or stage.is_readout:
            continue
        for part in stage.branches:
            nodes = part.nodes
            if nodes.kind != "attention" and any(nodes.mixes or ()):
                raise UnsupportedModelError(
                    f"{nodes.name} of {model.name} carries something from token to token and is no "
                    "attention: what crosses there cannot be told apart by groups"
                )
            if nodes.kind == "attention" and nodes.reads_from != RESIDUAL:
                raise UnsupportedModelError(
                    f"{nodes.name} of {model.name} attends to pooled tokens, which belong to no group"
                )
            if nodes.kind == "attention":
                for head in heads_of(part):
                    if head in own:
                        raise OptionError(
                            f"{head} is cut already: heads are cut here, by the tokens that they take from; "
                            "give the model whose heads are whole"
                        )
                    found.setdefault(index, {})[head] = count
                    count += 1
    if not found:
        raise UnsupportedModelError(f"{model.name} has no attention: nothing crosses")
    return found


def _splitter(prepared: PreparedTask) -> Callable[[BatchRun], Model]:
    """Gives the model for a batch whose heads are cut by groups."""
    groups = prepared.groups
    assert groups is not None, "there are groups"
    if groups.members.ndim == 1:
        whole = split_sources(prepared.model, groups)
        return lambda run: whole

    def of_batch(run: BatchRun) -> Model:
        return split_sources(prepared.model, replace(groups, members=groups.members[run.batch.rows]))

    return of_batch


def _batch_size(prepared: PreparedTask, places: dict[int, dict[str, int]], memory: int | str | None) -> int:
    """As many pairs as leave room for the pieces of a layer."""
    senders, groups = len(prepared.graph.senders), len(prepared.graph.groups)
    pieces = max(len(heads) for heads in places.values()) * groups
    own = choose_batch_size(prepared, memory) * senders // (senders + 2 * pieces)
    return prepared.model.batch_of(len(prepared), max(1, own))


def _result(sums: Sums, method: Method) -> Flow:
    prepared, count = sums.prepared, len(sums.prepared)
    stages = prepared.model.stages
    layers = tuple(
        nodes.writes_to if nodes.begins else f"layer {nodes.layer}"
        for nodes in (stages[index].nodes for index in sums.places)
    )
    return Flow(
        groups=prepared.graph.groups,
        layers=layers,
        crossing=sums.crossing / count,
        before=sums.held[:-1] / count,
        readout=sums.held[-1] / count,
        read=None if method == "exact" else sums.read / count,
        heads=tuple(head for each in sums.places.values() for head in each) if sums.heads else (),
        by_head=sums.by_head / count if sums.heads else None,
        effect=sums.effect / count,
        metric=prepared.metric.label,
        method=method,
        direction=prepared.direction,
        pairs=count,
    )
