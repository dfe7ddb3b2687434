"""How right are the scores? Every estimator against exact effects of all edges. `python -m bench.fidelity`

For each model, single pairs and the average over many: Pearson correlation with the effects, Spearman
correlation of magnitudes, how many of the top 100 edges are right, how many signs, and the cost as CPU time
over that of a plain forward on one pair, in the same process.

The bundled models see drawn pictures, and scikit-learn's digits. The real one, vit_tiny_patch16_224, sees the
cat-dog pair that the estimators were developed on, and *unseen* pairs: photographs of cats and dogs drawn by
a seed, where the model sees a cat in the one and a dog in the other. Its weights and photographs are found as
the tests find them: in the folder that CIRCUITVIT_SHARED names, else in shared/data beside the checkout.

Exact effects take a while, and `--cache DIR` keeps them. The average over pairs is that of their scores, as a
task of all these pairs has it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import circuitvit as cv
from bench._photographs import CATS, DOGS, load_model, shared_data, shared_folder
from circuitvit.attribution import calibration
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.datasets.digits import digits_pairs
from circuitvit.graph.files import write_json
from circuitvit.tasks import PreparedTask
from circuitvit.tasks.images import as_images

TOP = 100

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "eap-ig, gauss-legendre": ("eap-ig", {"rule": "gauss-legendre"}),
    "eap-ig, left": ("eap-ig", {"rule": "left"}),
    "hybrid, 60": ("hybrid", {"budget": 60.0}),
    "hybrid": ("hybrid", {}),
}
"""Rows of the table that are a method with keywords."""

ROWS = (
    *(name for name in cv.METHODS if name not in ("exact", "auto", "hybrid")),
    *VARIANTS,
)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model: its name.
        pair: which pair, or how many were averaged.
        method: the estimator, with its budget where it has one.
        pearson: correlation with the exact effects.
        spearman: of magnitudes.
        top: how many of the top 100 edges (of all, where there are fewer) are right.
        sign: share of the edges whose sign is right.
        cost: forward-equivalents for each pair.
    """

    model: str
    pair: str
    method: str
    pearson: float
    spearman: float
    top: int
    sign: float
    cost: float


# -- models and pairs ----------------------------------------------------------------------------


def toys(n: int) -> Iterator[tuple[cv.Model, list[tuple[str, cv.Task]]]]:
    """The bundled models with `n` pairs each."""
    scenes, digits = catdog_pairs(n), digits_pairs(n)
    drawn = cv.load("catdog-tiny"), (scenes.clean, scenes.corrupt), cv.logit_diff("cat", "dog")
    scanned = cv.load("digits-tiny"), digits, cv.logit_diff(3, 8)
    for model, (clean, corrupt), metric in (drawn, scanned):
        yield model, [(f"{i:02d}", cv.Task(clean[i], corrupt[i], metric)) for i in range(n)]


def real(n: int) -> tuple[cv.Model, list[tuple[str, cv.Task]]]:
    """The real model, the pair of development, and `n` unseen pairs."""
    model, photos = load_model(), shared_data() / "images" / "catdog"
    whole = replace(model.preprocessing, crop_pct=1.0)  # as the pair was first looked at
    metric = cv.logit_diff("tabby", "Border collie")
    first = cv.Task(
        photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", metric, preprocessing=whole
    )
    unseen = [(f"unseen-{i:02d}", task) for i, task in enumerate(cats_and_dogs(model, n))]
    return model, [("catdog", first), *unseen]


def cats_and_dogs(model: cv.Model, n: int, seed: int = 0) -> Iterator[cv.Task]:
    """Pairs of photographs drawn by the seed, of those in which the model sees a cat and a dog."""
    generator = random.Random(seed)
    folder = shared_data() / "images" / "cats_vs_dogs"
    sides = [sorted((folder / kind).iterdir()) for kind in ("cats", "dogs")]
    for side in sides:
        generator.shuffle(side)
    seen = zip(_seen(model, sides[0], CATS), _seen(model, sides[1], DOGS), strict=False)
    for _, (cat, dog) in zip(range(n), seen, strict=False):
        yield cv.Task(cat, dog, cv.logit_diff())


def _seen(model: cv.Model, paths: Sequence[Path], classes: range) -> Iterator[Path]:
    for path in paths:
        if int(model(as_images([path], model.preprocessing).take(0, 1)).argmax()) in classes:
            yield path


