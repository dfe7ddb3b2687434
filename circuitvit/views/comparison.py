"""Several methods on one task: faithfulness against size, in numbers and on one plot.

Circuits are made on the task's pairs and run on held-out ones, whose base runs and references are computed
once for all methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuitvit._keywords import running
from circuitvit.attribution import provenance_of
from circuitvit.engine.state import task_digest
from circuitvit.errors import OptionError, counted, unknown_name
from circuitvit.graph import Provenance
from circuitvit.graph.files import write_json
from circuitvit.graph.records import to_json
from circuitvit.graph.results import OTHER_ENDINGS, Record, Result
from circuitvit.models import Model
from circuitvit.pruning import Curve
from circuitvit.pruning.curves import FamilySettings, check_method, family_curve
from circuitvit.pruning.refine import noising_evaluator
from circuitvit.tasks import PreparedTask, Task, prepare, split
from circuitvit.verification.templates import row, write_text
from circuitvit.views.effects import draw_curves, faithfulness_curve

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

COMPARISON_SCHEMA = "circuitvit.comparison/1"

USUAL = ("random", "eap", "eap-ig", "learned")
"""Methods that are compared unless others are named: nothing, the two that everybody knows, and a search."""


@dataclass(frozen=True)
class MethodCurve:
    """The curve of one method.

    Attributes:
        method: its name.
        curve: of its circuits, on the pairs that they were judged on.
        seconds: that it took, circuits and runs together.
    """

    method: str
    curve: Curve
    seconds: float


@dataclass(frozen=True, repr=False)
class Comparison(Result):
    """Curves of several methods.

    Attributes:
        curves: in the order in which the methods were named.
        discovery: the pairs that circuits were made on, in one line.
        judged: the pairs that they were run on.
        held_out: whether these are others.
        provenance: model, weights, settings and seed.
        schema: of the file.
    """

    curves: tuple[MethodCurve, ...]
    discovery: str
    judged: str
    held_out: bool
    provenance: Provenance
    schema: str = COMPARISON_SCHEMA

    def records(self) -> Iterator[Record]:
        """One row for each method and point: `method`, the `fraction` of all edges asked for, the number of
        `edges` that were run, and their `faithfulness`."""
        for each in self.curves:
            for point in each.curve.records():
                del point["label"]
                yield {"method": each.method, **point}

    def _check(self) -> None:
        if not all(each.curve.points for each in self.curves):
            raise OptionError("a curve has no points")

    def __repr__(self) -> str:
        methods = ", ".join(f"{each.method} CPR {each.curve.cpr:.3f}" for each in self.curves[:12])
        return f"Comparison({counted(len(self.curves), 'method')}: {methods})"

    def __getitem__(self, method: str) -> Curve:
        """The curve of a method."""
        curves = {each.method: each.curve for each in self.curves}
        if method not in curves:
            raise unknown_name("method", method, tuple(curves))
        return curves[method]

    def figure(self, title: str | None = None) -> Picture:
        """All curves over a logarithmic axis of edges; needs matplotlib."""
        where = "held-out pairs" if self.held_out else "the pairs of discovery"
        curves = [
            faithfulness_curve([(point.size, point.faithfulness) for point in each.curve.points], each.method)
            for each in self.curves
        ]
        return draw_curves(curves, title=title or f"Faithfulness by size, on {where}")

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values, with the figures of each curve beside its points."""
        content = to_json(self)
        for written, each in zip(content["curves"], self.curves, strict=True):
            written["figures"] = _figures(each.curve)
        return {"schema": content.pop("schema"), **content}

    def to_markdown(self) -> str:
        """A table with one row for each method."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"Circuits made on {self.discovery}; run on {self.judged}."
        yield ""
        yield from row("method", "CPR", "CMD", "log-size CMD", "k*", "seconds", header=True)
        for each in self.curves:
            figures = _figures(each.curve)
            k_star = "none" if figures["k_star"] is None else f"{figures['k_star']:,}"
            areas = (f"{figures[name]:.3f}" for name in ("cpr", "cmd", "log_cmd"))
            yield from row(each.method, *areas, k_star, f"{each.seconds:.0f}")

    def save(self, path: str | Path) -> Path:
        """Write the numbers as `.json` or `.safetensors`, tables as `.csv` or `.md`, the plot as `.svg`,
        `.png` or `.pdf`.

        Raises:
            OptionError: for another ending.
            FileError: if the file cannot be written, or matplotlib is missing.
        """
        path = Path(path)
        if path.suffix == ".json":
            return write_json(path, self.to_dict())
        if path.suffix == ".md":
            return write_text(path, self.to_markdown())
        if path.suffix in (".svg", ".png", ".pdf"):
            return self.figure().save(path)
        if path.suffix in OTHER_ENDINGS:
            return super().save(path)
        raise OptionError(
            "a comparison is saved as .json, .csv, .safetensors, .md, .svg, .png or .pdf, "
            f"not as {path.name!r}"
        )


@running
def compare(
    model: Model,
    task: Task | PreparedTask,
    methods: Sequence[str] = USUAL,
    *,
    held_out: Task | PreparedTask | float | None = None,
    settings: FamilySettings | None = None,
    known: Comparison | None = None,
    after_each: Callable[[Comparison], object] = lambda comparison: None,
    processes: bool = False,
    seed: int = 0,
) -> Comparison:
    """Faithfulness against size for several methods.

    CPR, CMD: Mueller et al. 2025, "MIB: a mechanistic interpretability benchmark", arXiv:2504.13151.

    Args:
        model: from `load` or `wrap`.
        task: pairs to make circuits on, in the noising direction.
        methods: names of scoring methods (`METHODS`), and "learned", "learned-ugs", "learned-nodes" (a mask
            trained for each size) or "find" (the circuits that one search passes through).
        held_out: other pairs, to run the circuits on; or the share of the task's pairs to hold out, drawn so
            that no image is on both sides. Without it curves are optimistic.
        settings: sizes, ranking, and how masks are trained.
        known: an earlier comparison of the same model, task and settings, whose curves are taken over.
        after_each: called with what there is after each method.
        processes: share the work of every method among the processes of `torch.distributed`, which must all
            make this call; each gets the comparison.
        seed: of the split.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: if a method cannot be used on the task, or `known` is of something else.
        DataError: if images cannot be used, or the metric does not differ with and without the behaviour.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> comparison = cv.compare(model, task, ["eap", "exact", "learned"], held_out=0.25)  # doctest: +SKIP
        >>> print(comparison.to_markdown())  # doctest: +SKIP
        >>> comparison.save("comparison.svg")  # doctest: +SKIP
    """
    for method in methods:
        check_method(method)
    settings = settings or FamilySettings()
    discovery, judged = _sides(model, task, held_out, seed, settings.progress, processes)
    origin = _origin(discovery, judged, settings, seed)
    if known is not None and known.provenance != origin:
        models = known.provenance.mismatch(origin)
        raise OptionError(
            "the earlier comparison is of another model, another task (images, metric, ablation or token "
            f"groups) or other settings{models and f' (of {models})'}: start a new one, or repeat "
            "the earlier one's settings"
        )
    evaluator = noising_evaluator(judged, settings.batch_size, settings.memory)
    done = {each.method: each for each in known.curves} if known is not None else {}
    wanted = dict.fromkeys(methods)
    comparison = Comparison((), discovery.label, judged.label, held_out is not None, origin)
    for method in wanted:
        begin = time.perf_counter()
        if method not in done:
            curve = family_curve(method, discovery, evaluator, settings)
            done[method] = MethodCurve(method, curve, time.perf_counter() - begin)
        names = dict.fromkeys((*wanted, *done))
        comparison = replace(comparison, curves=tuple(done[name] for name in names if name in done))
        after_each(comparison)
    return comparison


def _sides(
    model: Model,
    task: Task | PreparedTask,
    held_out: Task | PreparedTask | float | None,
    seed: int,
    progress: bool,
    processes: bool,
) -> tuple[PreparedTask, PreparedTask]:
    """The pairs to make circuits on and those to judge them on."""
    prepared = prepare(model, task, progress, processes)
    if isinstance(held_out, (int, float)):
        return split(model, prepared, held_out, seed=seed)
    return prepared, prepared if held_out is None else prepare(model, held_out, progress, processes)


def _origin(discovery: PreparedTask, judged: PreparedTask, settings: FamilySettings, seed: int) -> Provenance:
    """What two comparisons must share for their curves to be put on one plot."""
    parameters = to_json(settings)
    for name in ("progress", "memory", "batch_size"):  # these change no result
        del parameters[name]
    tasks = [task_digest(side) for side in (discovery, judged)]
    return provenance_of(discovery, "compare", seed).with_parameters(**parameters, tasks=tasks)


def _figures(curve: Curve) -> dict[str, float | int | None]:
    return {"cpr": curve.cpr, "cmd": curve.cmd, "log_cmd": curve.log_cmd, "k_star": curve.k_star()}
