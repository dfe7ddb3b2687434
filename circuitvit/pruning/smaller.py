"""Ever smaller circuits: trim one until no single edge can go, then disturb the best and trim that.

To *trim*, the edges that would be missed least go together, as many as the band allows: first by their
slopes, which one backward pass gives, and where no such block can go any more, by what is left without each
single edge, all of these circuits being run as one batch. A circuit that no single edge can leave is
1-minimal.

There are many such circuits, of very different sizes, and which one is reached hangs on the order of the
edges. So the best one is *disturbed*: a few edges are added that would bring back most of the behaviour, to
first order and with some chance, and the larger circuit is trimmed again. It becomes the best if it is no
larger. On photographs this pays for hundreds of rounds. It is an iterated local search (Lourenço, Martin and
Stützle 2003, "Iterated local search").

The work is cut into steps, each of which begins with nothing but what is kept in a state file: whoever has
the same numbers takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.engine import Evaluator, Saved
from circuitvit.graph import EdgeMask
from circuitvit.pruning.aims import Aim
from circuitvit.pruning.refine import Place, changed, useful_beside, without_dead

AT_ONCE = 64
"""Runs of single pairs that are asked for together; between such batches a clock can be read."""

LEAST_AT_ONCE = 4

SWEEP = 256
"""Edges that are left out one by one before those go that can."""

GROWTH = 1.4
"""In which ratio the blocks grow that are tried together."""

ADDED = (0.05, 0.25)
"""How many edges are added to disturb a circuit, as shares of its own; the longer nothing smaller has been
found, the more, up to `WIDEST` times as many."""

WIDEST = 3

CHANCE = 0.3
"""How far chance outweighs slopes where edges are added or taken away, in units of a mean slope."""

PATIENCE = (20, 60)
"""Rounds without a smaller circuit after which the search is over: as many as the circuit has edges, between
these."""

Slopes = Callable[[EdgeMask, bool], Float[np.ndarray, "sender receiver group"]]
"""What a circuit would lose without each edge, to first order; if asked, also what the others would bring."""


@dataclass
class Shrinking:
    """The search from one circuit to ever smaller ones.

    Args:
        evaluator: of the task.
        aim: what is kept.
        slopes: of a circuit.
        best: a circuit in the band.
        start: one to trim first, in the band or above it.
        seed: of what is added.

    Attributes:
        minimal: whether no single edge can leave the best circuit.
        rounds: how often it was disturbed.
        failures: rounds since it last became smaller.
    """

    evaluator: Evaluator
    aim: Aim
    slopes: Slopes
    best: EdgeMask
    start: EdgeMask
    seed: int = 0
    minimal: bool = False
    rounds: int = 0
    failures: int = 0
    _trial: EdgeMask | None = field(default=None, init=False)
    _order: NDArray[np.float64] | None = field(default=None, init=False)
    _high: float = field(default=0.0, init=False)
    _settled: EdgeMask | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self._begin(self.start, np.random.default_rng(0), 0.0)

    @property
    def is_over(self) -> bool:
        return self._trial is None and self.failures >= self._patience

    @property
    def _patience(self) -> int:
        return int(np.clip(self.best.sum(), *PATIENCE))

    def step(self) -> None:
        """Make the circuit at hand a little smaller, or disturb the best one."""
        if self._trial is None:
            self._disturb()
        elif self._settled is None:
            self._drop_block()
        else:
            self._sweep(self._trial, self._settled)

    # -- trimming --------------------------------------------------------------------------------

    def _begin(self, trial: EdgeMask, rng: np.random.Generator, chance: float) -> None:
        """Take up a circuit that is in the band, or above it."""
        losses = self.slopes(trial, False)
        scale = float(np.abs(losses[trial]).mean()) if trial.any() else 0.0
        self._order = losses + chance * scale * rng.standard_normal(losses.shape)
        self._trial, self._settled = trial, None
        self._high = max(self.aim.band[1], self._value(trial))

    def _drop_block(self) -> None:
        """Leave out the largest block of edges of least slope without which the circuit stays in the band."""
        assert self._trial is not None, "checked by the caller"
        assert self._order is not None, "set with the trial"
        places = self._by(self._order, self._trial)
        rest = self._longest(places, len(places) // 2)
        if rest is None:
            self._settled = np.zeros_like(self._trial)
        else:
            self._take(rest)
            self._order = self.slopes(rest, False)

    def _sweep(self, trial: EdgeMask, settled: EdgeMask) -> None:
        """Leave out edges one by one, and then together those that can go, least missed first."""
        assert self._order is not None, "set with the trial"
        places = self._by(self._order, trial & ~settled)[:SWEEP]
        if not places:
            self._end(trial)
            return
        without = [self._without([place]) for place in places]
        self._measure(without)
        losses = self._losses(trial, without)
        can_go = [n for n in np.argsort(losses, kind="stable").tolist() if self._holds(without[n])]
        stay = [place for n, place in enumerate(places) if n not in set(can_go)]
        rest = self._longest([places[n] for n in can_go], len(can_go))
        if rest is None:
            self._settled = changed(settled, stay, True)
        else:
            self._take(rest)
            # what could not go may well do so now, and is asked again when all others have been
            self._settled = np.zeros_like(trial)
            self._order = np.where(settled | changed(np.zeros_like(trial), stay, True), np.inf, self._order)

    def _end(self, trial: EdgeMask) -> None:
        """No single edge can go any more."""
        self._trial = None
        if self.aim.holds(self.evaluator, trial) and trial.sum() <= self.best.sum():
            self.failures = self.failures + 1 if trial.sum() == self.best.sum() and self.minimal else 0
            self.best, self.minimal = trial, True
        else:
            self.failures += 1
            if not self.minimal:  # it has ended above the band
                self._begin(self.best, np.random.default_rng(0), 0.0)

    def _take(self, smaller: EdgeMask) -> None:
        """Go on with a smaller circuit; it is the best until there is one that is 1-minimal."""
        self._trial = smaller
        if not self.minimal and smaller.sum() < self.best.sum() and self.aim.holds(self.evaluator, smaller):
            self.best = smaller

    def _longest(self, places: Sequence[Place], most: int) -> EdgeMask | None:
        """The circuit without the longest block of the first places that leaves it in the band, if any."""
        lengths = sorted({round(GROWTH**n) for n in range(40) if round(GROWTH**n) <= most} | ({most} - {0}))
        rests = [self._without(places[:length]) for length in lengths]
        self._measure(rests)
        return next((rest for rest in reversed(rests) if self._holds(rest)), None)

    # -- disturbing ------------------------------------------------------------------------------

    def _disturb(self) -> None:
        """Add edges to the best circuit that would bring much."""
        rng = np.random.default_rng([self.seed, self.rounds])
        self.rounds += 1
        brings = self.slopes(self.best, True)
        scale = float(np.abs(brings[self.best]).mean())
        useful = useful_beside(self.evaluator.prepared, self.best) & ~self.best
        wanted = np.where(useful, brings + CHANCE * scale * rng.gumbel(size=brings.shape), -np.inf)
        wider = 1 + (WIDEST - 1) * min(1.0, self.failures / self._patience)
        count = max(1, round(wider * rng.uniform(*ADDED) * int(self.best.sum())))
        first = np.argsort(-wanted, axis=None, kind="stable")[: min(count, int(useful.sum()))]
        grown = self.best.copy()
        grown.flat[first] = True
        grown = without_dead(self.evaluator.prepared, grown)
        if grown.sum() > self.best.sum() and self._value(grown) >= self.aim.band[0]:
            self._begin(grown, rng, CHANCE / 3)
        else:
            self.failures += 1

    # -- runs ------------------------------------------------------------------------------------

    def _measure(self, masks: Sequence[EdgeMask]) -> None:
        """Run circuits together, a few at a time."""
        at_once = max(LEAST_AT_ONCE, AT_ONCE // len(self.evaluator))
        for start in range(0, len(masks), at_once):
            self.evaluator.measure(masks[start : start + at_once])

    def _value(self, kept: EdgeMask) -> float:
        return self.aim.value(self.evaluator, kept)

    def _holds(self, kept: EdgeMask) -> bool:
        """Whether a circuit is in the band, or no higher above it than trimming began."""
        return Aim(self.aim.keep, (self.aim.band[0], self._high)).holds(self.evaluator, kept)

    def _losses(self, trial: EdgeMask, others: Sequence[EdgeMask]) -> NDArray[np.float64]:
        """How much less of what is to be kept other circuits have."""
        if self.aim.keep == "behaviour":
            return np.array([self._value(trial) - self._value(each) for each in others])
        return np.array([self.aim.distance(self.evaluator, each) for each in others])

    def _without(self, places: Sequence[Place]) -> EdgeMask:
        assert self._trial is not None, "only asked while trimming"
        return without_dead(self.evaluator.prepared, changed(self._trial, places, False))

    @staticmethod
    def _by(order: NDArray[np.float64], kept: EdgeMask) -> list[Place]:
        """The kept edges, the smallest first."""
        places = np.argwhere(kept)
        return [tuple(places[n]) for n in np.argsort(order[kept], kind="stable")]

    # -- state -----------------------------------------------------------------------------------

    def state(self) -> Saved:
        """Everything that the next step needs, copied."""
        masks = {"best": self.best, "trial": self._trial, "settled": self._settled}
        tensors = {
            f"shrinking.{name}": torch.from_numpy(mask.astype(np.uint8))
            for name, mask in masks.items()
            if mask is not None
        }
        if self._trial is not None and self._order is not None:
            tensors["shrinking.order"] = torch.from_numpy(self._order.copy())
        numbers = {
            "minimal": self.minimal, "rounds": self.rounds, "failures": self.failures, "high": self._high,
        }  # fmt: skip
        return Saved(tensors, {"shrinking": numbers})

    def restore(self, saved: Saved) -> None:
        """Go on where another one was."""
        found = {
            name.removeprefix("shrinking."): tensor.numpy()
            for name, tensor in saved.tensors.items()
            if name.startswith("shrinking.")
        }
        self.best = found["best"].astype(bool)
        self._trial, self._settled = (
            found[name].astype(bool) if name in found else None for name in ("trial", "settled")
        )
        self._order = found["order"].copy() if "order" in found else None
        numbers = saved.numbers["shrinking"]
        self.minimal, self.rounds, self.failures = (
            numbers[name] for name in ("minimal", "rounds", "failures")
        )
        self._high = numbers["high"]
