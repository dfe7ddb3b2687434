"""`find`: the smallest faithful circuit that a given time allows. The call that most people want.

A learned mask is trained while its target size falls from all edges towards a hundredth of them. Now and then
its discrete circuit is run, so that one training gives a family of circuits with their faithfulness. The
smallest that lies in the band is trimmed by exact ablation until no single edge can go.

On a small model nothing needs to be learned: the whole model is trimmed itself, edge after edge from the
smallest exact effect on. Nothing in that is random, so every seed gives the same circuit.

The time is turned into numbers of steps before the work starts, from a short measurement; the numbers are
recorded, and a run with the same numbers and seed gives the identical circuit on the same machine.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.attribution import attribute, provenance_of
from circuitvit.engine import Saved, StateFile, progress_bar
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.models import Model
from circuitvit.pruning.dead import without_dead
from circuitvit.pruning.learned import MaskSettings, MaskTrainer
from circuitvit.pruning.meter import FaithfulnessMeter
from circuitvit.pruning.refine import Band, refine
from circuitvit.tasks import PreparedTask, Task, prepare

SMALLEST = 0.01
"""The share of edges that the schedule ends at; training stops long before, when the behaviour is lost."""

CHECKPOINTS = 40
"""How often along the schedule the discrete circuit is run."""

TRAINING_SHARE = 0.6
"""Share of the time that is planned for training; the rest is for trimming."""

LONGEST = 1e7
"""Seconds that may be asked for: more than a quarter of a year is a slip of the pen."""

STEP_LIMITS = (120, 2000)
MEASURED_STEPS = 3
LOST = 0.2
"""How far below the band faithfulness may fall at two checkpoints in a row before training stops."""

MARGIN = 0.05
"""With several pairs the band is narrowed by this on both sides: faithfulness varies on other images."""


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
    """

    steps: int
    trim_runs: int
    batch_size: int
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Candidate:
    """A discrete circuit on the way: its edges, and its faithfulness on the pairs it was found on."""

    kept: EdgeMask
    faithfulness: float

    @property
    def size(self) -> int:
        return int(self.kept.sum())


@dataclass(frozen=True, eq=False)
class Finding:
    """What `find` found.

    Attributes:
        circuit: the smallest one in the band.
        faithfulness: on the pairs that it was found on; verify it on others.
        minimal: whether no single edge can be dropped without leaving the band.
        candidates: circuits of all sizes that the training passed through, largest first.
        plan: the numbers that repeat the search.
        summary: what was done, in plain sentences.
    """

    circuit: Circuit
    faithfulness: float
    minimal: bool
    candidates: tuple[Candidate, ...]
    plan: Plan
    summary: str


def find(
    model: Model,
    task: Task | PreparedTask,
    *,
    faithfulness: float = 0.9,
    within: str | float = "120s",
    seed: int = 0,
    batch_size: int = 16,
    memory: int | None = None,
    start: Start | None = None,
    plan: Plan | None = None,
    state: str | Path | None = None,
    progress: bool = True,
) -> Finding:
    """Find the smallest faithful circuit.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        faithfulness: the least that counts as carrying the behaviour; the band is [f, 2 - f].
        within: the time to aim for, such as "90s" or "3m"; the search ends somewhat sooner or later.
        seed: of the training.
        batch_size: pairs in a training step.
        memory: budget in bytes of the batches that circuits are run on.
        start: "mask" trims the smallest faithful circuit that a learned mask passes through; "whole" trims
            the whole model, edges of small exact effect first. The latter has nothing random in it and, on a
            model of some hundred edges, takes no longer and gives smaller circuits: it is the default up to
            500 edges.
        plan: the numbers of an earlier search, to repeat it; `within`, `seed` and `start` are then not looked
            at.
        state: a file in which the search keeps what it has done: given again after an interruption, with
            the same model, task and settings, it goes on where it was and finds the identical circuit.
            Deleted at the end.
        progress: whether to show bars.

    Raises:
        OptionError: if the faithfulness is not between 0 and 1, the start is no such word, or the task is
            denoising.
        DataError: if the metric does not differ between clean and ablated runs.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> finding = cv.find(model, task, within="2m")  # doctest: +SKIP
        >>> finding.circuit.draw("circuit.svg")  # doctest: +SKIP
    """
    if not 0 < faithfulness < 1:
        raise OptionError(f"the faithfulness asked for must lie between 0 and 1, not {faithfulness!r}")
    if start not in (None, "mask", "whole"):
        raise OptionError(f"a search starts from the 'mask' or the 'whole' model, not {start!r}")
    deadline = seconds(within)
    prepared = prepare(model, task, progress)
    start = start or ("whole" if prepared.graph.n_edges <= SMALL else "mask")
    margin = min(MARGIN, (1 - faithfulness) / 2) if len(prepared) > 1 else 0.0
    band = (round(faithfulness + margin, 6), round(2 - faithfulness - margin, 6))
    wanted = plan or f"within {deadline:g} s, seed {seed}, {batch_size} pairs at once, from the {start}"
    work = f"find, faithfulness {faithfulness!r}, memory {memory}, {wanted}"
    with StateFile(state, prepared, work) as kept_in:
        meter = FaithfulnessMeter(prepared, memory)
        if kept_in.saved is not None:
            plan = Plan(**kept_in.saved.numbers["plan"])
            meter.recall(kept_in.saved.tensors)
        if plan is None and start == "whole":
            plan = _plan_from_whole(meter, deadline, min(batch_size, len(prepared)), seed)
        plan = plan or _plan(prepared, deadline, min(batch_size, len(prepared)), seed)
        return _find(meter, faithfulness, band, plan, kept_in, progress)


