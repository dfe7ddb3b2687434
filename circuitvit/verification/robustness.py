"""Does the conclusion survive another ablation, direction, metric, or other images? One table that shows.

Noising asks what the behaviour cannot do without, and finds what is joined by AND; denoising asks what is
enough to bring it back, and finds what is joined by OR (Heimersheim and Nanda 2024, arXiv:2404.15255). A
circuit that is faithful under one ablation only has been fitted to that ablation (Miller et al. 2024,
"Transformer circuit faithfulness metrics are not robust", arXiv:2407.08734).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from circuitvit.errors import CircuitViTError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.tasks import Ablation, Patch, PreparedTask, Task, ablation_names, metric_names
from circuitvit.tasks.corruptions import blur, gaussian_noise
from circuitvit.tasks.metrics import as_metric
from circuitvit.verification.bootstrap import Bootstrap, Estimate, ratio_interval
from circuitvit.verification.faithfulness import require_effect
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.subtask import subtask

ENOUGH = 0.8
NEEDED = 0.5

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


@dataclass(frozen=True)
class Robustness:
    """The table: the baseline first, then everything else.

    Example:
        >>> table = robustness(model, task, circuit)  # doctest: +SKIP
        >>> print(table)  # doctest: +SKIP
    """

    rows: tuple[RobustnessRow, ...]

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


def robustness(
    model: Model,
    task: Task | PreparedTask,
    circuit: Circuit,
    *,
    ablations: Mapping[str, Ablation] | None = None,
    others: Mapping[str, Task] | None = None,
    perturb: bool = True,
    settings: Bootstrap | None = None,
    batch_size: int | None = None,
) -> Robustness:
    """Run the same circuit under every other condition, one changed at a time.

    Args:
        model: from `load` or `wrap`.
        task: the baseline.
        circuit: to run.
        ablations: further ablations by name, such as optimal constants from a file.
        others: other images that show the behaviour, by name.
        perturb: whether to add slight blur, noise, mirroring and darkening of all images. Slight is meant for
            images on a scale from -1 to 1.
        settings: of the intervals.
        batch_size: pairs at once.

    Raises:
        OptionError: if the circuit belongs to another graph.
    """
    prepared = task if isinstance(task, PreparedTask) else task.prepare(model)
    settings = settings or Bootstrap()
    PairMeter(prepared, batch_size=1).check(circuit)
    rows = [
        _row(model, kind, name, make, circuit, settings, batch_size)
        for kind, name, make in _conditions(prepared, ablations or {}, others or {}, perturb)
    ]
    base = rows[0]
    opposite = {("yes", "no"), ("no", "yes")}
    return Robustness(
        tuple(
            replace(row, flips=bool({(base.enough, row.enough), (base.needed, row.needed)} & opposite))
            for row in rows
        )
    )


# -- inside --------------------------------------------------------------------------------------

Make = Callable[[], Task]


def _conditions(
    prepared: PreparedTask, ablations: Mapping[str, Ablation], others: Mapping[str, Task], perturb: bool
) -> Iterator[tuple[str, str, Make]]:
    base = subtask(prepared)
    yield "baseline", prepared.label, lambda: base
    for name in ablation_names():
        if name != prepared.ablation.name:
            yield "ablation", name, _with(base, ablation=name, direction="noising")
    for name, ablation in ablations.items():
        yield "ablation", name, _with(base, ablation=ablation, direction="noising")
    other = "noising" if prepared.denoising else "denoising"
    yield "direction", other, _with(base, ablation=Patch(), direction=other)
    metric = prepared.metric.metric
    for name in metric_names():
        if name != metric.name:
            yield "metric", name, _with(base, metric=as_metric(name, *_sides(base)))
    for name, task in others.items():
        yield "images", name, _with(task)
    for name, change in _PERTURBED.items() if perturb else ():
        yield "perturbed images", name, _perturbed(prepared, change)


def _with(task: Task, **changes: Any) -> Make:
    return lambda: task.with_options(**changes)


def _perturbed(prepared: PreparedTask, change: Callable[[Tensor], Tensor]) -> Make:
    return lambda: subtask(prepared, change=change)


def _sides(task: Task) -> tuple[Any, Any]:
    return getattr(task.metric, "target", None), getattr(task.metric, "foil", None)


def _row(
    model: Model,
    kind: str,
    name: str,
    make: Make,
    circuit: Circuit,
    settings: Bootstrap,
    batch_size: int | None,
) -> RobustnessRow:
    try:
        meter = PairMeter(make().prepare(model), batch_size=batch_size)
        meter.check(circuit)
        effect = meter.effect
        require_effect(meter.whole, meter.nothing, label=meter.prepared.metric.label, settings=settings)
        faithfulness = ratio_interval(meter(circuit.kept) - meter.nothing, effect, settings)
        necessity = ratio_interval(meter.whole - meter((~circuit).kept), effect, settings)
    except CircuitViTError as error:
        return RobustnessRow(kind, name, None, None, "unclear", "unclear", note=f"cannot be asked: {error}")
    note = "far from anything the model has seen: effects tend to be exaggerated" if name == "zero" else ""
    return RobustnessRow(
        kind=kind,
        condition=name,
        faithfulness=faithfulness,
        necessity=necessity,
        enough=_within(faithfulness, ENOUGH, 2 - ENOUGH),
        needed=_within(necessity, NEEDED, float("inf")),
        note=note,
        n=len(meter),
    )


def _within(figure: Estimate, low: float, high: float) -> str:
    """Whether the figure lies in a range: by its interval where there is one, else by its value."""
    below = figure.value if figure.low is None else figure.low
    above = figure.value if figure.high is None else figure.high
    if low <= below and above <= high:
        return "yes"
    return "no" if above < low or below > high else "unclear"
