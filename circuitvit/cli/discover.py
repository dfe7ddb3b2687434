"""`circuitvit discover`: from images and a model to a verified circuit diagram; written at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import circuitvit as cv
from circuitvit.attribution.methods import find_method
from circuitvit.cli.inputs import (
    BehaviourOptions,
    ImageOptions,
    ModelOptions,
    RunOptions,
    VerificationOptions,
    batch_size,
    load_model,
    make_held_out,
    make_task,
    parse_plan,
    prepare_both,
)
from circuitvit.cli.library import Argument, arguments, scoring_methods
from circuitvit.cli.options import Given, Keywords, command, group
from circuitvit.cli.output import Clock, Folder, Row, report_rows, show, show_notes, show_rows
from circuitvit.cli.repeat import with_command
from circuitvit.cli.wording import remark
from circuitvit.errors import DataError, OptionError, UnsupportedModelError

if TYPE_CHECKING:
    from circuitvit.graph import Circuit, EdgeScores
    from circuitvit.models import Model
    from circuitvit.tasks import PreparedTask, Task
    from circuitvit.verification import Report

PAGE = "circuit.html"
"""The result as a page: diagram, images, attention and report."""

FILES = (
    "circuit.json",
    "scores.json",
    "report.json",
    "report.md",
    "report.csv",
    "circuit.svg",
    "circuit.dot",
    PAGE,
)

TAU = 0.02
CALIBRATED = 60
DRAWN_EDGES = 300
"""How many edges a diagram shows at most, the strongest; more than this cannot be followed by eye."""

PAGE_EDGES = 3000
"""How many edges the page holds at most, which starts without them; with more it gets slow."""

_FIND, _ACDC = arguments("pruning.find"), arguments("pruning.acdc")
_PLAN = "repeat an earlier search by its steps, trim_runs and batch_size, which are in circuit.json."
SEARCHES: Mapping[str, Mapping[str, Argument]] = {
    "find": {
        **{name: _FIND[name] for name in ("keep", "faithfulness", "agreement", "within", "start")},
        "plan": _FIND["plan"]._replace(text=_PLAN),
    },
    "acdc": {"tau": _ACDC["tau"]._replace(default=TAU), "divergence": _ACDC["divergence"]},
}
"""What `--method` can be besides a scoring method, and the keywords that are its own."""

FLAGS = {
    "faithfulness": "--faithfulness SHARE",
    "agreement": "--agreement SHARE",
    "within": "--within TIME",
    "plan": "--plan N,N,N",
    "budget": "--budget COST",
}
SCORING = Keywords("Search", scoring_methods(), FLAGS)
KEYWORDS = Keywords("Search", {**SEARCHES, **scoring_methods()}, FLAGS)


@group("Search", "graph.EdgeScores.top", edges="--edges K", threshold="--threshold SCORE",
       connected="--connected/--top")  # fmt: skip
@dataclass(frozen=True)
class Selection:
    """How scores choose a circuit; None means not given.

    Attributes:
        edges: scoring methods: how many edges to take.
        threshold: or: all edges that score at least this, in units of the metric.
        by: "magnitude", or "signed": the edges that support the behaviour most, never those against it.
            [default: magnitude]
        connected: with `--edges`: grow whole paths from input to logits, or take the best edges wherever they
            are and drop those on no path. [default: connected]
        calibrate: scoring methods: edges whose exact effects are measured to say how right the scores are; 0
            for none. [default: 60]
    """

    edges: int | None = None
    threshold: float | None = None
    by: str | None = None
    connected: bool | None = None
    calibrate: int | None = None


class Search(NamedTuple):
    """A search as it was asked for: the method, its own keywords, and how scores choose a circuit."""

    method: str
    keywords: Mapping[str, Any]
    selection: Selection = Selection()
    resume: bool = False


class Outcome(NamedTuple):
    """What a discovery gives: the circuit, its verification, and in sentences how it was found."""

    circuit: Circuit
    report: Report
    summary: str


@command("Search", shares=True, method="--method NAME", out="--out -o DIR")
def discover(
    *,
    model: ModelOptions,
    images: ImageOptions,
    behaviour: BehaviourOptions,
    method: str = "find",
    keywords: Annotated[Given, KEYWORDS],
    selection: Selection,
    resume: bool = False,
    verification: VerificationOptions,
    out: Path = Path("out"),
    run: RunOptions,
) -> None:
    """Find the circuit behind a behaviour: the few edges of a model's graph that are enough for it. Give
    images that show the behaviour (clean) and images that do not (corrupt). The circuit is found on these
    pairs, tested by ablation, on other pairs where you give them, and written with a report, and as a page to
    open in a browser: diagram, images, attention and report.

    For example, with one pair and with a table of pairs:

    ```sh
    circuitvit discover --model vit_tiny_patch16_224 \\
        --checkpoint vit_tiny.safetensors --clean cat.jpg --corrupt dog.jpg \\
        --target tabby --foil "Border collie" --out out/cat_dog

    circuitvit discover --model vit_base_patch16_224 --pretrained \\
        --pairs pairs.csv --held-out-pairs more.csv --method eap-ig --edges 200
    ```

    Args:
        method: `find` searches for a small faithful circuit; `acdc` removes edge after edge; all methods of
            `circuitvit attribute` score all edges, of which the best are taken.
        resume: find, acdc, exact: go on where an interrupted run into `--out` ended.
        out: folder for the results; made if missing, older ones replaced.
    """
    search = checked_search(Search(method, keywords, selection, resume), behaviour.direction, run.seed)
    task = make_task(images, behaviour, run.seed)
    held_out = make_held_out(verification, behaviour, run.seed, images.pair)
    clock = Clock()
    with Folder(out, FILES) as folder:
        with clock.phase("model"):
            loaded = load_model(model)
        with clock.phase("images"):
            prepared, others = prepare_both(loaded, task, held_out, run)
        outcome = discover_circuit(
            loaded, prepared, others, search, run, verification.random, folder, clock, model
        )
    rows = [*report_rows(outcome.report), Row("time", str(clock))]
    show_rows(f"Circuit of {loaded.name} for {prepared.metric.label}", rows)
    show_notes("How it was found", outcome.summary.splitlines())
    show_notes("Caveats", outcome.report.warnings)
    show(f"\nwrote {folder.path}: {', '.join(folder.saved)}")
    show_page(folder)


def discover_circuit(
    model: Model,
    prepared: PreparedTask,
    held_out: PreparedTask | Task | None,
    search: Search,
    run: RunOptions,
    n_random: int,
    folder: Folder,
    clock: Clock,
    named: ModelOptions,
) -> Outcome:
    """Find a circuit, verify it, and write all of `FILES`.

    Args:
        model: to look into.
        prepared: the task, prepared and checked.
        held_out: the task of other pairs to verify on, or None.
        search: how to search, from `checked_search`.
        run: how to run.
        n_random: how many random circuits to compare with.
        folder: to write to, entered.
        clock: to time the phases by.
        named: how the model was named, for the report.

    Raises:
        CircuitViTError: as the library's functions; what was found by then has been written.
    """
    edges = search.selection.edges
    if edges is not None and edges > prepared.graph.n_edges:
        raise OptionError(f"--edges {edges}: the model has {prepared.graph.n_edges:,} edges")
    with clock.phase("search"):
        circuit, scores, summary = _found(model, prepared, search, run, folder)
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
        report = cv.verification.verify(
            model, prepared, circuit, held_out=held_out, n_random=n_random, seed=run.seed, **run.settings()
        )
        report = with_command(report, named, cv.verification.recipe.searched(circuit.provenance))
    with clock.phase("files"):
        for name in ("report.json", "report.md", "report.csv"):
            folder.write(name, report.save)
        folder.write(PAGE, partial(save_page, model, prepared, circuit, report))
    return Outcome(circuit, report, summary)


def show_page(folder: Folder) -> None:
    """Say what to open, and how."""
    page = folder.path / PAGE
    show(f"\nopen this: {page}\nin a browser: {page.resolve().as_uri()}")


def save_page(model: Model, task: PreparedTask, circuit: Circuit, report: Report, path: Path) -> None:
    """The page, with the images of the first pair unless the model's patches have no place on them."""
    shown = partial(
        circuit.draw,
        path,
        title=f"Circuit of {model.name} for {task.metric.label}",
        max_edges=min(PAGE_EDGES, max(1, len(circuit))),
        report=report,
    )
    try:
        shown(model=model, task=task)
    except (DataError, UnsupportedModelError) as error:
        remark(f"{PAGE} holds no images: {error}")
        shown()


