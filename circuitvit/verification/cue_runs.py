"""`audit_cue`: how much of a model's decisions rests on a cue, which edges carry it, what it is worth
without.

1. The pairs of cue and behaviour are divided in two, no image on both sides. Circuits are found on one half.
2. On the other half: how far the metric moves when the cue alone changes, against how far the behaviour moves
   it; how much of that is lost without the cue's circuit; whether each circuit is about its own.
3. On the groups, whose images took no part in finding anything: how often the model is right as it is, and
   with the edges of the cue's circuit ablated that the behaviour's circuit does not have. They get what their
   senders write on average over the images of the cue on which the circuit was found, both with the cue and
   with it
   changed: a constant, which speaks for no class more than for the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from circuitvit._keywords import running
from circuitvit.attribution.scoring import provenance_of
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, OptionError, UnsupportedModelError, check_number, counted
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.models import Model
from circuitvit.pruning import find
from circuitvit.tasks import Mean, Patch, PreparedTask, Task, prepare
from circuitvit.tasks.classes import ClassSpec
from circuitvit.tasks.grouped import GroupedSpec
from circuitvit.tasks.labelled import LabelledSpec
from circuitvit.tasks.metrics import same_metric
from circuitvit.tasks.split import as_task, image_clusters, split_together
from circuitvit.verification.certificates import Certificate, certify
from circuitvit.verification.cross_effects import Specificity, specificity
from circuitvit.verification.cue import HARDLY, LEAST, Audit, Lost, Used, judge, told
from circuitvit.verification.faithfulness import origin_differs
from circuitvit.verification.group_accuracy import Labelled, fingerprints
from circuitvit.verification.statistics import (
    Bootstrap,
    Estimate,
    mean_interval,
    ratio_interval,
    share_interval,
    share_of_means,
)

Pairs = Float[np.ndarray, " pair"]
Hits = Bool[np.ndarray, " pair"]

CUE, BEHAVIOUR = "cue", "behaviour"

CALLED = "the behaviour"
"""In sentences, beside the name of the cue."""

SCORES = "local"
"""By which edges are certified: on each pair alone, so that a thousand subsets cost as much as one."""

FEW = 20
"""Images of a group, below which its interval reaches some 20 points to either side."""

Elsewhere = Mapping[str, Task | PreparedTask | LabelledSpec]


@running
def audit_cue(
    model: Model,
    cue: Task | PreparedTask,
    behaviour: Task | PreparedTask,
    groups: GroupedSpec,
    *,
    name: str = "the cue",
    together: bool = False,
    elsewhere: Elsewhere | None = None,
    labels: Mapping[str, ClassSpec] | None = None,
    circuits: Mapping[str, CircuitLike] | None = None,
    least: float = LEAST,
    held_out: float = 0.5,
    within: str | float = "120s",
    date: str = "",
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Audit:
    """How much of a decision rests on a cue, which edges carry it, and what is the model worth without them?

    The share is `c / (c + b)`, with `c` how far the metric moves on average when the cue alone changes, and
    `b` how far it moves when what should decide changes and the cue stays. Where the behaviour's pairs change
    both (`together`), it is `c / b`.

    Args:
        model: with classes; from `load`, `wrap`, `with_head` or `with_prompts`.
        cue: pairs in which the cue alone changes, from the one that goes with the target to another.
        behaviour: pairs in which what should decide changes; by the same metric.
        groups: labelled images by group: a folder GROUP/CLASS/*.jpg, a table (.csv) with the columns image,
            group and class, or a mapping from groups to mappings from classes to images.
        name: of the cue, for sentences and figures, such as "the background".
        together: whether the behaviour's pairs change the cue as well, as photographs of two classes do.
        elsewhere: by name, what else must not suffer: other tasks, or labelled images (a folder CLASS/*.jpg,
            or a mapping from classes to images).
        labels: what the classes of images are in the model where it does not call them so, such as
            `{"cat": cv.group("cat")}`.
        circuits: of "cue" and "behaviour", where they are known: nothing is searched for then, and all pairs
            are measured. Give pairs that they were not found on.
        least: the share below which the cue is said to carry hardly any of the decision.
        held_out: the share of the pairs that circuits are not found on, and on which all is measured.
        within: the time for each of the two searches, see `find`.
        date: as it is to stand on the page; none by default, so that the same audit gives the same file.
        n_bootstrap: how often pairs are resampled for intervals.
        seed: of halves, searches and resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        UnsupportedModelError: if the model has no classes.
        OptionError: if a task has no counterfactuals, another metric than the other, or groups of tokens.
        NameNotFoundError: for a class that the model does not have.
        DataError: if images cannot be used or divided.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> species = cv.Task(*catdog_pairs(12), metric=cv.logit_diff("cat", "dog"))
        >>> light = cv.Task(
        ...     clean := catdog_pairs(12, seed=1).clean, clean * 0.98, cv.logit_diff("cat", "dog")
        ... )
        >>> groups = {"dark": {"cat": clean[:6] - 0.1}, "light": {"cat": clean[6:]}}
        >>> audit_cue(model, light, species, groups, name="the light", progress=False).verdict
        'hardly any'
    """
    check_number("the least share", least, above=0, below=1)
    check_number("the share of pairs to hold out", held_out, 0, 1)
    _check_names(name, elsewhere or {})
    if not model.chooses:
        raise UnsupportedModelError(
            f"{model.name} has no classes, so nothing that it says is right or wrong: give it some, with "
            "cv.with_head(...) or model.with_prompts([...])"
        )
    tasks = {CUE: prepare(model, cue, progress), BEHAVIOUR: prepare(model, behaviour, progress)}
    _check(model, tasks)
    chosen = {} if circuits is None else _given(circuits, tasks)
    images = Labelled.of(model, groups, labels or {})
    others, more = _beside(model, elsewhere or {}, labels or {}, progress)
    how = _How(Bootstrap(n_resamples=n_bootstrap, seed=seed), batch_size, memory, progress)

    found_on: dict[str, PreparedTask] = {}
    if not chosen:  # all that is reported is measured on the other half
        halves = split_together(model, tasks, held_out, seed=seed)
        found_on, tasks = ({what: half[side] for what, half in halves.items()} for side in (0, 1))
    effects = _Effects.of(tasks, how)
    share, *notes = effects.share(together)
    verdict = judge(share, least)
    if found_on and verdict != HARDLY:
        chosen, unfound = _search(model, found_on, within, seed, how)
        notes += unfound
    apart = circuits is not None or not together
    inside = _Inside.of(tasks, found_on, chosen, name, apart, how)
    known = fingerprints(*found_on.values())
    reference = Mean(_images(found_on.get(CUE, tasks[CUE])))
    wanted = {name: tasks[CUE], **({} if together else {CALLED: tasks[BEHAVIOUR]}), **others}
    given = [images] if more is None else [images, more]
    left = [each.without(known) for each in given]
    rows = [each.accuracies(inside.ablated, reference, **how.batches) for each in left]
    audit = Audit(
        verdict, "", name, provenance_of(tasks[CUE], "audit", seed), tasks[CUE].metric.label, date, least,
        together, mean_interval(effects.cue, how.draws), mean_interval(effects.behaviour, how.draws), share,
        share_interval(effects.flips), len(effects.cue), len(effects.behaviour), rows[0], chosen.get(CUE),
        chosen.get(BEHAVIOUR), inside.necessity, inside.faithfulness, inside.specificity,
        inside.certificate, inside.ablated, rows[1] if more is not None else (),
        _lost(wanted, inside.ablated, reference, how), tuple(_used(tasks, found_on, left)),
    )  # fmt: skip
    left_out = sum(map(len, given)) - sum(map(len, left))
    notes += [*inside.notes, *_caveats(model, audit, bool(found_on), left_out)]
    return replace(audit, reason=told(audit), caveats=tuple(filter(None, notes)))


# -- what is given ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _How:
    """How everything is run."""

    draws: Bootstrap
    batch_size: int | None
    memory: int | str | None
    progress: bool

    @property
    def batches(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "memory": self.memory}

    def evaluator(self, task: PreparedTask) -> Evaluator:
        return Evaluator(task, batch_size=self.batch_size, memory=self.memory)


def _check(model: Model, tasks: Mapping[str, PreparedTask]) -> None:
    """Refuse tasks of which a share of the decision cannot be told."""
    for what, task in tasks.items():
        if task.corrupt is None or not isinstance(task.ablation, Patch) or task.denoising:
            raise OptionError(
                f"an audit takes pairs of images: give the task of the {what} corrupt images, the ablation "
                "'patch' and the direction 'noising'"
            )
        if task.groups is not None:
            raise OptionError(f"an audit takes edges as they are: leave out the {what}'s groups of tokens")
    one, other = (tasks[what].metric for what in (CUE, BEHAVIOUR))
    if one.flat_at_clean:
        raise OptionError(
            f"the metric {one.label} compares with each clean image's own output, and how far two changes "
            "move that does not add up: take one of classes, such as logit_diff"
        )
    if not same_metric(one, other):
        raise OptionError(
            f"the cue is measured by {one.label} and the behaviour by {other.label}: a share of the decision "
            "takes the same metric for both"
        )
    if model.graph.always.any():
        raise OptionError(
            f"errors of {model.name} are kept in every run, and so is what they carry of the cue: audit the "
            "model without features, or with cv.features(..., error='node')"
        )


def _check_names(name: object, elsewhere: object) -> None:
    """Refuse names by which figures could not be told apart."""
    if not isinstance(name, str) or name.strip() in ("", CALLED):
        raise OptionError(f"the cue needs a name of its own, such as 'the background', not {name!r}")
    if not isinstance(elsewhere, Mapping):
        raise OptionError(f"elsewhere takes tasks or images by name, not {type(elsewhere).__name__}")
    if taken := [each for each in elsewhere if each in (name, CALLED)]:
        raise OptionError(f"elsewhere has {taken[0]!r}, which the audit is about: call it something else")


def _given(circuits: Mapping[str, CircuitLike], tasks: Mapping[str, PreparedTask]) -> dict[str, Circuit]:
    given: Any = circuits
    if not isinstance(given, Mapping) or set(given) != {CUE, BEHAVIOUR}:
        names = ", ".join(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
        raise OptionError(f"circuits are those of 'cue' and 'behaviour', by name, not {names or 'none'}")
    return {what: as_circuit(circuits[what], task.graph) for what, task in tasks.items()}


def _beside(
    model: Model, elsewhere: Elsewhere, labels: Mapping[str, ClassSpec], progress: bool
) -> tuple[dict[str, PreparedTask], Labelled | None]:
    """Of what else must not suffer the tasks, and the labelled images."""
    tasks, images = {}, {}
    for name, each in elsewhere.items():
        if isinstance(each, (Task, PreparedTask)):
            tasks[name] = prepare(model, each, progress)
            if tasks[name].corrupt is None or tasks[name].groups is not None:
                raise OptionError(f"the task {name} needs pairs of images, and no groups of tokens")
        else:
            images[name] = each
    return tasks, Labelled.of(model, images, labels, by_class=False) if images else None


# -- on the other half -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Effects:
    """How far the metric moves on each pair, and which pairs share images."""

    cue: Pairs
    behaviour: Pairs
    clusters: tuple[np.ndarray, np.ndarray]
    flips: Hits

    @classmethod
    def of(cls, tasks: Mapping[str, PreparedTask], how: _How) -> _Effects:
        cue, behaviour = (how.evaluator(tasks[what]) for what in (CUE, BEHAVIOUR))
        whole, none = cue.measure([cue.graph.edge_mask, Circuit.empty(cue.graph)])
        one, other = image_clusters(tasks[CUE], tasks[BEHAVIOUR])
        return cls(cue.effect, behaviour.effect, (one, other), whole.tops != none.tops)

    def share(self, together: bool) -> tuple[Estimate | None, str]:
        """The share of the cue; or None, and why."""
        try:
            return share_of_means(self.cue, self.behaviour, self.clusters, within=together), ""
        except DataError as error:
            return None, f"The share of the decision is not defined: {error}."


def _search(
    model: Model, found_on: Mapping[str, PreparedTask], within: str | float, seed: int, how: _How
) -> tuple[dict[str, Circuit], list[str]]:
    """The circuits of those behaviours that there are on the images to search on, and what was not found."""
    found, said = {}, []
    for what, task in found_on.items():
        try:
            how.evaluator(task).check_effect()
        except DataError as error:
            said.append(f"No circuit of the {what} was looked for: {error}.")
            continue
        found[what] = find(
            model, task, within=within, seed=seed, memory=how.memory, progress=how.progress
        ).circuit
    return found, said


@dataclass(frozen=True)
class _Inside:
    """What is found of the circuits."""

    necessity: Estimate | None = None
    faithfulness: Estimate | None = None
    specificity: Specificity | None = None
    certificate: Certificate | None = None
    ablated: Circuit | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        tasks: Mapping[str, PreparedTask],
        found_on: Mapping[str, PreparedTask],
        chosen: Mapping[str, Circuit],
        name: str,
        apart: bool,
        how: _How,
    ) -> _Inside:
        if CUE not in chosen:
            return cls()
        circuit, other, notes = chosen[CUE], chosen.get(BEHAVIOUR), []
        run = how.evaluator(tasks[CUE])
        own = circuit if other is None else circuit - other
        necessity = faithfulness = specific = certificate = None
        try:
            necessity = ratio_interval(run.whole - run.values(~circuit), run.effect, how.draws)
            faithfulness = ratio_interval(run.values(circuit) - run.nothing, run.effect, how.draws)
            if other is not None:
                specific = specificity(
                    run.prepared.model, {name: tasks[CUE], CALLED: tasks[BEHAVIOUR]},
                    {name: circuit, CALLED: other}, n_bootstrap=how.draws.n_resamples,
                    seed=how.draws.seed, progress=False, **how.batches,
                )  # fmt: skip
        except DataError as error:
            notes.append(f"What the circuits carry on these pairs cannot be told: {error}.")
        try:
            task = found_on.get(CUE, tasks[CUE])
            edges = len(circuit)
            certificate = certify(
                run.prepared.model, task, SCORES, edges=edges, seed=how.draws.seed, progress=how.progress
            )
        except (DataError, OptionError) as error:
            notes.append(f"No edge is certified: {error}.")
        if not apart:
            own = Circuit.empty(circuit.graph)
        elif not len(own):
            notes.append(
                "Every edge of the cue's circuit is one of the behaviour's: none was ablated for the groups."
            )
        return cls(necessity, faithfulness, specific, certificate, own if len(own) else None, tuple(notes))


# -- on images with labels -------------------------------------------------------------------------


def _images(task: PreparedTask) -> torch.Tensor:
    """All images of a task, clean and corrupt."""
    sides = [side for side in (task.clean, task.corrupt) if side is not None]
    return torch.cat([side.take(0, len(side)) for side in sides])


def _lost(
    tasks: Mapping[str, PreparedTask], ablated: Circuit | None, reference: Mean, how: _How
) -> tuple[Lost, ...]:
    """What is lost of behaviours when edges hold constants, the same on clean and on corrupt images."""
    if ablated is None:
        return ()
    found, kept = [], [ablated.graph.edge_mask, (~ablated).kept]
    for name, task in tasks.items():
        pairs, ends = as_task(task).with_options(ablation=reference, corrupt=None), []
        for side in filter(None, (task.clean, task.corrupt)):
            ends.append(how.evaluator(pairs.with_options(clean=side).prepare(task.model)).many(kept))
        before, after = ends[0] - ends[1]
        with suppress(DataError):  # of a behaviour that there is none of nothing is lost
            found.append(Lost(name, len(task), ratio_interval(before - after, before, how.draws)))
    return tuple(found)


# -- what is said ----------------------------------------------------------------------------------


def _used(
    tasks: Mapping[str, PreparedTask], found_on: Mapping[str, PreparedTask], labelled: Sequence[Labelled]
) -> Iterator[Used]:
    """The images by what they were used for, each with a hash of what the model sees."""
    pairs = {CUE: "pairs in which the cue changes", BEHAVIOUR: "pairs in which the behaviour changes"}
    for part, purpose in ((found_on, "to find circuits"), (tasks, "to measure on")):
        for what, task in part.items():
            yield Used(pairs[what], len(task), purpose, _hash(fingerprints(task)))
    for what, each in zip(("groups", "images elsewhere"), labelled, strict=False):
        yield Used(what, len(each), "to count right answers", _hash(each.fingerprints))


def _below(change: Estimate) -> bool:
    """Whether something surely fell."""
    return change.high is not None and change.high < 0


def _hash(images: Collection[bytes]) -> str:
    """Of a set of images, in whatever order."""
    return hashlib.sha256(b"".join(sorted(images))).hexdigest()


def _caveats(model: Model, audit: Audit, divided: bool, left_out: int) -> Iterator[str]:
    """What to bear in mind of an audit."""
    name = audit.name
    yield (
        f"The share is that of everything that changes in these pairs: {name}, and whatever changes with it."
    )
    if audit.together:
        yield (
            f"The behaviour's pairs change {name} too, so a circuit found on them is about both"
            + (": no edges of the cue's own can be told, and none were ablated." if divided else ".")
            + f" Pairs in which {name} stays would tell."
        )
    if not divided and audit.circuit is not None:
        yield "The circuits were given: nothing says that they were found on other pairs than these."
        yield from filter(None, (origin_differs(audit.circuit, model),))
    if left_out:
        yield f"{counted(left_out, 'image')} of the groups took part in finding circuits and were left out."
    counts = (*audit.groups, *audit.elsewhere)
    worse = [each.name for each in counts if each.change is not None and _below(each.change)]
    if worse:
        yield (
            f"Without the edges fewer answers are right ({'; '.join(worse)}): they carry more than {name}, "
            "or the constants in their place speak for another class."
        )
    small = [each.name for each in audit.groups if each.n < FEW]
    if small:
        yield f"Groups of fewer than {FEW} images say little: {'; '.join(small)}."
    if audit.ablated is not None:
        yield (
            "Ablated edges get what their senders write on average over the cue's images: another constant "
            "gives other accuracies."
        )
