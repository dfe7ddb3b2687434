"""A circuit over training: what its checkpoints show, when it has formed, and which changes are sharp.

All figures are shares of the behaviour that the last checkpoint shows, so that one scale serves all of them.

**When it has formed.** From the first checkpoint on in which, and in all later ones, the behaviour is there
(`1 - window` of it, or more) and the circuit carries it (faithfulness within `window` of 1). To be sure of
it, checkpoints are asked from the last one backwards for as long as both intervals lie within: as the first
"no" ends it, their number needs no correction (a fixed sequence of tests: Maurer and Hothorn 1995).
Likewise from the first one forwards, for as long as one of the intervals lies without.

**Sharp changes.** An edge's effect is measured on the same pairs in neighbouring checkpoints, and its change
is a mean over pairs. That is what is tested, by Student's t over pairs: other pairs might have shown another
change. Tests over steps (permutations, change points by an F-statistic) suppose that steps could have come
in another order; but training has a trend and neighbouring checkpoints are alike, so that any smooth rise
has a change point for them. Here a change is sharp where two figures are larger than the tolerance, in one
direction: the change itself, and what it has beyond an even pace, which is that of all the other steps,

    excess = change - gap / (1 - gap) * (sum of the changes in all other gaps)

where a gap between two checkpoints counts as its share of all steps. The null hypothesis is that one of the
two is within the tolerance: p is the larger of their p-values (Berger 1982, "Multiparameter hypothesis
testing and acceptance sampling", Technometrics 24), and twice the smaller one of up and down. It is corrected
over all edges of the graph and all gaps, also those that were not measured (Benjamini and Hochberg 1995); the
behaviour's own over gaps.

Assumed: pairs are drawn independently of one another; means of so many are nearly normal; p-values hang
together positively, as those of one set of pairs do. All of it is about these checkpoints: nothing is said of
another training, in which the circuit may form at another step or be another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from circuitvit.errors import OptionError, check_number, counted
from circuitvit.export.strip import draw_strip
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.results import Record, ToldResult
from circuitvit.verification.drift_runs import edge_shares
from circuitvit.verification.statistics import Estimate, estimated
from circuitvit.verification.templates import row

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

LEVEL = 0.05
"""The share of false ones among the changes that are called sharp, at most."""

STRIP = 6
"""Diagrams of a film strip, unless steps are named."""

DRAWN = 0.02
"""The effect from which on an edge is drawn, as a share of the last checkpoint's behaviour."""

BEHAVIOUR, FAITHFULNESS = "behaviour", "faithfulness"

LISTED = 20


class Formed(NamedTuple):
    """When a circuit formed.

    Attributes:
        at: the first step from which on the figures lie within the window; None where they do not in the end.
        after: up to this step it surely had not; None where that is not sure of the first.
        by: from this step on it surely had; None where that is not sure of the last.
    """

    at: int | None
    after: int | None
    by: int | None


