"""Does the conclusion survive another ablation, direction, metric, or other images? Would they have given it?

`robustness` runs the same circuit under every other condition, `stability` finds it anew on resampled pairs.

Noising asks what the behaviour cannot do without, and finds what is joined by AND; denoising asks what is
enough to bring it back, and finds what is joined by OR (Heimersheim and Nanda 2024, arXiv:2404.15255). A
circuit that is faithful under one ablation only has been fitted to that ablation (Miller et al. 2024,
"Transformer circuit faithfulness metrics are not robust", arXiv:2407.08734). Resampled discovery is
Meinshausen and Bühlmann 2010, "Stability selection", JRSS B 72.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import Evaluator, progress_bar
from circuitvit.errors import CircuitViTError, DataError, OptionError
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.sentences import TextSpec
from circuitvit.pruning.find import Agreement
from circuitvit.tasks import (
    Ablation,
    Patch,
    PreparedTask,
    Task,
    ablation_names,
    as_task,
    metric_names,
    prepare,
    select_pairs,
)
from circuitvit.tasks.corruptions import blur, gaussian_noise
from circuitvit.tasks.metrics import as_metric
from circuitvit.verification.statistics import Bootstrap, Estimate, estimated, ratio_interval

ENOUGH = 0.8
NEEDED = 0.5

Discover = Callable[[Model, Task], CircuitLike]

_PERTURBED: Mapping[str, Callable[[Tensor], Tensor]] = {
    "slight blur (sigma 1)": lambda images: blur(images, sigma=1.0),
    "slight noise (std 0.1)": lambda images: gaussian_noise(images, std=0.1, seed=0),
    "mirrored": lambda images: images.flip(-1),
    "darker (-0.2)": lambda images: images - 0.2,
}


@dataclass(frozen=True)
class RobustnessRow:
    """The circuit under one condition.

    Attributes:
        kind: "baseline", "ablation", "direction", "metric", "images" or "perturbed images".
        condition: what was changed.
        faithfulness: of the circuit, or None where it cannot be asked.
        necessity: share of the behaviour lost without it, or None.
        enough: "yes", "no" or "unclear": faithfulness at least 0.8 and at most 1.2.
        needed: the same for necessity of at least 0.5.
        flips: whether one of the two is the opposite of what the baseline says.
        note: a caveat, or why it cannot be asked.
        n: how many pairs.
    """

    kind: str
    condition: str
    faithfulness: Estimate | None
    necessity: Estimate | None
    enough: str
    needed: str
    flips: bool = False
    note: str = ""
    n: int = 0


@dataclass(frozen=True, repr=False)
class Robustness(Result):
    """The table: the baseline first, then everything else.

    Example:
        >>> table = robustness(model, task, circuit)  # doctest: +SKIP
        >>> print(table)  # doctest: +SKIP
    """

    rows: tuple[RobustnessRow, ...]

    def records(self) -> Iterator[Record]:
        """One row for each condition: its `kind` and `condition`, `faithfulness` and `necessity` with the
        ends of their intervals (`_low`, `_high`), whether the circuit is `enough` and `needed`, whether
        either `flips`, the number of pairs `n`, and a `note`."""
        for row in self.rows:
            yield {
                "kind": row.kind,
                "condition": row.condition,
                **estimated("faithfulness", row.faithfulness),
                **estimated("necessity", row.necessity),
                "enough": row.enough,
                "needed": row.needed,
                "flips": row.flips,
                "n": row.n,
                "note": row.note,
            }

    def __repr__(self) -> str:
        return f"Robustness({self if self.rows else 'no condition'})"

    @property
    def flips(self) -> tuple[RobustnessRow, ...]:
        """The conditions under which a conclusion flips."""
        return tuple(row for row in self.rows if row.flips)

    def __str__(self) -> str:
        base = self.rows[0]
        asked = [row for row in self.rows[1:] if row.faithfulness is not None]
        said = f"Enough: {base.enough}, needed: {base.needed}. Of {len(asked)} other conditions "
        if not self.flips:
            return said + "none flips either."
        return said + f"{len(self.flips)} flip one: {', '.join(row.condition for row in self.flips)}."


@running
def robustness(
    model: Model,
    task: Task | PreparedTask,
    circuit: CircuitLike,
    *,
    ablations: Mapping[str, Ablation] | None = None,
    others: Mapping[str, Task] | None = None,
    perturb: bool = True,
    settings: Bootstrap | None = None,
    baseline: RobustnessRow | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Robustness:
    """Run the same circuit under every other condition, one changed at a time.

    Args:
        model: from `load` or `wrap`.
        task: the baseline.
        circuit: to run.
        ablations: further ablations by name, such as optimal constants from a file.
        others: other images that show the behaviour, by name.
        perturb: whether to add slight blur, noise, mirroring and darkening of all images. Slight is meant for
            images on a scale from -1 to 1; sentences have nothing to be perturbed.
        settings: of the intervals.
        baseline: the row of the task itself, where it has been run already.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if the circuit belongs to another graph, or the task was prepared for another model.
    """
    prepared, settings = prepare(model, task), settings or Bootstrap()
    circuit = as_circuit(circuit, prepared.graph)
    evaluator = partial(Evaluator, batch_size=batch_size, memory=memory, progress=progress)
    base = baseline or condition_row("baseline", prepared.label, evaluator(prepared), circuit, settings)
    rows = []
    for kind, name, make in _conditions(prepared, ablations or {}, others or {}, perturb):
        try:
            changed = prepare(model, make(), processes=prepared.processes)
            row = condition_row(kind, name, evaluator(changed), circuit, settings)
        except CircuitViTError as error:
            note = f"cannot be asked: {error}"
            row = RobustnessRow(kind, name, None, None, "unclear", "unclear", note=note)
        opposite = {(base.enough, row.enough), (base.needed, row.needed)} & {("yes", "no"), ("no", "yes")}
        rows.append(replace(row, flips=bool(opposite)))
    return Robustness((base, *rows))


def condition_row(
    kind: str, name: str, evaluator: Evaluator, circuit: Circuit, settings: Bootstrap
) -> RobustnessRow:
    """The circuit under one condition, whose runs the evaluator makes or has made.

    Raises:
        CircuitViTError: if the circuit belongs to another graph, or there is no behaviour to explain.
    """
    circuit = as_circuit(circuit, evaluator.graph)
    effect = evaluator.effect
    evaluator.check_effect()
    kept, lost = evaluator.many([circuit.kept, (~circuit).kept])
    faithfulness = ratio_interval(kept - evaluator.nothing, effect, settings)
    necessity = ratio_interval(evaluator.whole - lost, effect, settings)
    note = "far from anything the model has seen: effects tend to be exaggerated" if name == "zero" else ""
    return RobustnessRow(
        kind=kind,
        condition=name,
        faithfulness=faithfulness,
        necessity=necessity,
        enough=_within(faithfulness, ENOUGH, 2 - ENOUGH),
        needed=_within(necessity, NEEDED, float("inf")),
        note=note,
        n=len(evaluator),
    )


@running
def stability(
    model: Model,
    task: Task | PreparedTask,
    discover: Discover,
    *,
    n: int = 20,
    at_least: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Agreement:
    """Find the circuit anew on resampled pairs.

    Args:
        model: from `load` or `wrap`.
        task: at least two pairs; drawn with replacement, as many as there are.
        discover: how a circuit is found, such as
            `lambda model, task: cv.attribute(model, task, progress=False).top(200)`.
        n: how many resamples.
        at_least: frequency from which an edge belongs to the consensus, above 0 and at most 1.
        seed: of the draws.
        progress: whether to show a bar.

    Raises:
        DataError: if the task has a single pair.
        OptionError: if `n` or `at_least` makes no sense.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(4), metric=cv.logit_diff("cat", "dog"))
        >>> find = lambda model, task: cv.attribute(model, task, progress=False).connected(20)
        >>> len(stability(model, task, find, n=2, progress=False).circuits)
        2
    """
    if n < 1 or not 0 < at_least <= 1:
        raise OptionError(f"n is at least 1 and at_least above 0 and at most 1, not {n} and {at_least}")
    prepared = prepare(model, task)
    if len(prepared) < 2:
        raise DataError("a single pair cannot be resampled: stability is about several")
    rng = np.random.default_rng(seed)
    circuits = []
    with progress_bar(n, "resampled discovery", progress) as bar:
        for _ in range(n):
            rows = rng.integers(len(prepared), size=len(prepared)).tolist()
            found = discover(model, as_task(select_pairs(prepared, rows)))
            circuits.append(as_circuit(found, prepared.graph))
            bar.update()
    return Agreement(tuple(circuits), at_least=at_least)


# -- inside --------------------------------------------------------------------------------------

Make = Callable[[], Task | PreparedTask]


def _conditions(
    prepared: PreparedTask, ablations: Mapping[str, Ablation], others: Mapping[str, Task], perturb: bool
) -> Iterator[tuple[str, str, Make]]:
    """Kind, name and task of every condition; a task is made when its turn comes."""
    base = as_task(prepared)
    for name in ablation_names():
        if name != prepared.ablation.name:
            yield "ablation", name, partial(base.with_options, ablation=name, direction="noising")
    for name, ablation in ablations.items():
        yield "ablation", name, partial(base.with_options, ablation=ablation, direction="noising")
    other = "noising" if prepared.denoising else "denoising"
    yield "direction", other, partial(base.with_options, ablation=Patch(), direction=other)
    sides = [getattr(base.metric, side, None) for side in ("target", "foil")]
    for name in metric_names() if prepared.model.has_classes else ():
        if name != prepared.metric.metric.name and as_metric(name).of_classes:
            yield "metric", name, partial(base.with_options, metric=as_metric(name, *sides))
    for name, task in others.items():
        yield "images", name, partial(task.with_options)
    has_pixels = not isinstance(prepared.spec, TextSpec)
    for name, change in _PERTURBED.items() if perturb and has_pixels else ():
        yield "perturbed images", name, partial(select_pairs, prepared, change=change)


def _within(figure: Estimate, low: float, high: float) -> str:
    """Whether the figure lies in a range: by its interval where there is one, else by its value."""
    below = figure.value if figure.low is None else figure.low
    above = figure.value if figure.high is None else figure.high
    if low <= below and above <= high:
        return "yes"
    return "no" if above < low or below > high else "unclear"
