"""How well every scoring method finds the edges that matter in models whose circuit is known.

python -m bench ground_truth
python -m bench.ground_truth --json out/ground_truth.json --write    # and renew docs/ground_truth.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

import circuitvit as cv
from circuitvit.groundtruth import PARTS, PROGRAMS
from circuitvit.testing import Separation, active_edges, separation

PAIRS = 12
SEEDS = (0, 1, 2)
"""Each draws the directions of a model, its images, and the gates of a search."""

PAGE = Path(__file__).resolve().parents[1] / "docs" / "ground_truth.md"
MARKS = ("<!-- measured: begin -->", "<!-- measured: end -->")

CASES = (("", "noising"), *((part, "noising") for part in PARTS), ("gate", "denoising"))
"""Part and direction of all measurements; without a part first."""


@dataclass(frozen=True)
class Measured:
    """One method on one model.

    Attributes:
        active: against the edges whose own ablation matters; None where the method refuses the task.
        wired: against the edges that the program is wired by.
    """

    method: str
    program: str
    part: str
    direction: str
    seed: int
    active: Separation | None
    wired: Separation | None


@dataclass(frozen=True)
class Found:
    """What `find` found in one model.

    Attributes:
        precision: share of the found edges that are wired.
        recall: share of the active edges that were found.
    """

    program: str
    part: str
    seed: int
    edges: int
    precision: float
    recall: float


def task_of(known: cv.Compiled, direction: str, seed: int) -> cv.Task:
    metric = cv.logit_diff("yes", "no")
    return cv.Task(*known.pairs(PAIRS, seed=seed), metric=metric, direction=direction)  # type: ignore[arg-type]


def measure(program: str, part: str, direction: str, seed: int) -> Iterator[Measured]:
    """All methods on one model."""
    known = cv.compiled(program, parts=(part,) if part else (), seed=seed)
    task = task_of(known, direction, seed).prepare(known.model)
    truth = active_edges(known.model, task)
    for method in cv.METHODS:
        try:
            scores = cv.attribute(known.model, task, method, progress=False)
        except cv.CircuitViTError:
            yield Measured(method, program, part, direction, seed, None, None)
            continue
        sides = separation(scores, truth), separation(scores, known.wired)
        yield Measured(method, program, part, direction, seed, *sides)


def search(program: str, part: str, seed: int) -> Found:
    """`find` on one model."""
    known = cv.compiled(program, parts=(part,) if part else (), seed=seed)
    task = task_of(known, "noising", seed).prepare(known.model)
    truth = active_edges(known.model, task)
    plan = cv.Plan(steps=30, trim_runs=400, batch_size=PAIRS, seed=seed)
    circuit = cv.find(known.model, task, plan=plan, progress=False).circuit
    right, recalled = len(circuit & known.wired) / len(circuit), len(circuit & truth) / len(truth)
    return Found(program, part, seed, len(circuit), right, recalled)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table in Markdown."""
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(found: list[Separation | None]) -> str:
    """ROC AUC and average precision, averaged over models."""
    known = [each for each in found if each is not None]
    if len(known) < len(found):
        return "refused"
    auc = np.mean([each.roc_auc for each in known])
    precision = np.mean([each.average_precision for each in known])
    return f"{auc:.3f} / {precision:.3f}"


def by_program(measured: list[Measured]) -> str:
    """Methods by programs, without parts, against the active edges."""
    rows = []
    for method in cv.METHODS:
        own = [each for each in measured if each.method == method and not each.part]
        cells = [cell([each.active for each in own if each.program == name]) for name in PROGRAMS]
        rows.append([f"`{method}`", *cells])
    return table(["method", *(f"`{name}`" for name in PROGRAMS)], rows)


def by_part(measured: list[Measured], label: Callable[[Measured], Separation | None]) -> str:
    """Parts by methods, averaged over programs."""
    rows = []
    for part, direction in CASES:
        own = [each for each in measured if (each.part, each.direction) == (part, direction)]
        cells = [cell([label(each) for each in own if each.method == method]) for method in cv.METHODS]
        name = f"`{part}`" if part else "none"
        rows.append([name + (", denoising" if direction == "denoising" else ""), *cells])
    return table(["part", *(f"`{method}`" for method in cv.METHODS)], rows)


def of_find(found: list[Found]) -> str:
    """Parts by programs: precision and recall of `find`."""
    rows = []
    for part in ("", *PARTS):
        cells = []
        for name in PROGRAMS:
            own = [each for each in found if (each.part, each.program) == (part, name)]
            cells.append(
                f"{np.mean([e.precision for e in own]):.2f} / {np.mean([e.recall for e in own]):.2f}"
            )
        rows.append([f"`{part}`" if part else "none", *cells])
    return table(["part", *(f"`{name}`" for name in PROGRAMS)], rows)


def report(measured: list[Measured], found: list[Found]) -> str:
    """All tables, in Markdown."""
    return "\n\n".join(
        [
            "### Methods against programs",
            f"ROC AUC / average precision of |score| against the active edges, means of {len(SEEDS)} seeds.",
            by_program(measured),
            "### Methods against adversarial parts",
            "The same, means of the programs too. Against the active edges `exact` is right by definition:",
            by_part(measured, lambda each: each.active),
            "Against all wired edges, which is where redundancy and cancellation hurt:",
            by_part(measured, lambda each: each.wired),
            "### The search",
            "Share of the edges found by `find` that are wired / share of the active edges that it found.",
            of_find(found),
        ]
    )


def write(text: str) -> None:
    """Renew the measured part of the documentation."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{after}", encoding="utf-8")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write every single measurement to this file")
    parser.add_argument("--write", action="store_true", help="renew the tables in docs/ground_truth.md")
    options = parser.parse_args()
    models = [(program, seed) for program in PROGRAMS for seed in SEEDS]
    measured = [
        each
        for program, seed in tqdm(models, desc="scores")
        for part, direction in CASES
        for each in measure(program, part, direction, seed)
    ]
    found = [
        search(program, part, seed)
        for program, seed in tqdm(models, desc="searches")
        for part in ("", *PARTS)
    ]
    text = report(measured, found)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        content = {
            name: [asdict(each) for each in rows] for name, rows in (("scores", measured), ("find", found))
        }
        options.json.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if options.write:
        write(text)


if __name__ == "__main__":
    main()