# -- options that must make sense together -------------------------------------------------------


def checked_search(search: Search, direction: str, seed: int) -> Search:
    """A search whose options make sense together, with values as the library takes them.

    Raises:
        NameNotFoundError: for an unknown method, with the nearest.
        OptionError: for options that the method does not take, and values out of range.
    """
    method, given, chosen = search.method, dict(search.keywords), search.selection
    if method not in SEARCHES:
        find_method(method, SEARCHES)
    KEYWORDS.check(method, given)
    check_scoring(method, chosen.calibrate, search.resume, given)
    if method in SEARCHES:
        for name, value in asdict(chosen).items():
            if value is not None:
                raise OptionError(
                    f"--method {method} does not use --{name}: it belongs to scoring methods such as "
                    "--method eap"
                )
        if direction == "denoising":
            raise OptionError(
                f"--method {method} searches by ablation in the clean run: leave out --direction "
                "denoising, or choose a scoring method such as eap"
            )
    elif (chosen.edges is None) == (chosen.threshold is None):
        raise OptionError(
            f"--method {method} scores all edges: say how many to take with --edges K, "
            "or from which score on with --threshold SCORE"
        )
    if chosen.threshold is not None and chosen.connected is not None:
        raise OptionError("--threshold takes every edge past it: --connected and --top go with --edges")
    for name, value in (("threshold", chosen.threshold), ("tau", given.get("tau"))):
        if value is not None and not 0 < value < float("inf"):
            raise OptionError(f"--{name} must be a positive number, not {value:g}")
    if "within" in given:
        cv.attribution.budget.seconds(given["within"])
    if not 0 < given.get("faithfulness", 0.5) < 1:
        raise OptionError(f"--faithfulness must lie between 0 and 1, not {given['faithfulness']:g}")
    if not 0 < given.get("agreement", 0.5) <= 1:
        raise OptionError(f"--agreement must lie above 0 and be at most 1, not {given['agreement']:g}")
    if method == "find":
        _check_kept(given)
    if "plan" in given:
        if "within" in given:
            raise OptionError("--plan repeats a search, however long it takes: leave out --within")
        if "start" in given:
            raise OptionError(
                "--plan says how a search starts, with 0 steps from the whole: leave out --start"
            )
        given["plan"] = cv.Plan(
            *parse_plan(given["plan"]), seed=seed, keep=given.get("keep", _FIND["keep"].default)
        )
    return search._replace(keywords=given)


