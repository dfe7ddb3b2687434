"""Is a circuit about its own behaviour? Every circuit is ablated on every behaviour, and the losses compared.

A circuit that is needed for one behaviour may be needed for any: an early MLP, the class token's own path. So
the share of each behaviour that is lost without the circuit is measured, and its own has to be larger than
every other's.

The share is a ratio of means over pairs, `mean(whole - without) / mean(whole - nothing)`. Linearised in both
means (the delta method) it is a mean over pairs too, so two behaviours are compared by Welch's t-test, one
sided. Of several others the largest p-value counts, since all of them have to be hurt less (an intersection-
union test, Berger 1982), and p-values of several circuits are adjusted by Holm's method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError, check_number
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.find import find
from circuitvit.tasks import PreparedTask, Task, prepare, split
from circuitvit.verification.statistics import (
    MIN_PAIRS,
    ROUNDING,
    Bootstrap,
    Estimate,
    estimated,
    holm,
    percent,
    ratio_interval,
)

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

ALPHA = 0.01
"""Below this p-value a circuit is called specific."""

OWN = "this behaviour"
"""What the behaviour of a report is called beside others."""

SMALL = 1e-12
"""Smaller p-values are said to be below it: so far out no test keeps its promises."""

Pairs = Float[np.ndarray, " pair"]


@dataclass(frozen=True)
class CrossEffect:
    """One circuit on one behaviour.

    Attributes:
        circuit: its name, that of the behaviour that it was found on.
        behaviour: the name of the behaviour that it is tried on.
        necessity: the share of the behaviour that is lost without the circuit.
        faithfulness: the share that the circuit alone carries.
        n: how many pairs.
        p: of "it hurts this behaviour no less than its own"; None for its own, or with fewer than 5 pairs.
    """

    circuit: str
    behaviour: str
    necessity: Estimate
    faithfulness: Estimate
    n: int
    p: float | None = None


@dataclass(frozen=True, repr=False)
class Specificity(Result):
    """Every circuit on every behaviour.

    Attributes:
        names: of the behaviours, and of the circuits, in the same order.
        circuits: likewise.
        effects: circuit by circuit, behaviour by behaviour.
        p_values: of each circuit, that it hurts its own behaviour no more than some other, adjusted for the
            number of circuits; None with fewer than 5 pairs.
        alpha: below which a circuit is called specific.

    Example:
        >>> specificity(model, {"species": task, "place": other})  # doctest: +SKIP
    """

    names: tuple[str, ...]
    circuits: tuple[Circuit, ...]
    effects: tuple[CrossEffect, ...]
    p_values: tuple[float | None, ...]
    alpha: float = ALPHA

    along: ClassVar[str] = "circuits:names p_values:names"

    def records(self) -> Iterator[Record]:
        """One row for each circuit and behaviour: their names, `necessity` and `faithfulness` with the ends
        of their intervals (`_low`, `_high`), the number of pairs `n`, the p-value `p` of the two behaviours,
        and whether it is the circuit's `own`."""
        for each in self.effects:
            yield {
                "circuit": each.circuit,
                "behaviour": each.behaviour,
                "own": each.circuit == each.behaviour,
                **estimated("necessity", each.necessity),
                **estimated("faithfulness", each.faithfulness),
                "n": each.n,
                "p": each.p,
            }

    def effect(self, circuit: str, behaviour: str) -> CrossEffect:
        """One circuit on one behaviour, by their names.

        Raises:
            OptionError: if there is no such.
        """
        for each in self.effects:
            if (each.circuit, each.behaviour) == (circuit, behaviour):
                return each
        raise OptionError(f"there is no {circuit!r} on {behaviour!r}: there are {', '.join(self.names)}")

    @property
    def specific(self) -> tuple[str, ...]:
        """The circuits that hurt their own behaviour more than any other."""
        pairs = zip(self.names, self.p_values, strict=True)
        return tuple(name for name, p in pairs if p is not None and p < self.alpha)

    def figure(self) -> Picture:
        """A matrix: the share of each behaviour (across) that is lost without each circuit (down)."""
        from circuitvit.views.certainty import lost_figure

        said = ["\n".join(self._verdict(name)) for name in self.names]
        return lost_figure(self.names, [each.necessity for each in self.effects], said)

    def __repr__(self) -> str:
        return f"Specificity({self})"

    def __str__(self) -> str:
        said = []
        for name in self.names:
            own, *others = sorted(
                (each for each in self.effects if each.circuit == name),
                key=lambda each: (each.behaviour != name, -each.necessity.value),
            )
            verdict, level = self._verdict(name)
            ours, theirs = (percent(Estimate(each.necessity.value)) for each in (own, others[0]))
            said.append(
                f"Without the circuit of {name} {ours} of {name} is lost and {theirs} of "
                f"{others[0].behaviour}: {verdict} ({level})."
            )
        return " ".join(said)

    def _verdict(self, name: str) -> tuple[str, str]:
        """What is said of a circuit, and its p-value."""
        p = self.p_values[self.names.index(name)]
        level = "too few pairs for a p-value"
        if p is not None:
            level = f"p = {p:.2g}" if p >= SMALL else f"p < {SMALL:g}"
        return "specific" if name in self.specific else "not shown to be specific", level

    def _check(self) -> None:
        if len(set(self.names)) < max(2, len(self.names)):
            raise OptionError("the behaviours are two or more, each of its own name")
        check_number("the level alpha", self.alpha, above=0, below=1)
        if not all(p is None or 0 <= p <= 1 for p in (*self.p_values, *(each.p for each in self.effects))):
            raise OptionError("p-values lie between 0 and 1")
        expected = [(circuit, behaviour) for circuit in self.names for behaviour in self.names]
        if [(each.circuit, each.behaviour) for each in self.effects] != expected:
            raise OptionError("the effects are not those of every circuit on every behaviour, in order")