def _find(
    meter: FaithfulnessMeter, faithfulness: float, band: Band, plan: Plan, state: StateFile, progress: bool
) -> Finding:
    """Train or take the whole, then trim, by a plan."""
    prepared = meter.prepared
    order, candidates = (_train if plan.steps else _whole)(meter, plan, band, state, progress)
    chosen = _smallest(candidates, band)
    provenance = provenance_of(prepared, "find", plan.seed).with_parameters(
        steps=plan.steps, trim_runs=plan.trim_runs, batch_size=plan.batch_size, faithfulness=faithfulness
    )
    circuit = Circuit(prepared.graph, chosen.kept, provenance=provenance)
    refined = refine(
        prepared.model,
        prepared,
        circuit,
        order=order,
        band=band,
        max_runs=plan.trim_runs,
        meter=meter,
        progress=progress,
    )
    summary = _summary(prepared, plan, chosen, refined.circuit, refined.faithfulness, refined.minimal, band)
    return Finding(refined.circuit, refined.faithfulness, refined.minimal, candidates, plan, summary)


def seconds(duration: str | float) -> float:
    """A duration in seconds.

    Raises:
        OptionError: if it is not a positive number of seconds, or text such as "90s", "2m" or "1.5h".

    Example:
        >>> seconds("2m"), seconds(30)
        (120.0, 30.0)
    """
    units = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(duration))
    if match is None or match[2] not in units or not 0 < float(match[1]) < LONGEST:
        raise OptionError(f"a duration is a number with s, m or h, such as '120s' or '2m', not {duration!r}")
    return float(match[1]) * units[match[2]]


def _plan(prepared: PreparedTask, deadline: float, batch_size: int, seed: int) -> Plan:
    """Turn seconds into numbers of steps and runs, from a few measured ones."""
    trainer = MaskTrainer(prepared, prepared.graph.n_edges, MaskSettings(batch_size=batch_size))
    trainer.step()  # the first one allocates
    begin = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        trainer.step()
    per_step = (time.perf_counter() - begin) / MEASURED_STEPS
    per_pair = per_step / batch_size / 3  # forward and backward cost three forwards
    checks = 2 * CHECKPOINTS * per_pair * len(prepared)
    steps = int((deadline * TRAINING_SHARE - checks) / per_step)
    steps = min(max(steps, STEP_LIMITS[0]), STEP_LIMITS[1])
    trim_runs = max(50, int(deadline * (1 - TRAINING_SHARE) / (per_pair * len(prepared))))
    return Plan(steps, trim_runs, batch_size, seed)


def _plan_from_whole(meter: FaithfulnessMeter, deadline: float, batch_size: int, seed: int) -> Plan:
    """Turn seconds into a number of runs, from one of the whole model, which is the slowest."""
    almost = meter.prepared.graph.edge_mask.copy()
    almost[tuple(np.argwhere(almost)[-1])] = False  # the whole itself is known already
    begin = time.perf_counter()
    meter(almost)
    return Plan(0, max(50, int(deadline / (time.perf_counter() - begin))), batch_size, seed)


def _whole(
    meter: FaithfulnessMeter, plan: Plan, band: Band, state: StateFile, progress: bool
) -> tuple[NDArray[np.float64], tuple[Candidate, ...]]:
    """The magnitudes of the exact effects of all edges, and the whole model."""
    prepared = meter.prepared
    meter.after_run = partial(_note, state, meter, Saved({}, {"plan": asdict(plan)}))
    scores = attribute(prepared.model, prepared, "exact", progress=progress)
    whole = without_dead(prepared, prepared.graph.edge_mask)
    return np.abs(scores.values), (Candidate(whole, meter(whole)),)


