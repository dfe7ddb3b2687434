"""The search behind `find`, in steps between which it can be ended by a clock, left, and taken up again.

`Thin` takes edges away from the whole model and then looks for ever smaller circuits; `Whole` trims the whole
model. Each has the best circuit so far at hand, and says in a `Plan` how far it came.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.attribution.scoring import attribute, without_gradient
from circuitvit.engine import Evaluator, Saved, StateFile, progress_bar
from circuitvit.errors import DataError, OptionError, check_whole
from circuitvit.graph import EdgeMask
from circuitvit.pruning.aims import Aim, Keep, check_keep, figures
from circuitvit.pruning.refine import trimmed, without_dead
from circuitvit.pruning.smaller import Shrinking
from circuitvit.pruning.thinning import Thinner, ThinSettings
from circuitvit.tasks import PreparedTask, kl_divergence
from circuitvit.tasks.metrics import BoundMetric

SMALLEST = 0.01
"""The share of edges that thinning would end at; it stops before, when the behaviour is lost."""

LOST = 0.4
"""How far below the band two circuits in a row may be before thinning stops."""


@dataclass(frozen=True)
class Plan:
    """The numbers that make a search repeatable.

    Attributes:
        steps: in how many rounds thinning would take away all but a hundredth of the edges; 0 where the whole
            model is trimmed.
        trim_runs: masked runs of all pairs after thinning, up to which another step is begun.
        batch_size: pairs at once in thinning.
        seed: of the order of the pairs, and of chance.
        keep: what the circuit is to keep.
        cut: rounds of thinning after which it was cut short; None where it was not.
    """

    steps: int
    trim_runs: int
    batch_size: int
    seed: int = 0
    keep: Keep = "behaviour"
    cut: int | None = None

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, least in {"steps": 0, "trim_runs": 0, "batch_size": 1, "seed": 0}.items():
            check_whole(f"{name} of a plan", getattr(self, name), least)
        if self.cut is not None:
            check_whole("cut of a plan", self.cut, 0)


@dataclass(frozen=True, eq=False, repr=False)
class Candidate:
    """A discrete circuit on the way: its edges, and its faithfulness, agreement and KL on the pairs it was
    found on; the latter are None for a model without classes."""

    kept: EdgeMask
    faithfulness: float
    agreement: float | None = None
    kl: float | None = None

    @property
    def size(self) -> int:
        return int(self.kept.sum())

    def __repr__(self) -> str:
        return f"Candidate({self.size:,} edges, {both(self.faithfulness, self.agreement)})"


# -- the clock -----------------------------------------------------------------------------------


class TimeIsUp(Exception):
    """The time that was given is over."""


class Clock:
    """Reads the time whenever circuits have been run, and ends the search when it is over.

    Args:
        evaluator: of the task; of processes that share it, the first one's clock goes for all.
        deadline: in seconds; None for no end.
        begun: when the search began.
    """

    def __init__(self, evaluator: Evaluator, deadline: float | None, begun: float) -> None:
        self.evaluator, self.deadline, self.begun = evaluator, deadline, begun
        self._read, self._longest = begun, 0.0

    @property
    def gone(self) -> float:
        """Seconds since the search began; of one that goes on, with those of the part before."""
        return time.monotonic() - self.begun

    def check(self) -> None:
        """End the search if the next few runs would take it past its time.

        Raises:
            TimeIsUp: then.
        """
        if self.deadline is None:
            return
        now = time.monotonic()
        self._longest = max(now - self._read, self._longest / 2)
        self._read = now
        if self.evaluator.agreed(self.gone + self._longest / 2 > self.deadline):
            raise TimeIsUp


# -- the searches --------------------------------------------------------------------------------


class Thin:
    """The search that thins, trims and disturbs, in steps between which it can be left and taken up.

    Attributes:
        candidates: circuits that thinning passed, largest first; the first is the whole model.
        best: the smallest circuit in the band after the last whole step.
        minimal: whether no single edge of it can go.
        done: the plan, as far as it was carried out in whole steps.
        last: what is needed to go on from there.
    """

    def __init__(self, evaluator: Evaluator, aim: Aim, plan: Plan, state: StateFile) -> None:
        self.evaluator, self.aim, self.plan, self.state = evaluator, aim, plan, state
        self.first = candidate(evaluator, without_dead(evaluator.prepared, evaluator.graph.edge_mask))
        self.thinner = thinner_of(evaluator, aim, plan)
        self.candidates: tuple[Candidate, ...] = (self.first,)
        self.shrinking: Shrinking | None = None
        self.before = evaluator.runs  # where shrinking began
        self.done, self.gone = replace(plan, trim_runs=0, cut=0), 0.0
        self.best, self.minimal, self.last = self.first, False, Saved()
        if state.saved is not None:
            self._restore(state.saved)

    @property
    def rounds(self) -> int:
        """Of thinning, so far."""
        return len(self.candidates) - 1

    def run(self, clock: Clock, progress: bool) -> None:
        with progress_bar(self.first.size, "taking edges away", progress) as bar:
            bar.update(self.first.size - self.candidates[-1].size)
            while not self._is_thin():
                self._thin()
                bar.update(self.candidates[-2].size - self.candidates[-1].size)
                bar.set_postfix_str(said(self.candidates[-1]), refresh=False)
                self._note(clock)
                clock.check()
        if self.plan.cut is None:
            self._shrink(clock, progress)

    def _shrink(self, clock: Clock, progress: bool) -> None:
        self.done = replace(self.done, cut=None)
        if self.shrinking is None and self.plan.trim_runs:
            self.before = self.evaluator.runs
            enough = [each for each in self.candidates if getattr(each, self.aim.name) >= self.aim.band[0]]
            start = min(enough, key=lambda each: each.size).kept  # above the band there may be a smaller one
            self.shrinking = self._shrinking(smallest(self.candidates, self.aim).kept, start)
        total = round(clock.deadline or 0) or self.plan.trim_runs
        with progress_bar(total, "getting smaller", progress, "second" if clock.deadline else "run") as bar:
            while self.shrinking is not None and not self.shrinking.is_over:
                if self.done.trim_runs >= self.plan.trim_runs:
                    break
                self.shrinking.step()
                self.done = replace(self.done, trim_runs=self.evaluator.runs - self.before)
                self._note(clock)
                now = clock.gone if clock.deadline else self.done.trim_runs
                bar.update(min(total, round(now)) - bar.n)
                bar.set_postfix_str(said(self.best), refresh=False)

    def _is_thin(self) -> bool:
        """Whether thinning has ended: hardly an edge is left, or the behaviour is lost, or a plan cut it
        short."""
        few = self.first.size / 4
        lost = [
            getattr(each, self.aim.name) < self.aim.band[0] - LOST and each.size < few
            for each in self.candidates[-2:]
        ]
        cut = self.plan.cut is not None and self.rounds >= self.plan.cut
        return cut or all(lost) or self.candidates[-1].size <= max(1, SMALLEST * self.first.size)

    def _thin(self) -> None:
        """One round, and what its circuit keeps."""
        self.thinner.step(1)
        self.thinner.kept = self.evaluator.agreed(self.thinner.kept)
        self.candidates = (*self.candidates, candidate(self.evaluator, self.thinner.kept))
        self.done = replace(self.done, cut=self.rounds)

    def _shrinking(self, best: EdgeMask, start: EdgeMask) -> Shrinking:
        return Shrinking(self.evaluator, self.aim, self._slopes, best, start, self.plan.seed)

    def _slopes(self, kept: EdgeMask, absent: bool) -> Float[NDArray[np.float64], "sender receiver group"]:
        """What the behaviour would lose without each edge; for predictions, how much nearer to the model's an
        edge brings them."""
        if self.aim.keep == "behaviour" and self.evaluator.prepared.metric.metric.differentiable:
            return self.evaluator.slopes(kept, absent=absent) / float(self.evaluator.effect.mean())
        return -self.evaluator.slopes(kept, of="divergence", absent=absent)

    def _note(self, clock: Clock) -> None:
        """A step is whole."""
        self._look()
        self.gone = clock.gone
        if self.state.path is not None:
            self.last = self._saved()
            self.state.keep(self.saved)

    def _look(self) -> None:
        """What the best circuit is now."""
        if self.shrinking is None:
            self.best = smallest(self.candidates, self.aim)
        else:
            self.best = candidate(self.evaluator, self.shrinking.best)
            self.minimal = self.shrinking.minimal

    def saved(self) -> Saved:
        """All that is needed to go on from the last whole step, with everything that was measured."""
        return replace(self.last, tensors={**self.last.tensors, **self.evaluator.table()})

    def _saved(self) -> Saved:
        part = Saved() if self.shrinking is None else self.shrinking.state()
        thinner = self.thinner.state()
        kept = torch.from_numpy(np.stack([each.kept for each in self.candidates]).astype(np.uint8))
        numbers = {
            **thinner.numbers, **part.numbers, "plan": asdict(self.plan), "done": asdict(self.done),
            "before": self.before, "runs": self.evaluator.runs, "gone": self.gone,
        }  # fmt: skip
        return Saved({**thinner.tensors, **part.tensors, "candidates": kept}, numbers)

    def _restore(self, saved: Saved) -> None:
        self.thinner.restore(saved)
        masks = saved.tensors["candidates"].numpy().astype(bool)
        self.candidates = tuple(candidate(self.evaluator, kept) for kept in masks)
        self.done, self.before = Plan(**saved.numbers["done"]), int(saved.numbers["before"])
        if "shrinking" in saved.numbers:
            self.shrinking = self._shrinking(self.first.kept, self.first.kept)
            self.shrinking.restore(saved)
        self._look()
        self.last = self._saved()


class Whole:
    """The search that trims the whole model, edges of small exact effect first."""

    def __init__(self, evaluator: Evaluator, aim: Aim, plan: Plan, state: StateFile) -> None:
        self.evaluator, self.aim, self.plan, self.state = evaluator, aim, plan, state
        self.first = self.best = candidate(
            evaluator, without_dead(evaluator.prepared, evaluator.graph.edge_mask)
        )
        self.candidates, self.minimal, self.gone = (self.first,), False, 0.0
        self.before, self.done = evaluator.runs, replace(plan, trim_runs=0)

    def run(self, clock: Clock, progress: bool) -> None:
        prepared, evaluator = self.evaluator.prepared, self.evaluator
        evaluator.after_run = lambda: self._note(clock)
        kl = kl_divergence()
        prediction = BoundMetric(kl, kl.name, None, None, flat_at_clean=True)
        scored = prepared if self.aim.keep == "behaviour" else replace(prepared, metric=prediction)
        order = np.abs(attribute(prepared.model, scored, "exact", progress=progress).values)
        self.before = evaluator.runs
        kept, self.minimal = trimmed(
            evaluator, self.first.kept, order, self.aim, self.plan.trim_runs, self._take, progress
        )
        self.best = candidate(evaluator, kept)
        self.done = replace(self.plan, trim_runs=evaluator.runs - self.before)

    def _take(self, kept: EdgeMask) -> None:
        self.best = candidate(self.evaluator, kept)
        self.done = replace(self.plan, trim_runs=self.evaluator.runs - self.before)

    def _note(self, clock: Clock) -> None:
        self.gone = clock.gone
        self.state.keep(self.saved)
        clock.check()

    def saved(self) -> Saved:
        """What has been measured, on which the same search is soon where it was."""
        return Saved(self.evaluator.table(), {"plan": asdict(self.plan), "gone": self.gone})


def followed(prepared: PreparedTask, keep: Keep) -> Keep:
    """What thinning follows: the metric, or where it has no slope to go by the prediction.

    Raises:
        OptionError: if there is neither.
    """
    if keep == "behaviour" and not without_gradient(prepared):
        return "behaviour"
    if keep == "behaviour" and not prepared.model.chooses:
        raise OptionError(
            f"without classes edges are taken away by the metric's slope alone, and "
            f"{prepared.metric.metric.name!r} has none: choose another metric, or find(..., start='whole')"
        )
    return "prediction"


def thinner_of(evaluator: Evaluator, aim: Aim, plan: Plan) -> Thinner:
    """The rounds of a plan, which lose the less the narrower the band is."""
    rate = 1 - SMALLEST ** (1 / plan.steps)
    follow = followed(evaluator.prepared, plan.keep)
    tolerance = min(ThinSettings.tolerance, (1 - aim.band[0]) / 2) or ThinSettings.tolerance
    settings = ThinSettings(
        rate=rate, batch_size=plan.batch_size, seed=plan.seed, keep=follow, tolerance=tolerance
    )
    return Thinner(evaluator.prepared, settings, evaluator)


# -- circuits on the way -------------------------------------------------------------------------


def candidate(evaluator: Evaluator, kept: EdgeMask) -> Candidate:
    return Candidate(kept, *figures(evaluator, kept))


def smallest(candidates: tuple[Candidate, ...], aim: Aim) -> Candidate:
    inside = [each for each in candidates if aim.band[0] <= getattr(each, aim.name) <= aim.band[1]]
    if not inside:
        raise DataError(
            "no circuit lies in the band, not even the whole model: the runs are not reproducible"
        )
    return min(inside, key=lambda each: each.size)


def both(faithfulness: float, agreement: float | None) -> str:
    """How much of the behaviour a circuit keeps, and how often the model's top class."""
    top = "" if agreement is None else f", the model's top class on {agreement:.0%}"
    return f"faithfulness {faithfulness:.3f}{top}"


def said(candidate: Candidate) -> str:
    return f"{candidate.size:,} edges, {both(candidate.faithfulness, candidate.agreement)}"