@dataclass(frozen=True, eq=False, repr=False)
class Across(ToldResult):
    """A behaviour, a circuit and edges in the checkpoints of one training.

    Edges that support the behaviour have positive effects.

    Attributes:
        steps: of the checkpoints, in order.
        names: what the models of the checkpoints are called.
        weights: the hashes of their weights.
        circuit: whose faithfulness was measured.
        n: pairs that everything rests on.
        effect: of the behaviour in the last checkpoint, in units of the metric; all shares are of it.
        behaviour: what each checkpoint has of it.
        faithfulness: of the circuit, in each of them; None where less than a fifth of the behaviour is
            surely there, as there is nothing to carry.
        edges: that were measured.
        method: by which.
        effects: of each edge, in each checkpoint.
        widths: half the width of the 95 % interval of each of these.
        p: of each change between neighbouring checkpoints being no sharp one, not corrected.
        p_behaviour: the same of the behaviour.
        window: how far from 1 behaviour and faithfulness may be of a circuit that has formed.
        tolerance: the change that is none.
        caveats: what to bear in mind.
        provenance: of the last checkpoint.
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    weights: tuple[str, ...]
    circuit: Circuit
    n: int
    effect: float
    behaviour: tuple[Estimate, ...]
    faithfulness: tuple[Estimate | None, ...]
    edges: tuple[str, ...]
    method: str
    effects: Float[np.ndarray, "step edge"]
    widths: Float[np.ndarray, "step edge"]
    p: Float[np.ndarray, "gap edge"]
    p_behaviour: Float[np.ndarray, " gap"]
    window: float
    tolerance: float
    provenance: Provenance
    caveats: tuple[str, ...] = ()

    along: ClassVar[str] = "steps:step names:step weights:step behaviour:step faithfulness:step edges:edge"

    # what it says

    @property
    def formed(self) -> Formed:
        """When the circuit formed."""
        figures = list(zip(self.behaviour, self.faithfulness, strict=True))
        points = [_lie(_point(first), _point(other), self.window) for first, other in figures]
        sure = [_lie(*each, self.window) for each in figures]
        before = [
            step for step, _ in takewhile(lambda each: each[1] is False, zip(self.steps, sure, strict=True))
        ]
        return Formed(
            _first_of_last(self.steps, points),
            before[-1] if before else None,
            _first_of_last(self.steps, sure),
        )

    def jumps(self, level: float = LEVEL) -> list[Record]:
        """The sharp changes of edges, by step and the largest first: `edge`, the steps `after` and `by` which
        it happened, the `change`, the effects `before` and `since`, and `p_fdr`, the corrected p-value.

        Args:
            level: the share of false ones among them that is put up with, on average.

        Raises:
            OptionError: if it is no share between 0 and 1.
        """
        check_number("the level", level, above=0, below=1)
        rows = [
            _jump(self.edges[edge], self.steps[gap : gap + 2], self.effects[gap : gap + 2, edge], p)
            for (gap, edge), p in np.ndenumerate(self.p_fdr)
            if p <= level
        ]
        return sorted(rows, key=lambda each: (each["by"], -abs(float(each["change"] or 0))))

    def leaps(self, level: float = LEVEL) -> list[Record]:
        """The sharp changes of the behaviour, as those of edges."""
        corrected = stats.false_discovery_control(self.p_behaviour)
        values = np.array([each.value for each in self.behaviour])
        return [
            _jump(BEHAVIOUR, self.steps[gap : gap + 2], values[gap : gap + 2], p)
            for gap, p in enumerate(corrected.tolist())
            if p <= level
        ]

    @property
    def p_fdr(self) -> Float[NDArray[np.float64], "gap edge"]:
        """The p-values, corrected for all edges of the graph and all gaps (Benjamini and Hochberg)."""
        unmeasured = (self.circuit.graph.n_edges - len(self.edges)) * len(self.p)
        every = np.concatenate([self.p.ravel(), np.ones(unmeasured)])
        corrected = stats.false_discovery_control(every) if every.size else every
        return np.asarray(corrected[: self.p.size]).reshape(self.p.shape)

    def strongest(self, count: int) -> list[str]:
        """The edges whose effect is largest in any checkpoint, those with sharp changes before all others.

        Args:
            count: how many at most; those whose effect is nowhere above 0.02 are none of them.
        """
        sharp = {each["edge"] for each in self.jumps()}
        peaks = np.abs(self.effects).max(axis=0, initial=0.0)
        order = sorted(range(len(self.edges)), key=lambda at: (self.edges[at] not in sharp, -peaks[at]))
        return [self.edges[at] for at in order[:count] if peaks[at] > DRAWN]

    def records(self) -> Iterator[Record]:
        """One row for each figure of each checkpoint: `step`, `figure` ("behaviour", "faithfulness", or the
        name of an edge), its `value` with the ends of its interval, and of what a gap is before the corrected
        p-value of no sharp change since the checkpoint before, `p_fdr`."""
        corrected, behaviour = self.p_fdr, stats.false_discovery_control(self.p_behaviour)
        for at, step in enumerate(self.steps):
            since = at - 1 if at else None
            p = None if since is None else float(behaviour[since])
            yield {"step": step, "figure": BEHAVIOUR, **estimated("value", self.behaviour[at]), "p_fdr": p}
            faithfulness = estimated("value", self.faithfulness[at])
            yield {"step": step, "figure": FAITHFULNESS, **faithfulness, "p_fdr": None}
            for edge, name in enumerate(self.edges):
                value, width = float(self.effects[at, edge]), float(self.widths[at, edge])
                estimate = estimated("value", Estimate(value, value - width, value + width))
                p = None if since is None else float(corrected[since, edge])
                yield {"step": step, "figure": name, **estimate, "p_fdr": p}

    def __repr__(self) -> str:
        return f"Across({self})"

    def __str__(self) -> str:
        jumps, leaps = self.jumps(), self.leaps()
        edges = f"{len(jumps)} of {counted(len({each['edge'] for each in jumps}), 'edge')}" if jumps else ""
        sharp = " and ".join(filter(None, (f"{len(leaps)} of the behaviour" if leaps else "", edges)))
        return f"{counted(len(self.steps), 'checkpoint')}: {self._when()}; sharp changes: {sharp or 'none'}."

    def _when(self) -> str:
        at, after, by = self.formed
        if at is None:
            return "the circuit does not carry the behaviour in the last checkpoint"
        sure = [f"surely not up to {after:,}"] if after is not None else []
        sure += [f"surely from {by:,} on"] if by is not None else ["from no step on for sure"]
        return f"the circuit has formed by step {at:,} of {self.steps[-1]:,} ({', '.join(sure)})"

    # what shows it

    def figure(self, edges: int = 8) -> Picture:
        """Behaviour, faithfulness and the edges that matter most by step, with sharp changes marked.

        Args:
            edges: how many are drawn, those with sharp changes first.
        """
        from circuitvit.views.over_training_figure import lines_figure

        return lines_figure(self, edges)

    def at(self, step: int, at_least: float = DRAWN) -> Circuit:
        """The edges with an effect of at least this share in a checkpoint, with these effects.

        Raises:
            OptionError: if there is no checkpoint of this step, or the share is not above 0.
        """
        check_number("the least effect", at_least, above=0)
        if step not in self.steps:
            known = ", ".join(map(str, self.steps))
            raise OptionError(f"there is no checkpoint of step {step}: the steps are {known}")
        place, graph = self.steps.index(step), self.circuit.graph
        ablated = -self.effects[place]  # as scores of ablation are: negative where an edge supports
        values = graph.array_of(dict(zip(self.edges, ablated.tolist(), strict=True)))
        made = Provenance(self.names[place], self.weights[place], self.provenance.task, self.method)
        return Circuit(graph, np.abs(values) >= at_least, values, made)

    def strip(
        self,
        path: str | Path,
        steps: Sequence[int] | None = None,
        *,
        at_least: float = DRAWN,
        columns: int = 3,
    ) -> Path:
        """Draw the edges of several checkpoints as a film strip, every node in the same place in each.

        Args:
            path: of the file, `.svg`, `.pdf` or `.png`.
            steps: of the checkpoints; by default about six, closer together where edges change more.
            at_least: the effect from which on an edge is drawn, as a share of the last one's behaviour.
            columns: how many stand in a row.

        Raises:
            OptionError: if there is no checkpoint of a step, or for another ending.
            FileError: if the file cannot be written.
        """
        chosen = self.told_steps(STRIP) if steps is None else tuple(steps)
        frames = {step: self.at(step, at_least) for step in chosen}
        there = dict(zip(self.steps, self.behaviour, strict=True))
        shown = {
            f"step {step:,}: {round(100 * there[step].value) + 0} %": frame for step, frame in frames.items()
        }
        title = "Edges over training, and how much there is of the last checkpoint's behaviour"
        return draw_strip(shown, path, title=title, columns=columns)

    def told_steps(self, count: int) -> tuple[int, ...]:
        """Some steps, closer together where edges change more: first, last, that at which the circuit formed,
        and those between which all edges together move equally far.

        Args:
            count: about how many.
        """
        moved = np.abs(np.diff(self.effects, axis=0)).sum(axis=1)
        way = np.concatenate([[0.0], np.cumsum(moved)])
        chosen = {self.steps[0], self.steps[-1], *({self.formed.at} - {None})}
        for stops in range(2, len(self.steps) + 1):
            if len(chosen) >= count:
                break
            nearest = np.abs(way[:, None] - np.linspace(0, way[-1], stops)).argmin(axis=0)
            chosen |= {self.steps[at] for at in nearest.tolist()}
        return tuple(step for step in self.steps if step in chosen)

    def _lines(self) -> Iterator[str]:
        when = self._when()
        yield from ("# Over training", "", f"{when[0].upper()}{when[1:]}.", "")
        yield f"Shares of the last checkpoint's behaviour, {self.effect:.3g}, on {counted(self.n, 'pair')}:"
        yield ""
        yield from row("step", "behaviour", "faithfulness of the circuit", header=True)
        for step, behaviour, faithfulness in zip(self.steps, self.behaviour, self.faithfulness, strict=True):
            yield from row(f"{step:,}", str(behaviour), "" if faithfulness is None else str(faithfulness))
        for title, jumps in (("of the behaviour", self.leaps()), ("of edges", self.jumps())):
            if jumps:
                yield from ("", f"## Sharp changes {title}", "")
                yield from row("", "steps", "before", "since", "p, corrected", header=True)
                yield from (line for each in jumps[:LISTED] for line in row(*jump_cells(each)))
                if len(jumps) > LISTED:
                    yield from ("", f"and {len(jumps) - LISTED:,} more.")
        if self.caveats:
            yield from ("", "## Bear in mind", "", *(f"- {each}" for each in self.caveats))

    def _check(self) -> None:
        if any(before >= after for before, after in pairwise(self.steps)) or len(self.steps) < 3:
            raise OptionError("checkpoints are of three steps or more, one after the other")
        if len(self.p) != len(self.steps) - 1:
            raise OptionError(f"{len(self.p)} gaps between {len(self.steps)} checkpoints")
        for name in self.edges:
            self.circuit.graph.edge_index(name)


# -- when it formed ------------------------------------------------------------------------------


def _point(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else Estimate(estimate.value, estimate.value, estimate.value)


def _lie(behaviour: Estimate | None, faithfulness: Estimate | None, window: float) -> bool | None:
    """Whether both are within the window; None where their intervals leave it open."""
    sides = _lies(behaviour, 1 - window, math.inf), _lies(faithfulness, 1 - window, 1 + window)
    return False if False in sides else None if None in sides else True


def _lies(found: Estimate | None, least: float, most: float) -> bool | None:
    """Whether a figure lies in a range, by its interval."""
    if found is None or found.low is None or found.high is None:
        return None
    if least <= found.low and found.high <= most:
        return True
    return False if found.high < least or found.low > most else None


def _first_of_last(steps: Sequence[int], hold: Sequence[bool | None]) -> int | None:
    """The first step from which on something holds to the end.

    Example:
        >>> _first_of_last((0, 10, 20, 30), (True, False, True, True))
        20
    """
    found = None
    for step, holds in zip(reversed(steps), reversed(hold), strict=True):
        if not holds:
            break
        found = step
    return found


# -- which changes are sharp ---------------------------------------------------------------------


def sharp_p(
    values: Float[np.ndarray, "step pair edge"],
    effect: Float[np.ndarray, " pair"],
    steps: Sequence[int],
    tolerance: float,
) -> Float[np.ndarray, "gap edge"]:
    """The p-value of each change between neighbouring checkpoints being no sharp one; see the top.

    Args:
        values: the effect of each edge on each pair, in each checkpoint.
        effect: what changes are shares of the mean of.
        steps: of the checkpoints, three or more.
        tolerance: the share that is no change.

    Example:
        >>> pairs = np.linspace(0.9, 1.1, 8)
        >>> rising = np.array([0.0, 0.0, 1.0, 1.0, 1.0])[:, None, None] * pairs[:, None]
        >>> (sharp_p(rising, pairs, (0, 10, 20, 30, 40), 0.1) < 0.01).ravel().tolist()
        [False, True, False, False]
    """
    moves = np.diff(values, axis=0)
    gaps = np.diff(np.asarray(steps, dtype=np.float64)) / (steps[-1] - steps[0])
    pace = gaps / (1 - gaps)
    excess = moves - pace[:, None, None] * (moves.sum(axis=0) - moves)
    shares = [edge_shares(_by_pair(each), effect) for each in (moves, excess)]
    up, down = (
        np.max(
            [stats.t.sf((way * share - tolerance) / error, len(effect) - 1) for share, error in shares],
            axis=0,
        )
        for way in (1, -1)
    )
    return np.asarray(np.minimum(1.0, 2 * np.minimum(up, down)).reshape(len(moves), -1))


def _by_pair(values: Float[np.ndarray, "gap pair edge"]) -> Float[np.ndarray, "pair gap*edge"]:
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


def _jump(name: str, steps: Sequence[int], values: Float[np.ndarray, " 2"], p: float) -> Record:
    before, since = values.tolist()
    after, by = steps
    return {
        "edge": name, "after": after, "by": by, "change": since - before, "before": before, "since": since,
        "p_fdr": float(p),
    }  # fmt: skip


def jump_cells(each: Record) -> tuple[str, ...]:
    """A sharp change in the cells of a table."""
    numbers = (f"{each[name]:+.3f}" for name in ("before", "since"))
    return str(each["edge"]), f"{each['after']:,} to {each['by']:,}", *numbers, f"{each['p_fdr']:.2g}"
