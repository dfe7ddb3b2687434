"""How small a circuit does `find` give on photographs? Five pairs, cat against dog, on the real ViT-Ti/16.

Cats and dogs are drawn with a fixed seed among those that the model calls so; target and foil are the classes
that it gives them. Asked: 1-minimal circuits with faithfulness in [0.9, 1.1] and the same top class, of at
most 110 edges each and 75 as a median, each at the price of at most 2,000 plain forwards (processor time on
both sides; forwards before and after the search). Each pair is written as soon as it is done, and a run goes
on from there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import circuitvit as cv
from bench._photographs import draw_pairs, load_model, shared_folder
from bench._timing import Row, peak_mib
from circuitvit.graph.files import read_json, write_json

MEDIAN_EDGES = 75
MOST_EDGES = 110
BAND = (0.9, 1.1)
MOST_FORWARDS, STRETCH_FORWARDS = 2000, 1000
FRESH = 7
"""Seed of five pairs that nothing was tuned on."""

FORWARDS = 40
"""Plain forwards that are timed on each side of a search."""


@dataclass(frozen=True)
class Found:
    """What was found on one pair."""

    clean: str
    corrupt: str
    behaviour: str
    edges: int
    faithfulness: float
    minimal: bool
    same_top: bool
    seconds: float
    forwards: float
    steps: int
    trim_runs: int

    @property
    def holds(self) -> bool:
        return self.minimal and self.same_top and BAND[0] <= self.faithfulness <= BAND[1]


def rows() -> list[Row]:
    """The price of `find`, a median of five pairs that nothing was tuned on; nothing without the weights."""
    if not shared_folder().is_dir():
        return []
    model, plan = load_model(), cv.Plan(40, 2000, 1, FRESH)
    found = [search(model, *pair, plan) for pair in draw_pairs(model, 5, FRESH)]
    edges = sorted(each.edges for each in found)
    sizes = f"{edges[2]} edges ({edges[0]} to {edges[-1]})"
    title = f"find, one pair, trained ViT-Ti/16: median of five pairs, {sizes}"
    price = statistics.median(each.forwards for each in found)
    spent = statistics.median(each.seconds for each in found)
    floor = "1 plain forward; processor time"
    return [Row(title, floor, price, MOST_FORWARDS, STRETCH_FORWARDS, spent, spent / price, peak_mib())]


def search(model: cv.Model, cat: Path, dog: Path, plan: cv.Plan) -> Found:
    """One pair: find, and run the circuit once more from outside."""
    prepared = cv.Task([cat], [dog]).prepare(model)
    image = prepared.batch(range(1)).base
    before = forwards(model, image)
    begin = time.process_time()
    finding = cv.find(model, prepared, plan=plan)
    seconds = time.process_time() - begin
    forward = (before + forwards(model, image)) / (2 * FORWARDS)
    ends = (cv.Circuit.full(prepared.graph), cv.Circuit.empty(prepared.graph), finding.circuit)
    logits = [cv.run(model, prepared, circuit) for circuit in ends]
    target, foil = prepared.metric.target, prepared.metric.foil
    assert target is not None
    assert foil is not None
    whole, nothing, found = (float(each[target] - each[foil]) for each in logits)
    return Found(
        clean=cat.name,
        corrupt=dog.name,
        behaviour=prepared.metric.label,
        edges=len(finding.circuit),
        faithfulness=(found - nothing) / (whole - nothing),
        minimal=finding.minimal,
        same_top=int(logits[0].argmax()) == int(logits[2].argmax()),
        seconds=seconds,
        forwards=seconds / forward,
        steps=plan.steps,
        trim_runs=plan.trim_runs,
    )


@torch.no_grad()
def forwards(model: cv.Model, image: torch.Tensor) -> float:
    """The processor time of some plain forwards."""
    model(image)
    begin = time.process_time()
    for _ in range(FORWARDS):
        model(image)
    return time.process_time() - begin


def main() -> None:
    """Print the table; the exit code is 1 if what was asked is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", type=int, help="search this many pairs now, and stop")
    parser.add_argument("--steps", type=int, default=40, help="of thinning (default 40)")
    parser.add_argument("--trim-runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the pairs, and of the search")
    parser.add_argument("--out", type=Path, default=Path("out/bench/small_circuits.json"))
    options = parser.parse_args()
    model = load_model()
    drawn = draw_pairs(model, options.pairs, options.seed)
    plan = cv.Plan(options.steps, options.trim_runs, 1, options.seed)
    known = [Found(**row) for row in read_json(options.out)["rows"]] if options.out.exists() else []
    done = {(row.clean, row.corrupt, row.steps, row.trim_runs) for row in known}
    left = [pair for pair in drawn if (pair[0].name, pair[1].name, plan.steps, plan.trim_runs) not in done]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for cat, dog in left[: options.only]:
        known.append(search(model, cat, dog, plan))
        write_json(options.out, {"rows": [asdict(row) for row in known]})
        print(known[-1], flush=True)
    report([row for row in known if (row.steps, row.trim_runs) == (plan.steps, plan.trim_runs)])


def report(rows: list[Found]) -> None:
    """The table, and whether what was asked is met."""
    titles = f"{'edges':>6}{'f':>8}{'minimal':>9}{'same top':>10}{'seconds':>9}{'forwards':>10}  behaviour"
    print(f"{'clean':16}{'corrupt':16}{titles}")
    for row in rows:
        print(
            f"{row.clean:16}{row.corrupt:16}{row.edges:6}{row.faithfulness:8.3f}{row.minimal!s:>9}"
            f"{row.same_top!s:>10}{row.seconds:9.0f}{row.forwards:10.0f}  {row.behaviour}"
        )
    median = statistics.median(row.edges for row in rows)
    price = statistics.median(row.forwards for row in rows)
    held = sum(row.holds for row in rows)
    print(f"median {median:g} edges, at most {MEDIAN_EDGES} asked")
    print(f"median {price:.0f} forwards, at most {MOST_FORWARDS} asked")
    print(f"{held} of {len(rows)} are minimal, faithful and of the same top class")
    large = [row for row in rows if row.edges > MOST_EDGES]
    if median > MEDIAN_EDGES or held < len(rows) or price > MOST_FORWARDS or large:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
