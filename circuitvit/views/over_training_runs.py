"""`across`: a behaviour, a circuit and edges in the checkpoints of one training."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.attribution.by_pair import scores_by_pair
from circuitvit.attribution.methods import check_keywords, find_method
from circuitvit.attribution.scoring import Running, provenance_of
from circuitvit.engine import Evaluator, choose_batch_size
from circuitvit.errors import DataError, FileError, OptionError, check_number, check_whole, counted
from circuitvit.graph import Circuit, CircuitLike, EdgeMask, as_circuit
from circuitvit.models import Model
from circuitvit.models import load as load_model
from circuitvit.pruning.find import find
from circuitvit.tasks import PreparedTask, Task, prepare, split
from circuitvit.verification.drift import CARRIED, TOLERANCE
from circuitvit.verification.drift_runs import (
    FEW,
    LEVEL,
    WITHIN,
    carried_share,
    edge_shares,
    how_many,
    is_left,
)
from circuitvit.verification.faithfulness import origin_differs
from circuitvit.verification.other_weights import check_same_kind, same_task
from circuitvit.verification.statistics import MIN_PAIRS, Bootstrap, Estimate, ratio_interval
from circuitvit.views.over_training import Across, sharp_p

Checkpoints = str | Path | Mapping[int, Model | str | Path]
Load = Callable[[Path], Model]

FEWEST = 3
"""Checkpoints: between two, no change is sharper than the others."""

WEIGHTS = (".safetensors", ".pt", ".pth")
"""How files of a folder end that are checkpoints."""


@running
def across(
    checkpoints: Checkpoints,
    task: Task | PreparedTask,
    circuit: CircuitLike | None = None,
    *,
    load: Load | None = None,
    method: str = "exact",
    edges: int | None = None,
    window: float = CARRIED,
    tolerance: float = TOLERANCE,
    held_out: float = 0.5,
    within: str | float = WITHIN,
    n_bootstrap: int = 1000,
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
    **keywords: Any,
) -> Across:
    """When does a circuit form in training, and what changes at once?

    Every checkpoint is run on the same pairs: whole, with everything ablated, and with the circuit alone; and
    edges are scored pair by pair. What is said of these figures, and how sharp changes are tested, stands at
    the top of `circuitvit.views.over_training`.

    Args:
        checkpoints: the folder that `train(..., checkpoints=20)` wrote, or another, whose files have the step
            as the last number of their names; or a mapping from steps to models or files, which are opened
            one at a time.
        task: images, metric and ablation. Pairs that the circuit was not found on, 20 or more.
        circuit: whose faithfulness is asked for. By default one is found in the last checkpoint, and all else
            is measured on held-out pairs.
        load: how files become models, where they are weights alone (`.safetensors`, `.pt`, `.pth`): such as
            `lambda path: cv.load("vit_tiny_patch16_224", checkpoint=path)`. Of models that `train` wrote it
            is given the card.
        method: how edges are scored: "exact", or any method that scores each pair by itself.
        edges: how many edges are measured besides the circuit's, those with the largest "local" score in any
            checkpoint; by default all of a graph of at most 2,000, and 200 of a larger one.
        window: how far from 1 behaviour and faithfulness may be of a circuit that has formed.
        tolerance: the change of an edge that does not count, as a share of the last checkpoint's behaviour.
        held_out: the share of pairs that the search is not given.
        within: the time for the search, where no circuit is given.
        n_bootstrap: how often the pairs are resampled for intervals.
        seed: of the search, the halves and the resampling.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.
        **keywords: the method's own, as for `attribute`.

    Raises:
        OptionError: if there are fewer than three checkpoints, they are of different graphs or trainings, or
            the method scores no single pairs.
        FileError: if a file cannot be read or has no step in its name.
        DataError: if there are fewer than five pairs, or the last checkpoint does not show the behaviour.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> last = cv.load("catdog-tiny")
        >>> steps = {0: last.edit({"a2.*": 0}), 10: last.edit({"a2.*": 0}), 20: last}
        >>> task = cv.Task(*catdog_pairs(6), metric=cv.logit_diff("cat", "dog"))
        >>> across(steps, task, cv.Circuit.full(last.graph), edges=0, progress=False).formed.at
        20
    """
    check_number("the window", window, above=0, below=1)
    check_number("the tolerance", tolerance, above=0, below=1)
    check_number("the share of pairs to hold out", held_out, 0, 1)
    if edges is not None:
        check_whole("the number of edges", edges, 0)
    _check_method(method, keywords)
    series = _series(checkpoints, load)
    last = series.open(series.steps[-1])
    prepared = prepare(last, task, progress)
    stored = None if circuit is None else as_circuit(circuit, prepared.graph)
    sides = split(last, prepared, held_out, seed=seed) if stored is None else None
    judged = prepared if sides is None else sides.held_out
    if len(judged) < MIN_PAIRS:
        raise DataError(
            f"{counted(len(judged), 'pair')} to measure on: give {MIN_PAIRS} or more, better 20, as what is "
            "said of checkpoints rests on intervals over pairs"
        )
    evaluated = partial(Evaluator, batch_size=batch_size, memory=memory)
    final = evaluated(judged)
    final.check_effect()
    if stored is None:
        assert sides is not None
        stored = find(
            last, sides.discovery, within=within, seed=seed, memory=memory, progress=progress
        ).circuit
    how = Running(batch_size or choose_batch_size(judged, memory))
    wanted = _wanted(series, task, judged, stored, edges, progress)
    runs, values = [], []
    with progress_bar(len(series.steps), "checkpoints", progress, unit="checkpoint") as bar:
        for step in series.steps:
            own = _task_of(series, step, judged, task)
            runs.append(_measured(evaluated(own), stored, final.effect, Bootstrap(n_bootstrap, LEVEL, seed)))
            sign = 1.0 if own.denoising else -1.0  # so that what supports the behaviour is positive
            values.append(sign * scores_by_pair(own, method, wanted, how, **keywords))
            bar.update()
    by_step, steps = np.stack(values), series.steps
    shares, errors = np.stack([edge_shares(each, final.effect) for each in by_step], axis=1)
    shown = np.stack([each.effect for each in runs])[..., None]
    return Across(
        steps=steps,
        names=tuple(each.name for each in runs),
        weights=tuple(each.weights for each in runs),
        circuit=stored,
        n=len(judged),
        effect=float(final.effect.mean()),
        behaviour=tuple(each.behaviour for each in runs),
        faithfulness=tuple(each.faithfulness for each in runs),
        edges=tuple(judged.graph.names_of(wanted)),
        method=method,
        effects=shares,
        widths=stats.t.ppf((1 + LEVEL) / 2, len(judged) - 1) * errors,
        p=sharp_p(by_step, final.effect, steps, tolerance),
        p_behaviour=sharp_p(shown, final.effect, steps, tolerance)[:, 0],
        window=float(window),
        tolerance=float(tolerance),
        provenance=provenance_of(judged, "across", seed).with_parameters(scores=method, **keywords),
        caveats=_caveats(last, stored, wanted, judged, runs[-1].faithfulness, window),
    )


def _check_method(method: str, keywords: Mapping[str, Any]) -> None:
    chosen = find_method(method)
    check_keywords(method, keywords)
    if not chosen.by_pair or method == "ifr" or keywords.get("state") is not None:
        what = "is no estimate of effects" if method == "ifr" else "does not score each pair by itself"
        raise OptionError(f"{method} {what}: take exact, local, eap or eap-ig, without state=")


# -- the checkpoints -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Series:
    """Checkpoints by step; files are opened when they are asked for."""

    given: Mapping[int, Model | Path]
    load: Load

    @property
    def steps(self) -> tuple[int, ...]:
        return tuple(sorted(self.given))

    def open(self, step: int) -> Model:
        """The model of a step.

        Raises:
            FileError: if its card speaks of another step.
            OptionError: if no model was made of a file.
        """
        found = self.given[step]
        if not isinstance(found, Path):
            return found
        model = self.load(found)
        if not isinstance(model, Model):
            raise OptionError(
                f"load= made a {type(model).__name__} of {found}, which is no model of circuitvit: let it "
                "end with cv.load or cv.wrap"
            )
        said = None if model.card is None else model.card.recipe.get("steps_done")
        if said not in (None, step):
            raise FileError(f"{found} is called a checkpoint of step {step}, and its card says {said}")
        return model


def _series(checkpoints: object, load: Load | None) -> _Series:
    """The checkpoints, checked as far as can be without opening them."""
    if load is not None and not callable(load):
        raise OptionError(f"load= takes a function from a path to a model, not {load!r}")
    if not isinstance(checkpoints, (str, Path, Mapping)):
        raise OptionError(
            f"checkpoints are a folder, or a mapping from steps to models or files, not "
            f"{type(checkpoints).__name__}"
        )
    if isinstance(checkpoints, Mapping):
        for step in checkpoints:
            check_whole("the step of a checkpoint", step, 0)
        given = {
            int(step): Path(each) if isinstance(each, (str, Path)) else each
            for step, each in checkpoints.items()
        }
    else:
        given = _listed(Path(checkpoints), load is not None)
    if len(given) < FEWEST:
        raise OptionError(
            f"{counted(len(given), 'checkpoint')}: give {FEWEST} or more; two are compared by circuitvit.diff"
        )
    return _Series(given, load or load_model)


def _listed(folder: Path, weights: bool) -> dict[int, Model | Path]:
    """The checkpoints of a folder by the last number in their names: cards, or files of weights alone.

    Raises:
        FileError: if it cannot be read, a name has no number, or two have the same.
    """
    try:
        every = sorted(each for each in folder.iterdir() if each.is_file())
    except OSError as error:
        raise FileError(f"cannot read the folder {folder}: {error.strerror or error}") from error
    bare = [each for each in every if each.suffix in WEIGHTS]
    files = [each.with_suffix(".json") for each in bare if each.with_suffix(".json") in every] or bare
    if not files:
        raise FileError(f"{folder} holds no checkpoints, which end in {', '.join(WEIGHTS)}")
    if files is bare and not weights:
        raise FileError(
            f"{bare[0]} holds weights alone: say how they are loaded, load=lambda path: cv.load(NAME, "
            "checkpoint=path)"
        )
    found: dict[int, Model | Path] = {}
    for path in files:
        numbers = re.findall(r"\d+", path.stem)
        if not numbers:
            raise FileError(f"{path} has no step in its name: take it away, or give a mapping from steps")
        step = int(numbers[-1])
        if step in found:
            raise FileError(f"{found[step]} and {path} are both of step {step}: give a mapping from steps")
        found[step] = path
    return found


def _task_of(series: _Series, step: int, judged: PreparedTask, task: Task | PreparedTask) -> PreparedTask:
    """The task for the model of a step.

    Raises:
        OptionError: if that is no checkpoint of the last one's training.
    """
    if step == series.steps[-1]:
        return judged
    model = series.open(step)
    check_same_kind(judged, model, task)
    for own, last in zip(_training(model), _training(judged.model), strict=True):
        if own != last:
            raise OptionError(
                f"{model.name} and {judged.model.name} are of two trainings, by their cards: {own} and {last}"
            )
    return same_task(model, judged)


def _training(model: Model) -> tuple[object, ...]:
    """What all checkpoints of one training have in common on their cards."""
    if model.card is None:
        return (None,) * 3
    recipe = {name: value for name, value in model.card.recipe.items() if name != "steps_done"}
    return model.card.seed, model.card.data, recipe


# -- what is measured ----------------------------------------------------------------------------


class _Measured(NamedTuple):
    """One checkpoint."""

    name: str
    weights: str
    effect: Float[np.ndarray, " pair"]
    behaviour: Estimate
    faithfulness: Estimate | None


def _measured(
    run: Evaluator, circuit: Circuit, final: Float[np.ndarray, " pair"], settings: Bootstrap
) -> _Measured:
    behaviour, model = ratio_interval(run.effect, final, settings), run.prepared.model
    there = is_left(behaviour, run.effect, settings)
    faithfulness = carried_share(run, circuit, settings) if there else None
    return _Measured(model.name, model.weights_hash, run.effect, behaviour, faithfulness)


def _wanted(
    series: _Series,
    task: Task | PreparedTask,
    judged: PreparedTask,
    circuit: Circuit,
    edges: int | None,
    progress: bool,
) -> EdgeMask:
    """The edges to measure: the circuit's, and the strongest in any checkpoint."""
    graph = judged.graph
    edges = how_many(graph, edges)
    if edges >= graph.n_edges:
        return graph.edge_mask
    wanted, sizes = circuit.kept & graph.edge_mask, np.zeros(graph.n_edges)
    if not edges:
        return wanted
    with progress_bar(len(series.steps), "strongest edges", progress, unit="checkpoint") as bar:
        for step in series.steps:
            own = _task_of(series, step, judged, task)
            scores = scores_by_pair(own, "local", graph.edge_mask, Running(1)).mean(axis=0)
            sizes = np.maximum(sizes, np.abs(scores))
            bar.update()
    places = np.argwhere(graph.edge_mask)[np.argsort(-sizes, kind="stable")[:edges]]
    wanted[tuple(places.T)] = True
    return wanted


def _caveats(
    last: Model,
    circuit: Circuit,
    wanted: EdgeMask,
    judged: PreparedTask,
    faithfulness: Estimate | None,
    window: float,
) -> tuple[str, ...]:
    measured, edges = int(wanted.sum()), judged.graph.n_edges
    said = [
        origin_differs(circuit, last),
        "All of this is about one training: with another seed a circuit can form at another step, or be "
        "another one.",
    ]
    if faithfulness is None or abs(faithfulness.value - 1) > window:
        said.append(
            f"The circuit does not carry the behaviour in the last checkpoint (faithfulness {faithfulness}): "
            "when it formed cannot be said."
        )
    if measured < edges:
        said.append(
            f"Of {edges:,} edges {measured:,} were measured, the circuit's and the strongest by estimate: "
            "what is said of edges is said of these."
        )
    if len(judged) < FEW:
        said.append(
            f"On {counted(len(judged), 'pair')} only very large changes of single edges are told from "
            f"chance, as there are {edges:,} of them: give {FEW} or more."
        )
    return tuple(filter(None, said))