def _check_kept(given: Mapping[str, Any]) -> None:
    """Refuse a target of what is not kept.

    Raises:
        OptionError: saying which is.
    """
    prediction = given.get("keep") == "prediction"
    other, target = ("faithfulness", "agreement") if prediction else ("agreement", "faithfulness")
    if other in given:
        keep = "prediction" if prediction else "behaviour"
        raise OptionError(f"--keep {keep} goes by --{target}: leave out --{other}")


def check_scoring(method: str, calibrate: int | None, resume: bool, given: Mapping[str, Any]) -> None:
    """Refuse what no scoring method can do, before anything runs.

    Raises:
        OptionError: for too few edges to measure, a budget that is none, a method that is not resumed.
    """
    least = cv.attribution.calibration.LEAST
    if calibrate is not None and 0 < calibrate < least:
        raise OptionError(f"--calibrate takes at least {least} edges, or 0 for none, not {calibrate}")
    if "budget" in given:
        cv.attribution.Budget.parse(given["budget"])
    if resume and not resumes(method):
        raise OptionError(
            f"--method {method} is over too soon to be resumed: --resume belongs to find, acdc and exact"
        )


def resumes(method: str) -> bool:
    """Whether an interrupted run of a search or scoring method can be gone on with."""
    return method in SEARCHES or "state" in scoring_methods()[method]


# -- the searches --------------------------------------------------------------------------------


def _found(
    model: Model, task: PreparedTask, search: Search, run: RunOptions, folder: Folder
) -> tuple[Circuit, EdgeScores | None, str]:
    """A circuit, the scores that it was selected by (None after a search), and how it was found."""
    more: dict[str, Any] = {**run.settings(), **search.keywords}
    if resumes(search.method):
        more["state"] = folder.state(search.resume)
    if search.method == "find":
        size = {} if run.batch_size else {"batch_size": _FIND["batch_size"].default}
        finding = cv.pruning.find(model, task, seed=run.seed, **{**more, **size})
        return finding.circuit, None, finding.summary
    if search.method == "acdc":
        return cv.pruning.acdc(model, task, **{"tau": TAU, **more}), None, ""
    if "seed" in scoring_methods()[search.method]:
        more["seed"] = run.seed
    scores = cv.attribution.attribute(model, task, search.method, **more)
    wanted = search.selection
    scores = calibrated(
        model, task, scores, CALIBRATED if wanted.calibrate is None else wanted.calibrate, run
    )
    by: Any = wanted.by or "magnitude"
    if wanted.threshold is not None:
        circuit = scores.threshold(wanted.threshold, by)
    else:
        circuit = (scores.top if wanted.connected is False else scores.connected)(wanted.edges or 0, by)
    return circuit, scores, "\n".join(about_choice(scores))


def calibrated(model: Model, task: PreparedTask, scores: EdgeScores, n: int, run: RunOptions) -> EdgeScores:
    """The scores with their fidelity, from the exact effects of `n` edges; as they are where `n` is 0."""
    return cv.calibrate(model, task, scores, n, seed=run.seed, **run.settings()) if n else scores


def about_choice(scores: EdgeScores) -> list[str]:
    """Which method was taken and why, where that was left open."""
    chosen = scores.provenance.parameters.get("chosen")
    return [] if chosen is None else [f"Scored by {chosen}."]


def _scored(
    model: Model, prepared: PreparedTask, circuit: Circuit, run: RunOptions
) -> tuple[Circuit, EdgeScores]:
    """The circuit of a search with the exact effects of its own edges, and scores of all edges beside it."""
    name = "exact (circuit edges only)"
    how = cv.attribution.scoring.Running(batch_size(prepared, run), run.progress)
    values = cv.attribution.exact.edge_effects(prepared, circuit.kept, how) / len(prepared)
    origin = cv.attribution.provenance_of(prepared, name)
    exact = cv.EdgeScores(prepared.graph, values, name, prepared.direction, origin)
    try:
        scores = cv.attribution.attribute(model, prepared, "eap", **run.settings())
    except (OptionError, DataError) as error:  # a metric without a gradient, or a flat one
        remark(f"scores.json holds the effects of the circuit's own edges only: {error}")
        scores = exact
    return circuit.with_scores(exact), scores
