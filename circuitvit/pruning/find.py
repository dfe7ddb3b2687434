"""`find`: the smallest faithful circuit that a given time allows. The call that most people want.

A learned mask is trained while its target size falls from all edges towards a hundredth of them. Now and then
its discrete circuit is run, so that one training gives a family of circuits with their faithfulness. The
smallest that lies in the band is trimmed by exact ablation until no single edge can go.

What is kept is the behaviour, or with `keep="prediction"` the model's own top class on the clean images: the
mask is then learned by the KL of predictions over all classes, and the band is one of agreement.

On a small model nothing needs to be learned: the whole model is trimmed itself, edge after edge from the
smallest exact effect on. Nothing in that is random, so every seed gives the same circuit.

The time is turned into numbers of steps before the work starts, from a short measurement; the numbers are
recorded, and a run with the same numbers and seed gives the identical circuit on the same machine.

A faithful circuit is seldom unique. `find_several` searches with several seeds: edges that every search keeps
are those that the behaviour cannot do without, as far as the searches can tell; the others may be one of
several ways to the same end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit._keywords import running
from circuitvit.attribution.budget import seconds
from circuitvit.attribution.scoring import attribute, provenance_of
from circuitvit.engine import Evaluator, Saved, StateFile, announce, progress_bar
from circuitvit.errors import DataError, OptionError, check_number, check_whole, counted
from circuitvit.graph import Circuit, EdgeMask, notebook
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.aims import Aim, Band, Keep, check_keep, check_predicts, figures
from circuitvit.pruning.learned import MaskSettings, MaskTrainer
from circuitvit.pruning.refine import Refinement, changed, noising_evaluator, refine, without_dead
from circuitvit.tasks import PreparedTask, Task, kl_divergence, prepare
from circuitvit.tasks.metrics import BoundMetric

SMALLEST = 0.01
"""The share of edges that the schedule ends at; training stops long before, when the behaviour is lost."""

CHECKPOINTS = 40
"""How often along the schedule the discrete circuit is run."""

TRAINING_SHARE = 0.6
"""Share of the time that is planned for training; the rest is for trimming."""

STEP_LIMITS = (120, 2000)
MEASURED_STEPS = 3
LEAST_TRIM_RUNS = 50

LOST = 0.2
"""How far below the band a circuit may fall at two checkpoints in a row before training stops."""

MARGIN = 0.05
"""With several pairs the band of faithfulness is narrowed by this on both sides: it varies on other images.
"""

SMALL = 500
"""Edges up to which the whole model is trimmed unless told otherwise."""

Start = Literal["mask", "whole"]
"""What is trimmed: the smallest faithful circuit that a learned mask passes through, or the whole model."""


@dataclass(frozen=True)
class Plan:
    """The numbers that make a search repeatable.

    Attributes:
        steps: of mask training; 0 where the whole model is trimmed.
        trim_runs: most masked runs of all pairs that trimming may take.
        batch_size: pairs in a training step.
        seed: of the training.
        keep: what the circuit is to keep.
    """

    steps: int
    trim_runs: int
    batch_size: int
    seed: int = 0
    keep: Keep = "behaviour"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        for name, least in {"steps": 0, "trim_runs": 1, "batch_size": 1, "seed": 0}.items():
            check_whole(f"{name} of a plan", getattr(self, name), least)


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
        return f"Candidate({self.size:,} edges, {_both(self)})"


@dataclass(frozen=True, eq=False, repr=False)
class Finding(Result):
    """What `find` found.

    Attributes:
        circuit: the smallest one in the band.
        faithfulness: on the pairs that it was found on; verify it on others.
        minimal: whether no single edge can be dropped without leaving the band.
        candidates: circuits of all sizes that the training passed through, largest first.
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
        return f"Finding({self.circuit!r}, {_both(self)}; {ending})"

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

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        keep: "behaviour" keeps the metric's mean; "prediction" keeps, image by image, the top class of the
            model itself, of all its classes.
        faithfulness: the least that counts as carrying the behaviour; the band is [f, 2 - f]. Not looked at
            where the prediction is kept.
        agreement: where the prediction is kept: the least share of the pairs on which the circuit's top class
            on the clean image is the model's.
        within: the time to aim for, such as "90s" or "3m"; the search ends somewhat sooner or later.
        start: "mask" trims the smallest faithful circuit that a learned mask passes through; "whole" trims
            the whole model, edges of small exact effect first. The latter has nothing random in it and, on a
            model of some hundred edges, takes no longer and gives smaller circuits: it is the default up to
            500 edges.
        plan: the numbers of an earlier search, to repeat it; `within`, `seed` and `start` are then not looked
            at. It is a plan for what is kept.
        state: a file in which the search keeps what it has done: given again after an interruption, with
            the same model, task and settings, it goes on where it was and finds the identical circuit.
            Deleted at the end.
        processes: share the pairs, or of few pairs the circuits that are run, among the processes of
            `torch.distributed`, which must all make this call; each gets what was found.
        seed: of the training.
        batch_size: pairs in a training step.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the faithfulness or the agreement is not between 0 and 1, the start is no such word,
            the task is denoising, a model without classes is to keep its prediction, or the plan is for
            keeping something else.
        DataError: if the metric does not differ between clean and ablated runs, or the prediction is to be
            kept and does not.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> finding = cv.find(model, task, within="2m")  # doctest: +SKIP
        >>> finding.circuit.draw("circuit.svg")  # doctest: +SKIP
    """
    check_number("the faithfulness asked for", faithfulness, 0, 1)
    _check_agreement(agreement)
    check_keep(keep)
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(f"a plan is a cv.Plan, such as finding.plan, not {plan!r}")
    if plan is not None and plan.keep != keep:
        raise OptionError(f"the plan is for keep={plan.keep!r}, and the search is asked for keep={keep!r}")
    if state is not None and not isinstance(state, (str, Path)):
        raise OptionError(f"state= is the path of a file, not {state!r}")
    if start not in (None, "mask", "whole"):
        raise OptionError(f"a search starts from the 'mask' or the 'whole' model, not {start!r}")
    deadline = seconds(within)
    prepared = prepare(model, task, progress, processes)
    start = start or ("whole" if prepared.graph.n_edges <= SMALL else "mask")
    if keep == "prediction":
        check_predicts(model)
    asked = agreement if keep == "prediction" else faithfulness
    aim = Aim(keep, (agreement, 1.0) if keep == "prediction" else _band(faithfulness, len(prepared)))
    wanted = plan or f"within {deadline:g} s, seed {seed}, {batch_size} pairs at once, from the {start}"
    work = f"find, {aim.name} {asked!r}, memory {memory}, {wanted}"
    with StateFile(state, prepared, work) as kept_in:
        evaluator = noising_evaluator(prepared, memory=memory)
        if kept_in.saved is not None:
            plan = Plan(**kept_in.saved.numbers["plan"])
            evaluator.recall(kept_in.saved.tensors)
        aim.check(evaluator)
        floor = ""
        if plan is None:
            make = _plan_from_whole if start == "whole" else _plan
            plan, needed = make(evaluator, deadline, Plan(1, 1, min(batch_size, len(prepared)), seed, keep))
            if needed > deadline:
                least = f"{LEAST_TRIM_RUNS} runs"
                least = f"{plan.steps} steps and {least}" if plan.steps else least
                floor = (
                    f"A search takes at least {least}, which may need {_time(needed)} instead of the "
                    f"{deadline:g} s asked for. Fewer pairs take less."
                )
                announce(floor, progress)
        found = _find(evaluator, aim, asked, plan, kept_in, progress)
        wrong = prepared.metric.swapped(evaluator.whole, evaluator.nothing)
        notes = [found.summary, floor, f"Of {counted(len(prepared), 'pair')}, {wrong}." if wrong else ""]
        return replace(found, summary=" ".join(filter(None, notes)))


def _check_agreement(agreement: object) -> None:
    if agreement != 1:  # which is to keep the top class on every pair
        check_number("the agreement asked for", agreement, 0, 1)


def _band(faithfulness: float, n_pairs: int) -> Band:
    """The band of faithfulness on the pairs of a search, for some faithfulness on others like them."""
    margin = min(MARGIN, (1 - faithfulness) / 2) if n_pairs > 1 else 0.0
    return round(faithfulness + margin, 6), round(2 - faithfulness - margin, 6)


def _find(
    evaluator: Evaluator, aim: Aim, asked: float, plan: Plan, state: StateFile, progress: bool
) -> Finding:
    """Train or take the whole, then trim, by a plan."""
    prepared = evaluator.prepared
    order, candidates = (_train if plan.steps else _whole)(evaluator, plan, aim, state, progress)
    chosen = _smallest(candidates, aim)
    provenance = provenance_of(prepared, "find", plan.seed).with_parameters(
        steps=plan.steps, trim_runs=plan.trim_runs, batch_size=plan.batch_size, keep=plan.keep,
        **{aim.name: asked},
    )  # fmt: skip
    refined = refine(
        prepared.model,
        prepared,
        Circuit(prepared.graph, chosen.kept, provenance=provenance),
        order=order,
        keep=aim.keep,
        band=aim.band,
        max_runs=plan.trim_runs,
        evaluator=evaluator,
        progress=progress,
    )
    summary = _summary(prepared, plan, chosen, refined, aim)
    return Finding(
        refined.circuit, refined.faithfulness, refined.minimal, candidates, plan, summary,
        refined.agreement, refined.kl,
    )  # fmt: skip


def _time(duration: float) -> str:
    """A duration as people say it."""
    return f"{duration:.2g} s" if duration < 100 else f"{duration / 60:.0f} minutes"


# -- plans ---------------------------------------------------------------------------------------


def _plan(evaluator: Evaluator, deadline: float, given: Plan) -> tuple[Plan, float]:
    """Turn seconds into numbers of steps and runs, from a few measured ones, and say what these will take.

    Args:
        evaluator: of the task.
        deadline: in seconds.
        given: what of the plan is given: all but these numbers.
    """
    prepared, batch_size = evaluator.prepared, given.batch_size
    settings = MaskSettings(batch_size=batch_size, keep=given.keep)
    trainer = MaskTrainer(prepared, prepared.graph.n_edges, settings, evaluator=evaluator)
    trainer.step()  # the first one allocates
    begin = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        trainer.step()
    per_step = (time.perf_counter() - begin) / MEASURED_STEPS
    per_run = per_step / batch_size / 3 * len(prepared)  # forward and backward cost three forwards
    steps = int((deadline * TRAINING_SHARE - 2 * CHECKPOINTS * per_run) / per_step)
    steps = min(max(steps, STEP_LIMITS[0]), STEP_LIMITS[1])
    trim_runs = max(LEAST_TRIM_RUNS, int(deadline * (1 - TRAINING_SHARE) / per_run))
    needed = steps * per_step + (2 * CHECKPOINTS + trim_runs) * per_run
    return evaluator.agreed((replace(given, steps=steps, trim_runs=trim_runs), needed))


def _plan_from_whole(evaluator: Evaluator, deadline: float, given: Plan) -> tuple[Plan, float]:
    """Turn seconds into a number of runs, from one of nearly the whole model, which is the slowest; and the
    seconds that they need.
    """
    edges = evaluator.graph.edge_mask
    begin = time.perf_counter()
    evaluator.values(changed(edges, [tuple(np.argwhere(edges)[-1])], False))  # the whole is known already
    took = time.perf_counter() - begin
    runs = max(LEAST_TRIM_RUNS, int(deadline / took))
    return evaluator.agreed((replace(given, steps=0, trim_runs=runs), runs * took))


# -- what is trimmed -----------------------------------------------------------------------------


def _whole(
    evaluator: Evaluator, plan: Plan, aim: Aim, state: StateFile, progress: bool
) -> tuple[NDArray[np.float64], tuple[Candidate, ...]]:
    """The magnitudes of the exact effects of all edges, on the metric or on the prediction as a whole, and
    the whole model."""
    prepared = evaluator.prepared
    evaluator.after_run = partial(_note, state, evaluator, Saved({}, {"plan": asdict(plan)}))
    kl = kl_divergence()
    prediction = BoundMetric(kl, kl.name, None, None, flat_at_clean=True)
    scored = prepared if aim.keep == "behaviour" else replace(prepared, metric=prediction)
    scores = attribute(prepared.model, scored, "exact", progress=progress)
    whole = without_dead(prepared, prepared.graph.edge_mask)
    return np.abs(scores.values), (_candidate(evaluator, whole),)


def _train(
    evaluator: Evaluator, plan: Plan, aim: Aim, state: StateFile, progress: bool
) -> tuple[NDArray[np.float64], tuple[Candidate, ...]]:
    """Train until the schedule ends or the behaviour is lost; give how open edges are, and the circuits."""
    prepared = evaluator.prepared
    edges = max(1, round(SMALLEST * prepared.graph.n_edges))
    settings = MaskSettings(
        steps=plan.steps, batch_size=plan.batch_size, seed=plan.seed, ramp=1.0, keep=plan.keep
    )
    trainer = MaskTrainer(prepared, edges, settings, evaluator=evaluator)
    every = max(1, plan.steps // CHECKPOINTS)
    candidates = [_candidate(evaluator, prepared.graph.edge_mask)]
    done = lost = 0
    if state.saved is not None and "phi" in state.saved.tensors:
        trainer.restore(state.saved)
        recalled = state.saved.tensors["candidates"].numpy().astype(bool)
        candidates = [_candidate(evaluator, kept) for kept in recalled]
        done, lost = state.saved.numbers["done"], state.saved.numbers["lost"]
    with progress_bar(plan.steps, "learning a mask", progress) as bar:
        bar.update(done)
        while done < plan.steps and lost < 2:
            trainer.step()
            done += 1
            bar.update()
            if done % every == 0:
                kept = without_dead(prepared, trainer.open_edges())
                candidates.append(_candidate(evaluator, kept))
                bar.set_postfix_str(f"{candidates[-1].size:,} edges, {_both(candidates[-1])}", refresh=False)
                lost = lost + 1 if aim.value(evaluator, kept) < aim.band[0] - LOST else 0
            if state.path is not None:
                _note(state, evaluator, _training(trainer, candidates, plan, done, lost))
    evaluator.after_run = partial(_note, state, evaluator, _training(trainer, candidates, plan, done, lost))
    openness = np.where(prepared.graph.edge_mask, trainer.openness(), 0.0)
    return openness, tuple(sorted(candidates, key=lambda each: -each.size))


def _training(trainer: MaskTrainer, candidates: list[Candidate], plan: Plan, done: int, lost: int) -> Saved:
    """Where the training is, for the state file."""
    state = trainer.state()
    kept = torch.from_numpy(np.stack([each.kept for each in candidates]).astype(np.uint8))
    numbers = {**state.numbers, "plan": asdict(plan), "done": done, "lost": lost}
    return Saved({**state.tensors, "candidates": kept}, numbers)


def _note(state: StateFile, evaluator: Evaluator, training: Saved) -> None:
    """Keep where the training is, and everything that has been measured."""
    state.keep(lambda: Saved({**training.tensors, **evaluator.table()}, training.numbers))


def _candidate(evaluator: Evaluator, kept: EdgeMask) -> Candidate:
    return Candidate(kept, *figures(evaluator, kept))


def _smallest(candidates: tuple[Candidate, ...], aim: Aim) -> Candidate:
    inside = [each for each in candidates if aim.band[0] <= getattr(each, aim.name) <= aim.band[1]]
    if not inside:
        raise DataError(
            "no circuit lies in the band, not even the whole model: the runs are not reproducible"
        )
    return min(inside, key=lambda each: each.size)


# -- what is said --------------------------------------------------------------------------------


def _both(found: Candidate | Finding | Refinement) -> str:
    """How much of the behaviour a circuit keeps, and how often the model's top class."""
    top = "" if found.agreement is None else f", the model's top class on {found.agreement:.0%}"
    return f"faithfulness {found.faithfulness:.3f}{top}"


