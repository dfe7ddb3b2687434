"""The main job, as `discover` and `demo` run it: search, score, verify, and write each result at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from circuitvit.cli.fidelity import about_choice, check_calibration, checked
from circuitvit.cli.folder import Folder
from circuitvit.cli.inputs import batch_size, check_choice
from circuitvit.cli.options import RunOptions, SearchOptions
from circuitvit.cli.screen import Clock, remark
from circuitvit.cli.values import parse_plan
from circuitvit.errors import DataError, OptionError

if TYPE_CHECKING:
    from circuitvit.graph import Circuit, EdgeScores, Ranking
    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask, Task
    from circuitvit.verification import Report

FILES = ("circuit.json", "scores.json", "report.json", "report.md", "circuit.svg", "circuit.dot")

FAITHFULNESS = 0.9
WITHIN = "120s"
TAU = 0.02
CALIBRATED = 60
MASK_BATCH = 16
DRAWN_EDGES = 300
"""How many edges a diagram shows at most, the strongest; more than this cannot be followed by eye."""


class Outcome(NamedTuple):
    """What a discovery gives.

    Attributes:
        circuit: that was found.
        report: of its verification.
        summary: how it was found, in plain sentences; "" where there is nothing to say.
    """

    circuit: Circuit
    report: Report
    summary: str


class _Found(NamedTuple):
    """A circuit, the scores that it was selected by (None after a search), and how it was found."""

    circuit: Circuit
    scores: EdgeScores | None
    summary: str


def discover_circuit(
    model: Model,
    prepared: PreparedTask,
    held_out: PreparedTask | Task | None,
    search: SearchOptions,
    run: RunOptions,
    n_random: int,
    folder: Folder,
    clock: Clock,
) -> Outcome:
    """Find a circuit, verify it, and write all of `FILES`.

    Args:
        model: to look into.
        prepared: the task, prepared and checked.
        held_out: the task of other pairs to verify on, or None.
        search: how to search, checked by `check_search`.
        run: how to run.
        n_random: how many random circuits to compare with.
        folder: to write to, entered.
        clock: to time the phases by.

    Raises:
        CircuitViTError: as the library's functions; what was found by then has been written.
    """
    from circuitvit.verification import verify

    if search.edges is not None and search.edges > prepared.graph.n_edges:
        raise OptionError(f"--edges {search.edges}: the model has {prepared.graph.n_edges:,} edges")
    with clock.phase("search"):
        state = folder.state(search.resume) if resumes(search.method) else None
        find_it = _METHODS.get(search.method, _select)
        circuit, scores, summary = find_it(model, prepared, search, run, state)
        folder.write("circuit.json", circuit.save)
    if scores is None:
        with clock.phase("scores"):
            circuit, scores = _scored(model, prepared, circuit, run)
            folder.write("circuit.json", circuit.save)
    with clock.phase("files"):
        folder.write("scores.json", scores.save)
        for name in ("circuit.svg", "circuit.dot"):
            folder.write(name, partial(circuit.draw, max_edges=min(DRAWN_EDGES, max(1, len(circuit)))))
    with clock.phase("verification"):
        report = verify(
            model, prepared, circuit, held_out=held_out, n_random=n_random, seed=run.seed,
            batch_size=run.batch_size, memory=run.budget, progress=run.progress,
        )  # fmt: skip
    with clock.phase("files"):
        for name in ("report.json", "report.md"):
            folder.write(name, report.save)
    return Outcome(circuit, report, summary)


# -- options that must make sense together -------------------------------------------------------


def check_search(search: SearchOptions, direction: str) -> None:
    """Refuse unknown names, options that the method does not look at, and values out of range.

    Raises:
        NameNotFoundError: for an unknown method, ranking or divergence, with the nearest.
        OptionError: for everything else.
    """
    from circuitvit.attribution import METHODS

    check_choice("method", search.method, (*_METHODS, *METHODS))
    scoring = search.method not in _METHODS
    uses = {
        "faithfulness": search.method == "find",
        "within": search.method == "find",
        "plan": search.method == "find",
        "start": search.method == "find",
        "tau": search.method == "acdc",
        "divergence": search.method == "acdc",
        "steps": scoring and "steps" in METHODS[search.method].keywords,
        "budget": scoring and "budget" in METHODS[search.method].keywords,
        **dict.fromkeys(("edges", "threshold", "by", "connected", "calibrate"), scoring),
    }
    for option, used in uses.items():
        if getattr(search, option) is not None and not used:
            raise OptionError(f"--method {search.method} does not use --{option}: {_USERS[option]}")
    if scoring and (search.edges is None) == (search.threshold is None):
        raise OptionError(
            f"--method {search.method} scores all edges: say how many to take with --edges K, "
            "or from which score on with --threshold SCORE"
        )
    if search.threshold is not None and search.connected is not None:
        raise OptionError("--threshold takes every edge past it: --connected and --top go with --edges")
    if not scoring and direction == "denoising":
        raise OptionError(
            f"--method {search.method} searches by ablation in the clean run: leave out --direction "
            "denoising, or choose a scoring method such as eap"
        )
    if search.plan is not None and search.within is not None:
        raise OptionError("--plan repeats a search, however long it takes: leave out --within")
    if search.plan is not None and search.start is not None:
        raise OptionError("--plan says how a search starts, with 0 steps from the whole: leave out --start")
    if search.resume and not resumes(search.method):
        raise OptionError(
            f"--method {search.method} is over too soon to be resumed: --resume belongs to find, acdc "
            "and exact"
        )
    _check_values(search)


_USERS = {
    "faithfulness": "it belongs to --method find",
    "within": "it belongs to --method find",
    "plan": "it belongs to --method find",
    "start": "it belongs to --method find",
    "tau": "it belongs to --method acdc",
    "divergence": "it belongs to --method acdc",
    "steps": "it belongs to --method eap-ig and its kin",
    "budget": "it belongs to --method hybrid and auto",
    "calibrate": "it checks scores, as of --method local",
    "edges": "it selects by score, as with --method eap",
    "threshold": "it selects by score, as with --method eap",
    "by": "it selects by score, as with --method eap",
    "connected": "it selects by score, as with --method eap",
}


def _check_values(search: SearchOptions) -> None:
    if search.by is not None:
        check_choice("ranking", search.by, ("magnitude", "signed"))
    if search.start is not None:
        check_choice("start", search.start, ("mask", "whole"))
    check_calibration(search.calibrate)
    if search.budget is not None:
        from circuitvit.attribution import Budget

        Budget.parse(search.budget)
    if search.divergence is not None:
        check_choice("divergence", search.divergence, ("kl", "metric"))
    if search.within is not None:
        from circuitvit.attribution.budget import seconds

        seconds(search.within)
    if search.plan is not None:
        parse_plan(search.plan)
    for option, value in (("threshold", search.threshold), ("tau", search.tau)):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"--{option} must be a positive number, not {value:g}")
    if search.faithfulness is not None and not 0 < search.faithfulness < 1:
        raise OptionError(f"--faithfulness must lie between 0 and 1, not {search.faithfulness:g}")


# -- the searches --------------------------------------------------------------------------------


def resumes(method: str) -> bool:
    """Whether an interrupted run of a search or scoring method can be gone on with."""
    from circuitvit.attribution import METHODS

    return method in _METHODS or "state" in METHODS[method].keywords


def _find(
    model: Model, task: PreparedTask, search: SearchOptions, run: RunOptions, state: Path | None
) -> _Found:
    from circuitvit.pruning import Plan, find
    from circuitvit.pruning.find import Start

    plan = None if search.plan is None else Plan(*parse_plan(search.plan), seed=run.seed)
    starts: dict[str | None, Start] = {"mask": "mask", "whole": "whole"}
    start = starts.get(search.start)
    finding = find(
        model, task, faithfulness=search.faithfulness or FAITHFULNESS, within=search.within or WITHIN,
        seed=run.seed, batch_size=run.batch_size or MASK_BATCH, memory=run.budget, plan=plan,
        start=start, state=state, progress=run.progress,
    )  # fmt: skip
    return _Found(finding.circuit, None, finding.summary)


def _acdc(
    model: Model, task: PreparedTask, search: SearchOptions, run: RunOptions, state: Path | None
) -> _Found:
    from circuitvit.pruning import acdc

    circuit = acdc(
        model, task, search.tau or TAU, divergence="metric" if search.divergence == "metric" else "kl",
        batch_size=run.batch_size, memory=run.budget, state=state, progress=run.progress,
    )  # fmt: skip
    return _Found(circuit, None, "")


def _select(
    model: Model, task: PreparedTask, search: SearchOptions, run: RunOptions, state: Path | None
) -> _Found:
    from circuitvit.attribution import METHODS, attribute

    given: dict[str, Any] = {"steps": search.steps, "budget": search.budget, "seed": run.seed, "state": state}
    own = METHODS[search.method].keywords
    scores = attribute(
        model, task, search.method, batch_size=run.batch_size, memory=run.budget, progress=run.progress,
        **{name: value for name, value in given.items() if name in own and value is not None},
    )  # fmt: skip
    scores = checked(model, task, scores, CALIBRATED if search.calibrate is None else search.calibrate, run)
    by: Ranking = "signed" if search.by == "signed" else "magnitude"
    if search.threshold is not None:
        circuit = scores.threshold(search.threshold, by)
    elif search.connected is False:
        circuit = scores.top(search.edges or 0, by)
    else:
        circuit = scores.connected(search.edges or 0, by)
    return _Found(circuit, scores, "\n".join(about_choice(scores)))


_Search = Callable[["Model", "PreparedTask", SearchOptions, RunOptions, "Path | None"], _Found]
_METHODS: dict[str, _Search] = {"find": _find, "acdc": _acdc}


def _scored(
    model: Model, prepared: PreparedTask, circuit: Circuit, run: RunOptions
) -> tuple[Circuit, EdgeScores]:
    """The circuit of a search with the exact effects of its own edges, and scores of all edges beside it."""
    from circuitvit.attribution import attribute, provenance_of
    from circuitvit.attribution.exact import edge_effects
    from circuitvit.attribution.scoring import Running
    from circuitvit.graph import EdgeScores

    name = "exact (circuit edges only)"
    how = Running(batch_size(prepared, run), run.progress)
    values = edge_effects(prepared, circuit.kept, how) / len(prepared)
    exact = EdgeScores(prepared.graph, values, name, prepared.direction, provenance_of(prepared, name))
    try:
        scores = attribute(
            model, prepared, "eap", batch_size=run.batch_size, memory=run.budget, progress=run.progress
        )
    except (OptionError, DataError) as error:  # a metric without a gradient, or a flat one
        remark(f"scores.json holds the effects of the circuit's own edges only: {error}")
        scores = exact
    return circuit.with_scores(exact), scores