# -- measuring -----------------------------------------------------------------------------------


def exact_effects(prepared: PreparedTask, cache: Path | None, name: str) -> np.ndarray:
    """The exact effects of all edges, from the cache where they are in it."""
    path = None if cache is None else cache / f"{prepared.model.name}-{name}.npy"
    if path is not None and path.is_file():
        return np.asarray(np.load(path, allow_pickle=False))
    values = cv.attribute(prepared.model, prepared, "exact").values
    if path is not None:
        np.save(path, values, allow_pickle=False)
    return values


def forward_seconds(prepared: PreparedTask, repeats: int = 15) -> float:
    """CPU seconds of a plain forward on one image, the median of many."""
    image, times = prepared.clean.take(0, 1), []
    for _ in range(repeats):
        start = time.process_time()
        prepared.model(image)
        times.append(time.process_time() - start)
    return float(np.median(times))


def compared(scores: np.ndarray, effects: np.ndarray) -> tuple[float, float, int, float]:
    """Pearson, Spearman of magnitudes, right ones among the top edges, share of right signs."""
    weights, k = np.ones(len(effects)), min(TOP, len(effects))
    given = scores, effects, weights
    return (
        calibration.pearson(*given) or 0.0,
        calibration.spearman(*given) or 0.0,
        round(k * calibration.top_precision(*given, k)),
        calibration.sign_agreement(*given),
    )


def measure(
    model: cv.Model, pairs: list[tuple[str, cv.Task]], rows: Sequence[str], shown: int, cache: Path | None
) -> Iterator[Row]:
    """Rows of the first `shown` pairs, and of the average over all pairs that are not of development."""
    mask = model.graph.edge_mask
    scores: dict[str, list[np.ndarray]] = {row: [] for row in rows}
    costs: dict[str, list[float]] = {row: [] for row in rows}
    truth = []
    for number, (name, task) in enumerate(pairs):
        prepared = task.prepare(model)
        effects, forward = exact_effects(prepared, cache, name)[mask], forward_seconds(prepared)
        if name != "catdog":
            truth.append(effects)
        for row in rows:
            method, own = VARIANTS.get(row, (row, {}))
            start = time.process_time()
            found = cv.attribute(model, prepared, method, progress=False, **own).values[mask]
            cost = (time.process_time() - start) / forward
            if number < shown:
                yield Row(model.name, name, row, *compared(found, effects), cost)
            if name != "catdog":
                scores[row].append(found)
                costs[row].append(cost)
    for row in rows:
        mean = np.mean(scores[row], axis=0), np.mean(truth, axis=0)
        yield Row(model.name, f"mean of {len(truth)}", row, *compared(*mean), float(np.mean(costs[row])))


# -- telling -------------------------------------------------------------------------------------


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table."""
    lines = ["| model | pair | method | Pearson | Spearman | top 100 | sign | cost |", "| --- " * 8 + "|"]
    for row in rows:
        figures = f"{row.pearson:.2f} | {row.spearman:.2f} | {row.top} | {row.sign:.2f} | {row.cost:.0f}"
        lines.append(f"| {row.model} | {row.pair} | `{row.method}` | {figures} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the table, and write it as Markdown and JSON where a folder is given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=32, help="unseen pairs of each model (default 32)")
    parser.add_argument("--shown", type=int, default=4, help="pairs with rows of their own (default 4)")
    parser.add_argument("--methods", nargs="+", default=ROWS, choices=ROWS, metavar="METHOD")
    parser.add_argument("--cache", type=Path, help="folder to keep exact effects in")
    parser.add_argument("--out", type=Path, help="folder for fidelity.md and fidelity.json")
    parser.add_argument("--models", choices=("all", "bundled", "real"), default="all")
    options = parser.parse_args()
    sets = [] if options.models == "real" else list(toys(options.pairs))
    if options.models != "bundled" and shared_folder().is_dir():
        sets.append(real(options.pairs))
    rows = []
    for model, pairs in sets:
        for row in measure(model, pairs, options.methods, options.shown, options.cache):
            rows.append(row)
            print(markdown([row]).splitlines()[-1], flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "fidelity.md").write_text(markdown(rows), encoding="utf-8")
        write_json(options.out / "fidelity.json", {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