def _summary(prepared: PreparedTask, plan: Plan, start: Candidate, refined: Refinement, aim: Aim) -> str:
    circuit = refined.circuit
    pairs = counted(len(prepared), "pair")
    low, high = aim.band
    if aim.keep == "behaviour":
        order, within = "effect", f"in the band [{low:.2f}, {high:.2f}]"
        fitting = f"which {within}"
    else:
        order, within = (
            "effect on the prediction",
            f"with the model's top class on at least {low:.0%} of them",
        )
        fitting = f"to edges {within}; that"
    learned = (
        f"A mask was learned in up to {plan.steps} steps on {pairs}. Its smallest circuit {within} had "
        f"{start.size:,} edges; trimming by exact ablation"
    )
    trimmed = f"The whole model was trimmed on {pairs}, edges of small exact {order} first, {fitting}"
    edges = f"{len(circuit):,} of {prepared.graph.n_edges:,} edges ({circuit.density:.1%})"
    ending = (
        "no single edge can be dropped"
        if refined.minimal
        else "trimming ran out of its budget, so some edges may still be dropped: give more time"
    )
    top = ""
    if refined.agreement is not None:
        top = f" and the model's top class on {refined.agreement:.0%} of the pairs"
    return (
        f"{learned if plan.steps else trimmed} left {edges} with faithfulness {refined.faithfulness:.2f}"
        f"{top}: {ending}."
    )