def _train(
    meter: FaithfulnessMeter, plan: Plan, band: Band, state: StateFile, progress: bool
) -> tuple[NDArray[np.float64], tuple[Candidate, ...]]:
    """Train until the schedule ends or the behaviour is lost; give how open edges are, and the circuits."""
    prepared = meter.prepared
    edges = max(1, round(SMALLEST * prepared.graph.n_edges))
    settings = MaskSettings(steps=plan.steps, batch_size=plan.batch_size, seed=plan.seed, ramp=1.0)
    trainer = MaskTrainer(prepared, edges, settings)
    every = max(1, plan.steps // CHECKPOINTS)
    candidates: list[Candidate] = [Candidate(prepared.graph.edge_mask, 1.0)]
    done = lost = 0
    if state.saved is not None and "phi" in state.saved.tensors:
        trainer.restore(state.saved)
        candidates = _recalled(state.saved)
        for each in candidates[1:]:  # so that trimming finds them measured, as it would without interruption
            meter(each.kept)
        done, lost = state.saved.numbers["done"], state.saved.numbers["lost"]
    with progress_bar(plan.steps, "learning a mask", progress) as bar:
        bar.update(done)
        while done < plan.steps and lost < 2:
            trainer.step()
            done += 1
            bar.update()
            if done % every == 0:
                kept = without_dead(prepared, trainer.open_edges())
                candidate = Candidate(kept, meter(kept))
                candidates.append(candidate)
                bar.set_postfix_str(f"{candidate.size:,} edges, faithfulness {candidate.faithfulness:.2f}")
                lost = lost + 1 if candidate.faithfulness < band[0] - LOST else 0
            if state.path is not None:
                _note(state, meter, _training(trainer, candidates, plan, done, lost))
    meter.after_run = partial(_note, state, meter, _training(trainer, candidates, plan, done, lost))
    openness = np.where(prepared.graph.edge_mask, trainer.openness(), 0.0)
    return openness, tuple(sorted(candidates, key=lambda each: -each.size))


def _training(trainer: MaskTrainer, candidates: list[Candidate], plan: Plan, done: int, lost: int) -> Saved:
    """Where the training is, for the state file."""
    state = trainer.state()
    circuits = {
        "candidates": torch.from_numpy(np.stack([each.kept for each in candidates]).astype(np.uint8)),
        "candidates.faithfulness": torch.tensor(
            [each.faithfulness for each in candidates], dtype=torch.float64
        ),
    }
    numbers = {**state.numbers, "plan": asdict(plan), "done": done, "lost": lost}
    return Saved({**state.tensors, **circuits}, numbers)


def _recalled(saved: Saved) -> list[Candidate]:
    masks = saved.tensors["candidates"].numpy().astype(bool)
    values = saved.tensors["candidates.faithfulness"].tolist()
    return [Candidate(kept, value) for kept, value in zip(masks, values, strict=True)]


def _note(state: StateFile, meter: FaithfulnessMeter, training: Saved) -> None:
    """Keep where the training is, and everything that has been measured."""
    state.keep(lambda: Saved({**training.tensors, **meter.table()}, training.numbers))


def _smallest(candidates: tuple[Candidate, ...], band: Band) -> Candidate:
    inside = [each for each in candidates if band[0] <= each.faithfulness <= band[1]]
    if not inside:
        raise DataError(
            "no circuit lies in the band, not even the whole model: the runs are not reproducible"
        )
    return min(inside, key=lambda each: each.size)


def _summary(
    prepared: PreparedTask,
    plan: Plan,
    start: Candidate,
    circuit: Circuit,
    faithfulness: float,
    minimal: bool,
    band: Band,
) -> str:
    edges = f"{len(circuit):,} of {prepared.graph.n_edges:,} edges ({circuit.density:.1%})"
    pairs = f"{len(prepared)} pair{'s' if len(prepared) > 1 else ''}"
    ending = (
        "no single edge can be dropped"
        if minimal
        else "trimming ran out of its budget, so some edges may still be dropped: give more time"
    )
    within = f"in the band [{band[0]:.2f}, {band[1]:.2f}]"
    learned = (
        f"A mask was learned in up to {plan.steps} steps on {pairs}. Its smallest circuit {within} had "
        f"{start.size:,} edges; trimming by exact ablation"
    )
    trimmed = f"The whole model was trimmed on {pairs}, edges of small exact effect first, which {within}"
    return (
        f"{learned if plan.steps else trimmed} left {edges} with faithfulness {faithfulness:.2f}: {ending}."
    )