@running
def specificity(
    model: Model,
    tasks: Mapping[str, Task | PreparedTask],
    circuits: Mapping[str, CircuitLike] | None = None,
    *,
    within: str | float = "120s",
    alpha: float = ALPHA,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Specificity:
    """Does each circuit carry its own behaviour and no other?

    The pairs of two behaviours are taken as independent of each other: give each scenes of its own. Where
    circuits are searched for, the pairs of each task are divided on their own, so that an image that two
    tasks share may be searched on for one and tried for the other.

    Args:
        model: from `load` or `wrap`.
        tasks: two behaviours or more, by name, all on the model's graph.
        circuits: one for each behaviour, by the same names. Test them on pairs that they were not found on.
            By default each is found on half of its task's pairs, and all are tried on the other halves.
        within: the time for each search, see `find`.
        alpha: below which p-value a circuit is called specific.
        n_bootstrap: how often the pairs are resampled for intervals.
        seed: of searches, halves and resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if there are fewer than two behaviours, or circuits of other names or graphs.
        DataError: if a task shows no behaviour, or cannot be divided.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(6), metric=cv.logit_diff("cat", "dog"))
        >>> tasks = {"cat or dog": task, "the same": task.with_options(ablation="mean")}
        >>> full = cv.Circuit.full(model.graph)
        >>> specificity(model, tasks, dict.fromkeys(tasks, full), progress=False).specific
        ()
    """
    check_number("the level alpha", alpha, above=0, below=1)
    names = _names(tasks)
    if circuits is not None and set(circuits) != set(names):
        raise OptionError(
            f"the circuits are called {', '.join(circuits)} and the behaviours {', '.join(names)}: every "
            "behaviour needs its own circuit, by the same name"
        )
    prepared = {name: prepare(model, task, progress) for name, task in tasks.items()}
    if circuits is None:
        circuits, prepared = _found(model, prepared, within, seed, progress)
    chosen = tuple(as_circuit(circuits[name], prepared[name].graph) for name in names)
    for each in prepared.values():
        for circuit in chosen:
            as_circuit(circuit, each.graph)  # refuse another graph before the first run
    settings, columns = Bootstrap(n_resamples=n_bootstrap, seed=seed), []
    with progress_bar(len(names), "specificity", progress, unit="behaviour") as bar:
        for name in names:
            evaluator = Evaluator(prepared[name], batch_size=batch_size, memory=memory)
            columns.append(_Column.of(evaluator, chosen))
            bar.update()
    effects = tuple(
        effect for place, name in enumerate(names) for effect in _row(place, name, names, columns, settings)
    )
    by_circuit = [[each.p for each in effects if each.circuit == name] for name in names]
    return Specificity(names, chosen, effects, adjusted([_largest(row) for row in by_circuit]), alpha)


# -- inside --------------------------------------------------------------------------------------


def _names(tasks: object) -> tuple[str, ...]:
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise OptionError("specificity compares behaviours: give two tasks or more, by name")
    return tuple(tasks)


def _found(
    model: Model, prepared: Mapping[str, PreparedTask], within: str | float, seed: int, progress: bool
) -> tuple[dict[str, CircuitLike], dict[str, PreparedTask]]:
    """A circuit of each behaviour from half of its pairs, and the other halves."""
    halves = {name: split(model, task, 0.5, seed=seed) for name, task in prepared.items()}
    found: dict[str, CircuitLike] = {
        name: find(model, each.discovery, within=within, seed=seed, progress=progress).circuit
        for name, each in halves.items()
    }
    return found, {name: each.held_out for name, each in halves.items()}


def hurt_beside(
    evaluator: Evaluator,
    circuit: Circuit,
    others: Mapping[str, PreparedTask],
    settings: Bootstrap,
    batch_size: int | None = None,
    memory: int | str | None = None,
) -> tuple[CrossEffect, ...]:
    """What one circuit does to other behaviours, each held against its own.

    Args:
        evaluator: of its own behaviour.
        circuit: of the evaluator's graph.
        others: the other behaviours, by name, on the same graph.
        settings: of intervals.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
    """
    if not others:
        return ()
    own, found = _Column.of(evaluator, [circuit]), []
    for name, task in others.items():
        other = _Column.of(Evaluator(task, batch_size=batch_size, memory=memory), [circuit])
        found += list(_row(0, OWN, (OWN, name), (own, other), settings))[1:]
    return tuple(found)


@dataclass(frozen=True, eq=False)
class _Column:
    """One behaviour: what there is to lose, and what each circuit takes and carries, pair by pair."""

    effect: Pairs
    lost: Sequence[Pairs]
    kept: Sequence[Pairs]

    @classmethod
    def of(cls, evaluator: Evaluator, circuits: Sequence[Circuit]) -> _Column:
        evaluator.check_effect()
        kept = [*((~circuit).kept for circuit in circuits), *(circuit.kept for circuit in circuits)]
        rest, own = evaluator.many(kept).reshape(2, len(circuits), -1)  # in one pass over the pairs
        return cls(evaluator.effect, list(evaluator.whole - rest), list(own - evaluator.nothing))


def _row(
    place: int, name: str, names: Sequence[str], columns: Sequence[_Column], settings: Bootstrap
) -> Iterator[CrossEffect]:
    own = columns[place]
    for other, column in zip(names, columns, strict=True):
        found = CrossEffect(
            name,
            other,
            ratio_interval(column.lost[place], column.effect, settings),
            ratio_interval(column.kept[place], column.effect, settings),
            len(column.effect),
        )
        if other != name:
            p = larger_share_p(own.lost[place], own.effect, column.lost[place], column.effect)
            found = replace(found, p=p)
        yield found


def larger_share_p(lost: Pairs, effect: Pairs, other_lost: Pairs, other_effect: Pairs) -> float | None:
    """The p-value of "the share lost of the first behaviour is no larger than that of the second".

    Returns:
        One-sided, by Welch's t-test of the linearised ratios; None with fewer than 5 pairs of either.

    Example:
        >>> whole = np.array([1.0, 2.0, 3.0, 1.5, 2.5])
        >>> larger_share_p(0.8 * whole + [0.1, -0.1, 0, 0.1, 0], whole, 0.1 * whole, whole) < 1e-3
        True
    """
    if min(len(lost), len(other_lost)) < MIN_PAIRS:
        return None
    shares, errors, freedoms = zip(
        *(_linearised(*each) for each in ((lost, effect), (other_lost, other_effect))), strict=True
    )
    error = sum(errors)
    freedom = error**2 / sum(each**2 / below for each, below in zip(errors, freedoms, strict=True))
    return float(stats.t.sf((shares[0] - shares[1]) / np.sqrt(error), freedom))


def _linearised(lost: Pairs, effect: Pairs) -> tuple[float, float, int]:
    """A ratio of means, its variance, which is at least that of rounding, and the degrees of freedom."""
    share, count = lost.sum() / effect.sum(), len(effect)
    spread = (lost - share * effect) / effect.mean()
    return float(share), float(max(spread.var(ddof=1) / count, ROUNDING**2)), count - 1


def _largest(row: Sequence[float | None]) -> float | None:
    """Of a circuit's p-values; None if one is missing besides that of its own behaviour."""
    known = [p for p in row if p is not None]
    return max(known) if len(known) == len(row) - 1 else None


def adjusted(p_values: Sequence[float | None]) -> tuple[float | None, ...]:
    """P-values adjusted for their number by Holm's method; those that are None stay so.

    Example:
        >>> adjusted([0.01, None, 0.04])
        (0.02, None, 0.04)
    """
    known = iter(holm(np.array([p for p in p_values if p is not None])))
    return tuple(None if p is None else float(next(known)) for p in p_values)
