"""One circuit for many photographs: 64 cat-dog pairs to discover on, 36 others to judge on, real ViT-Ti/16.

Asked: one circuit of at most 12 % of the edges with faithfulness in [0.9, 1.1] on the held-out pairs (metric:
log-odds of the cat classes 281-285 against the dog classes 151-268), and the curves of at least six methods
on the same split, as a table and a plot in docs/.

It works in stages and writes each result at once, so that a run goes on where the last one ended:

    pairs       every photograph once, a cat with a dog, drawn and split with a fixed seed
    curves      scoring methods, each ranked on the discovery pairs (`comparison.json`)
    masks       one mask trained down to a few sizes (`mask_*.json`), and their curve
    thinned     the model thinned to the same sizes and smaller ones (`thinned_*.json`), and their curve
    circuit     the smallest of all that is surely faithful on the discovery pairs, verified on the others
    docs        the table between the marks in docs/methods.md, and docs/images/dataset_methods.svg

With `--tiny` all of it runs on the bundled model and drawn pictures in a minute, and docs/ stays as it is.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

import circuitvit as cv
from bench._photographs import CATS, DOGS, load_model, shared_data
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.pruning.refine import noising_evaluator
from circuitvit.tasks import PreparedTask, Split
from circuitvit.tasks.images import list_images
from circuitvit.verification import Bootstrap
from circuitvit.verification.drift_runs import carried_share
from circuitvit.views.comparison import Comparison, MethodCurve, compare

HELD_OUT = 0.36
SIZES = (0.005, 0.01, 0.02, 0.035, 0.06, 0.08, 0.12, 0.2, 0.5, 1.0)
TRAINED = (0.035, 0.059, 0.078, 0.118)
"""Sizes that a mask is trained down to, each with a little room below a round share of the edges."""

THINNED = (0.053, *TRAINED)
"""Sizes that the model is thinned to."""

LARGEST = 0.12
BAND = (0.9, 1.1)
METHODS = ("random", "eap", "eap-ig", "relp", "gim", "local")
"""Estimates of every kind; `exact` on 64 pairs takes as long as all of this."""

DOCS = Path(__file__).resolve().parents[1] / "docs"
MARKS = ("<!-- dataset_circuit: begin -->", "<!-- dataset_circuit: end -->")


@dataclass(frozen=True)
class Plan:
    """What is run, and where it is written.

    Attributes:
        out: folder of all results but docs.
        mask: how masks are trained.
        methods: scoring methods.
        tiny: whether this is only a rehearsal.
    """

    out: Path
    mask: cv.MaskSettings
    methods: tuple[str, ...]
    tiny: bool


def pairs(tiny: bool, seed: int = 0) -> tuple[cv.Model, Split]:
    """Every photograph once, a cat with a dog; another seed gives other pairs and another split."""
    if tiny:
        model = cv.load("catdog-tiny")
        task = cv.Task(*catdog_pairs(25, seed=seed), metric=cv.logit_diff("cat", "dog"))
        return model, cv.split(model, task, HELD_OUT, seed=seed)
    model, folder = load_model(), shared_data() / "images" / "cats_vs_dogs"
    cats, dogs = list_images(folder / "cats"), list_images(folder / "dogs")
    order = np.random.default_rng(seed).permutation(len(dogs))
    metric = cv.logit_diff(tuple(CATS), tuple(DOGS))
    task = cv.Task(cats, [dogs[index] for index in order], metric=metric)
    return model, cv.split(model, task, HELD_OUT, seed=seed)


def curves(model: cv.Model, sides: Split, plan: Plan) -> Comparison:
    """The scoring methods, and whatever an earlier run has left."""
    path = plan.out / "comparison.json"
    settings = cv.FamilySettings(fractions=SIZES, mask=plan.mask)
    return compare(
        model, sides.discovery, plan.methods, held_out=sides.held_out, settings=settings,
        known=Comparison.load(path) if path.exists() else None,
        after_each=lambda found: found.save(path),
    )  # fmt: skip


def masks(model: cv.Model, discovery: PreparedTask, plan: Plan) -> tuple[list[cv.Circuit], float]:
    """A mask of each size, and the seconds that their one training took."""

    def learned(sizes: list[int]) -> list[cv.Circuit]:
        found = cv.learn_masks(model, discovery, sizes, plan.mask)
        return [each.at_most(size) for each, size in zip(found, sorted(sizes, reverse=True), strict=True)]

    return _family("mask", TRAINED, learned, model, plan)


def thinned(model: cv.Model, discovery: PreparedTask, plan: Plan) -> tuple[list[cv.Circuit], float]:
    """The circuits of one thinning, and the seconds that it took."""

    def thin(sizes: list[int]) -> list[cv.Circuit]:
        return list(cv.thin(model, discovery, sizes, state=plan.out / "thinning.safetensors").circuits)

    return _family("thinned", THINNED, thin, model, plan)


def _family(
    name: str,
    shares: Sequence[float],
    make: Callable[[list[int]], list[cv.Circuit]],
    model: cv.Model,
    plan: Plan,
) -> tuple[list[cv.Circuit], float]:
    """Circuits of some sizes that are made together, or those that an earlier run has left."""
    paths = [plan.out / f"{name}_{share:g}.json" for share in sorted(shares, reverse=True)]
    if not all(path.exists() for path in paths):
        begin = time.process_time()
        circuits = make([round(share * model.graph.n_edges) for share in shares])
        seconds = time.process_time() - begin
        for path, circuit in zip(paths, circuits, strict=True):
            took = circuit.provenance.with_parameters(seconds=seconds)
            cv.Circuit(circuit.graph, circuit.kept, provenance=took).save(path)
    found = [cv.Circuit.load(path, graph=model.graph) for path in paths]
    print(f"{name}: {', '.join(str(len(each)) for each in found)} edges", flush=True)
    return found, float(found[0].provenance.parameters["seconds"])


def with_family(
    comparison: Comparison,
    name: str,
    model: cv.Model,
    sides: Split,
    plan: Plan,
    found: Sequence[cv.Circuit],
    seconds: float,
) -> Comparison:
    """The comparison with the curve of the masks, or of thinning."""
    curve = cv.circuit_curve(model, sides.held_out, found, name, fractions=SIZES)
    others = tuple(each for each in comparison.curves if each.method != name)
    whole = replace(comparison, curves=(*others, MethodCurve(name, curve, seconds)))
    whole.save(plan.out / "comparison.json")
    return whole


def one_circuit(model: cv.Model, sides: Split, plan: Plan, found: Sequence[cv.Circuit]) -> cv.Report:
    """The smallest circuit surely faithful where it was found, else the most faithful, judged elsewhere.

    Surely: the interval of 95 % begins in the band. The smallest whose mean is in it lies at the band's end
    by chance as often as not, and falls out of it on other pairs.
    """
    evaluator = noising_evaluator(sides.discovery)
    small = sorted((circuit for circuit in found if circuit.density <= LARGEST), key=len)
    judged = [(each, carried_share(evaluator, each, Bootstrap())) for each in small]
    for circuit, share in judged:
        print(f"{len(circuit)} edges: {share} where it was found", flush=True)
    sure = [each for each, share in judged if (share.low or 0) >= BAND[0] and share.value <= BAND[1]]
    nearest, _ = min(judged, key=lambda each: abs(1 - each[1].value))
    chosen = sure[0] if sure else nearest
    chosen.save(plan.out / "circuit.json")
    report = cv.verify(model, sides.discovery, chosen, held_out=sides.held_out)
    for name in ("report.json", "report.md"):
        report.save(plan.out / name)
    return report


def summary(command: str, report: cv.Report, comparison: Comparison) -> str:
    """What the page says: the circuit, and the table of all methods."""
    found, judged = report.task, report.headline
    return (
        f"`{command}`: {found.n_pairs} pairs to discover on, {judged.n_pairs} to judge "
        f"on. One circuit of {report.size.edges} edges ({report.size.density:.1%}) keeps "
        f"{judged.faithfulness} of the behaviour on the held-out pairs, {found.faithfulness} where it was "
        f"found; its top class is the model's on {judged.agreement.value:.0%} of the images, and it fails on "
        f"{len(judged.failures)} pairs.\n\n"
        f"{comparison.to_markdown()}\n![Faithfulness by size of every method](images/dataset_methods.svg)\n"
    )


def write_docs(text: str, comparison: Comparison) -> None:
    """Put the text between the marks, and the plot beside it."""
    page = DOCS / "methods.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}", encoding="utf-8")
    comparison.save(DOCS / "images" / "dataset_methods.svg")


def main() -> None:
    """Run what is left of the stages; the exit code is 1 if what was asked is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on the bundled model")
    parser.add_argument("--seed", type=int, default=0, help="of the pairs and of the split (default 0)")
    parser.add_argument("--steps", type=int, default=800, help="of training for each mask (default 800)")
    parser.add_argument("--batch-size", type=int, default=4, help="pairs in a step (default 4)")
    parser.add_argument("--out", type=Path, help="folder (default out/bench/dataset)")
    options = parser.parse_args()
    out = options.out or Path("out/bench") / ("dataset_tiny" if options.tiny else "dataset")
    out.mkdir(parents=True, exist_ok=True)
    mask = cv.MaskSettings(steps=200 if options.tiny else options.steps, batch_size=options.batch_size)
    plan = Plan(out, mask, METHODS, options.tiny)
    model, sides = pairs(plan.tiny, options.seed)
    comparison = curves(model, sides, plan)
    found: list[cv.Circuit] = []
    for name, make in (("learned", masks), ("thinned", thinned)):
        circuits, seconds = make(model, sides.discovery, plan)
        comparison = with_family(comparison, name, model, sides, plan, circuits, seconds)
        found += circuits
    report = one_circuit(model, sides, plan, found)
    text = summary(f"python -m bench.dataset_circuit --seed {options.seed}", report, comparison)
    print(text)
    if not plan.tiny:
        write_docs(text, comparison)
    comparison.save(out / "comparison.svg")
    comparison.save(out / "comparison.png")
    value = report.headline.faithfulness.value
    met = report.size.density <= LARGEST and BAND[0] <= value <= BAND[1]
    print(f"at most {LARGEST:.0%} of the edges with f in {BAND}: {'met' if met else 'missed'}")
    print(f"{len(comparison.curves)} methods compared, at least 6 asked")
    if not plan.tiny and not (met and len(comparison.curves) >= 6):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