# -- several seeds -------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Several circuits of one graph, found with other seeds or on other pairs: what they have in common.

    Attributes:
        circuits: at least one.
        findings: of the searches that gave them, where `find_several` made them.
        at_least: the share of circuits from which on an edge belongs to the consensus.
    """

    circuits: tuple[Circuit, ...]
    findings: tuple[Finding, ...] = ()
    at_least: float = 0.5

    def records(self) -> Iterator[Record]:
        """One row for each edge that any circuit has, most often first: `edge`, its `frequency` (0 to 1),
        and whether it is in the `consensus`."""
        consensus = self.consensus
        for edge, frequency in self.frequency.items():
            yield {"edge": edge, "frequency": frequency, "consensus": edge in consensus}

    @property
    def shared(self) -> Circuit:
        """The edges that every circuit has; they need not make a circuit on their own."""
        return reduce(lambda a, b: a & b, self.circuits)

    @property
    def union(self) -> Circuit:
        """The edges that any circuit has."""
        return reduce(lambda a, b: a | b, self.circuits)

    @property
    def consensus(self) -> Circuit:
        """The edges of circuits enough, without dead ones; it carries their frequencies as its scores."""
        often = np.mean([each.kept for each in self.circuits], axis=0)
        return Circuit(self.circuits[0].graph, often >= self.at_least, often).pruned()

    @property
    def overlap(self) -> float:
        """The mean Jaccard overlap between two of the circuits, 0 to 1."""
        pairs = [a.jaccard(b) for a, b in combinations(self.circuits, 2)]
        return sum(pairs) / len(pairs) if pairs else 1.0

    @property
    def frequency(self) -> dict[str, float]:
        """How often each edge of the union is kept, 0 to 1, most often first and then in graph order."""
        kept = self.of(self.union)
        return dict(sorted(kept.items(), key=lambda edge: -edge[1]))

    def of(self, circuit: Circuit) -> dict[str, float]:
        """How often each edge of a circuit is kept, 0 to 1, in graph order."""
        return {edge: sum(edge in each for each in self.circuits) / len(self.circuits) for edge in circuit}

    @property
    def summary(self) -> str:
        """How far the circuits agree, in plain sentences."""
        n, sizes = len(self.circuits), sorted(len(circuit) for circuit in self.circuits)
        if all(circuit == self.circuits[0] for circuit in self.circuits):
            return f"All {n} searches found the same circuit of {sizes[0]} edges."
        return (
            f"{n} searches found circuits of {sizes[0]} to {sizes[-1]} edges that overlap by "
            f"{self.overlap:.0%} on average; {len(self.shared)} edges are in all of them, "
            f"{len(self.consensus)} in the consensus (at least {self.at_least:.0%}) and {len(self.union)} in "
            "any. The circuit is not unique: trust the shared edges most."
        )

    def __str__(self) -> str:
        return self.summary

    def __repr__(self) -> str:
        sizes = f"{len(self.shared)} edges in all, {len(self.consensus)} in the consensus"
        return f"Agreement({counted(len(self.circuits), 'circuit')}, overlap {self.overlap:.2f}: {sizes})"

    def _check(self) -> None:
        if not self.circuits:
            raise OptionError("agreement needs at least one circuit")
        for each in self.circuits:
            self.circuits[0].graph.check_same(each.graph, "another of the circuits")


def find_several(model: Model, task: Task, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Agreement:
    """Search once for each seed; the numbers of steps are measured once, for the first.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        seeds: at least two different ones.
        **options: as for `find`; `within` is the time for one search.

    Raises:
        OptionError: if there are fewer than two different seeds.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> print(cv.find_several(model, task, within="60s").summary)  # doctest: +SKIP
    """
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise OptionError(f"agreement needs at least two different seeds, not {list(seeds)}")
    plan = options.pop("plan", None)
    options.setdefault("start", "mask")  # trimming the whole model does not depend on the seed
    findings: list[Finding] = []
    for seed in seeds:
        plan = None if plan is None else replace(plan, seed=seed)
        findings.append(find(model, task, seed=seed, plan=plan, **options))
        plan = findings[0].plan
    return Agreement(tuple(each.circuit for each in findings), tuple(findings))
