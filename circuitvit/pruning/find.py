"""`find`: the smallest faithful circuit that a given time allows. The call that most people want.

Edges are taken away from the whole model, a few per cent at a time, until the behaviour is lost
(`circuitvit.pruning.thinning`). The smallest circuit on that way that lies in the band is trimmed until no
single edge can go, then disturbed and trimmed again, which goes on finding smaller ones
(`circuitvit.pruning.smaller`). The best circuit so far is always at hand (`circuitvit.pruning.anytime`): the
clock is read as the search goes, and at its end, or at Ctrl-C, that circuit is the answer.

What is kept is the behaviour, or with `keep="prediction"` the model's own top class on the clean images:
edges then go by the log-probability of that class, and the band is one of agreement.

On a small model the whole model is trimmed itself, edge after edge from the smallest exact effect on. Nothing
in that is random, so every seed gives the same circuit.

What was in fact done is counted in rounds and runs, not in seconds. The numbers are recorded as the plan, and
a search with the same plan gives the identical circuit on the same machine.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from circuitvit._keywords import running
from circuitvit.attribution.budget import seconds
from circuitvit.attribution.costs import spoken
from circuitvit.attribution.scoring import provenance_of
from circuitvit.engine import Evaluator, Saved, StateFile, announce
from circuitvit.errors import OptionError, check_number, counted
from circuitvit.graph import Circuit, notebook
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Aim, Band, Keep, check_keep, check_predicts
from circuitvit.pruning.anytime import (
    Candidate,
    Clock,
    Plan,
    Thin,
    TimeIsUp,
    Whole,
    both,
    candidate,
    followed,
    said,
    smallest,
    thinner_of,
)
from circuitvit.pruning.refine import changed, noising_evaluator
from circuitvit.tasks import PreparedTask, Task, prepare

ROUNDS = (6, 60)
"""Fewest and most rounds of thinning."""

THINNING_SHARE = 0.3
"""Share of the time that is planned for thinning; the rest is for getting smaller."""

LIGHTER = 0.6
"""What a round of thinning takes on average, as a share of the first."""

LEAST_RUNS = 50
"""After thinning, for a search to have been worth it."""

MARGIN = 0.05
"""With several pairs the band of faithfulness is narrowed by this on both sides: it varies on other images.
"""

SMALL = 500
"""Edges up to which the whole model is trimmed unless told otherwise."""

UNLIMITED = 10**9
"""Runs of a plan that ends by the clock."""

Start = Literal["thin", "whole"]
"""What is trimmed: the smallest faithful circuit that thinning passes through, or the whole model."""


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Result):
    """What `find` found.

    Attributes:
        circuit: the smallest one in the band.
        faithfulness: on the pairs that it was found on; verify it on others.
        minimal: whether no single edge can be dropped without leaving the band.
        candidates: circuits of all sizes that thinning passed through, largest first.
        plan: the numbers that repeat the search.
        summary: what was done, in plain sentences.
        agreement: share of these pairs whose top class is the model's; None for a model without classes.
        kl: mean KL(model || circuit) over these pairs, in nats; None likewise.
    """

    circuit: Circuit
    faithfulness: float
    minimal: bool
    candidates: tuple[Candidate, ...]
    plan: Plan
    summary: str
    agreement: float | None = None
    kl: float | None = None

    def records(self) -> Iterator[Record]:
        """One row for each circuit, the found one first and then the candidates: which it is (`circuit`),
        its number of `edges`, their share of all edges (`density`), its `faithfulness`, `agreement` and
        `kl`."""
        total = self.circuit.graph.n_edges
        found = Candidate(self.circuit.kept, self.faithfulness, self.agreement, self.kl)
        for name, each in [("found", found), *(("candidate", each) for each in self.candidates)]:
            yield {
                "circuit": name,
                "edges": each.size,
                "density": each.size / total,
                "faithfulness": each.faithfulness,
                "agreement": each.agreement,
                "kl": each.kl,
            }

    def __repr__(self) -> str:
        ending = "no single edge can be dropped" if self.minimal else "some edges may still be dropped"
        return f"Finding({self.circuit!r}, {both(self.faithfulness, self.agreement)}; {ending})"

    def __str__(self) -> str:
        return self.summary

    def _repr_html_(self) -> str:
        return self.circuit._repr_html_() + notebook.card(self.summary, ())

    def _check(self) -> None:
        for each in self.candidates:
            if each.kept.shape != self.circuit.graph.shape:
                raise OptionError("a candidate is of another graph than the circuit")


@running
def find(
    model: Model,
    task: Task | PreparedTask,
    *,
    keep: Keep = "behaviour",
    faithfulness: float = 0.9,
    agreement: float = 0.9,
    within: str | float = "120s",
    start: Start | None = None,
    plan: Plan | None = None,
    state: str | Path | None = None,
    processes: bool = False,
    seed: int = 0,
    batch_size: int = 16,
    memory: int | str | None = None,
    progress: bool = True,
) -> Finding:
    """Find the smallest faithful circuit.

    Ctrl-C ends the search with the best circuit found by then; where that is more than half of the model, it
    ends all.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        keep: "behaviour" keeps the metric's mean; "prediction" keeps, image by image, the top class of the
            model itself, of all its classes.
        faithfulness: the least that counts as carrying the behaviour; the band is [f, 2 - f]. Not looked at
            where the prediction is kept.
        agreement: where the prediction is kept: the least share of the pairs on which the circuit's top class
            on the clean image is the model's.
        within: the time that the search may take, such as "90s" or "3m". It ends sooner where it has long
            found nothing smaller.
        start: "thin" trims the smallest faithful circuit that is left when edges are taken away from the
            whole model a few per cent at a time, and goes on looking for smaller ones; "whole" trims the
            whole model, edges of small exact effect first. The latter has nothing random in it, and on a
            model of some hundred edges it is soon done: it is the default up to 500 edges.
        plan: the numbers of an earlier search, to repeat it; `within`, `seed` and `start` are then not looked
            at. It is a plan for what is kept.
        state: a file in which the search keeps what it has done: given again after an interruption, with
            the same model, task and settings, it goes on where it was. Deleted at the end.
        processes: share the pairs, or of few pairs the circuits that are run, among the processes of
            `torch.distributed`, which must all make this call; each gets what was found.
        seed: of the order of the pairs, and of chance.
        batch_size: pairs at once in thinning.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the faithfulness or the agreement is not between 0 and 1, the start is no such word,
            the task is denoising, there is no slope to thin by, a model without classes is to keep its
            prediction, or the plan is for keeping something else.
        DataError: if the metric does not differ between clean and ablated runs, or the prediction is to be
            kept and does not.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> finding = cv.find(model, task, within="2m")  # doctest: +SKIP
        >>> finding.circuit.draw("circuit.svg")  # doctest: +SKIP
    """
    begun = time.monotonic()
    deadline, asked = _checked(keep, faithfulness, agreement, within, start, plan, state)
    prepared = prepare(model, task, progress, processes)
    start = start or ("whole" if prepared.graph.n_edges <= SMALL else "thin")
    if keep == "prediction":
        check_predicts(model)
    if plan.steps if plan else start == "thin":
        followed(prepared, keep)
    aim = Aim(keep, (agreement, 1.0) if keep == "prediction" else _band(faithfulness, len(prepared)))
    wanted = plan or f"within {deadline:g} s, seed {seed}, {batch_size} pairs at once, from the {start}"
    work = f"find, {aim.name} {asked!r}, memory {memory}, {wanted}"
    with StateFile(state, prepared, work) as kept_in:
        evaluator = noising_evaluator(prepared, memory=memory)
        clock = Clock(evaluator, None if plan else deadline, begun)
        floor = ""
        if kept_in.saved is not None:
            plan = taken_up(kept_in.saved, evaluator, clock)
        aim.check(evaluator)
        if plan is None:
            size = min(batch_size, len(prepared))
            plan, needed = _planned(evaluator, aim, clock, Plan(0, UNLIMITED, size, seed, keep), start)
            if needed > deadline:
                floor = (
                    f"A search takes at least some {spoken(needed)} on these pairs, and {deadline:g} s were "
                    "given, so that the circuit is larger than it need be. Fewer pairs take less."
                )
                announce(floor, progress)
        found = _search(evaluator, aim, asked, plan, clock, kept_in, progress)
        wrong = prepared.metric.swapped(evaluator.whole, evaluator.nothing)
        notes = [found.summary, floor, f"Of {counted(len(prepared), 'pair')}, {wrong}." if wrong else ""]
        return replace(found, summary=" ".join(filter(None, notes)))


def _checked(
    keep: Keep,
    faithfulness: float,
    agreement: float,
    within: str | float,
    start: str | None,
    plan: Plan | None,
    state: object,
) -> tuple[float, float]:
    """The time in seconds, and the target of what is kept; refuse what makes no sense."""
    check_number("the faithfulness asked for", faithfulness, 0, 1)
    if agreement != 1:  # which is to keep the top class on every pair
        check_number("the agreement asked for", agreement, 0, 1)
    check_keep(keep)
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(f"a plan is a cv.Plan, such as finding.plan, not {plan!r}")
    if plan is not None and plan.keep != keep:
        raise OptionError(f"the plan is for keep={plan.keep!r}, and the search is asked for keep={keep!r}")
    if state is not None and not isinstance(state, (str, Path)):
        raise OptionError(f"state= is the path of a file, not {state!r}")
    if start not in (None, "thin", "whole"):
        raise OptionError(f"a search starts with 'thin' or from the 'whole' model, not {start!r}")
    return seconds(within), agreement if keep == "prediction" else faithfulness


def _band(faithfulness: float, n_pairs: int) -> Band:
    """The band of faithfulness on the pairs of a search, for some faithfulness on others like them."""
    margin = min(MARGIN, (1 - faithfulness) / 2) if n_pairs > 1 else 0.0
    return round(faithfulness + margin, 6), round(2 - faithfulness - margin, 6)


# -- plans ---------------------------------------------------------------------------------------


def taken_up(saved: Saved, evaluator: Evaluator, clock: Clock) -> Plan:
    """The plan of a search that goes on, with what it has measured and the time that it has taken already."""
    evaluator.recall(saved.tensors, int(saved.numbers.get("runs", 0)))
    clock.begun -= float(saved.numbers["gone"])
    return Plan(**saved.numbers["plan"])


def _planned(evaluator: Evaluator, aim: Aim, clock: Clock, given: Plan, start: Start) -> tuple[Plan, float]:
    """The rounds that fit into the time, from a measured one; and the least seconds that a search takes.

    Args:
        evaluator: of the task.
        aim: what is kept.
        clock: with the deadline.
        given: what of the plan is given: all but these numbers.
        start: what is trimmed.
    """
    edges = evaluator.graph.edge_mask
    assert clock.deadline is not None, "a plan is made for a time"
    if start == "whole":
        begin = time.monotonic()
        evaluator.values(changed(edges, [tuple(np.argwhere(edges)[-1])], False))  # the whole is known already
        return given, evaluator.agreed(LEAST_RUNS * (time.monotonic() - begin))
    thinner = thinner_of(evaluator, aim, replace(given, steps=ROUNDS[1]))
    thinner.step(1)  # the first one allocates
    begin = time.monotonic()
    thinner.step(1)
    evaluator.values(thinner.kept)
    took = LIGHTER * (time.monotonic() - begin)
    rounds = int(THINNING_SHARE * (clock.deadline - clock.gone) / took)
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    return evaluator.agreed((replace(given, steps=rounds), clock.gone + (ROUNDS[0] + LEAST_RUNS / 10) * took))


# -- the search ----------------------------------------------------------------------------------


def _search(
    evaluator: Evaluator, aim: Aim, asked: float, plan: Plan, clock: Clock, state: StateFile, progress: bool
) -> Finding:
    """Do what the plan says, as far as time allows; and what was found, with the plan as far as it was
    carried out."""
    search = (Thin if plan.steps else Whole)(evaluator, aim, plan, state)
    ending = ""
    evaluator.after_run = clock.check
    try:
        search.run(clock, progress)
    except TimeIsUp:
        ending = "the time was over"
    except KeyboardInterrupt:
        if search.best.size > search.first.size / 2 or evaluator.prepared.processes:
            raise  # that is no circuit yet; and processes are not at one place, and could not end together
        ending = "it was interrupted"
        announce(f"Stopped, with {said(search.best)}. Ctrl-C once more ends all.", progress)
        state.keep(search.saved)
        state.stay()
    finally:
        evaluator.after_run = lambda: None
    done = search.done
    prepared, best = evaluator.prepared, candidate(evaluator, search.best.kept)
    provenance = provenance_of(prepared, "find", plan.seed).with_parameters(
        steps=done.steps, trim_runs=done.trim_runs, batch_size=done.batch_size, keep=done.keep,
        band=list(aim.band), **({} if done.cut is None else {"cut": done.cut}), **{aim.name: asked},
    )  # fmt: skip
    circuit = Circuit(prepared.graph, best.kept, None, provenance)
    return Finding(
        circuit, best.faithfulness, search.minimal, search.candidates, done,
        _summary(prepared, search, best, aim, ending), best.agreement, best.kl,
    )  # fmt: skip


# -- what is said --------------------------------------------------------------------------------


def _summary(prepared: PreparedTask, search: Thin | Whole, best: Candidate, aim: Aim, ending: str) -> str:
    pairs, (low, high) = counted(len(prepared), "pair"), aim.band
    if aim.keep == "behaviour":
        order, within = "effect", f"in the band [{low:.2f}, {high:.2f}]"
    else:
        order, within = (
            "effect on the prediction",
            f"with the model's top class on at least {low:.0%} of them",
        )
    if isinstance(search, Whole):
        way = f"The whole model was trimmed on {pairs}, edges of small exact {order} first, {within}; that"
    else:
        start = smallest(search.candidates, aim)
        way = (
            f"Edges were taken away on {pairs} in {counted(search.rounds, 'round')}. The smallest "
            f"circuit {within} had {start.size:,} edges; trimming by exact ablation"
        )
        rounds = 0 if search.shrinking is None else search.shrinking.rounds
        if rounds:
            way += f", and {counted(rounds, 'attempt')} to find a smaller one,"
    left = f"{best.size:,} of {prepared.graph.n_edges:,} edges ({best.size / prepared.graph.n_edges:.1%})"
    top = "" if best.agreement is None else f" and the model's top class on {best.agreement:.0%} of the pairs"
    if search.minimal:
        end = "no single edge can be dropped" + (f"; then {ending}" if ending else "")
    else:
        why = ending or "trimming ran out of its runs"
        end = f"{why}, so some edges may still be dropped: give more time"
    return f"{way} left {left} with faithfulness {best.faithfulness:.2f}{top}: {end}."
