"""How good are the scoring methods and searches? All of them on one task, next to the exact effects.

    python examples/compare_methods.py

A score can be judged in two ways that need not agree: is it close to the exact effect of ablating its edge,
and do the best edges by that score make a faithful circuit? Searches are judged by their circuit alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import numpy as np

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs

EDGES = 60


@dataclass(frozen=True)
class Row:
    """A method: its circuit on held-out pairs, and for scoring methods the likeness to exact effects."""

    method: str
    seconds: float
    edges: int
    faithfulness: float
    correlation: float | None = None
    shared: int | None = None


def main(pairs: int = 16) -> list[Row]:
    """Run every method on as many pairs, print a table and give its rows."""
    model = cv.load("catdog-tiny")
    metric = cv.logit_diff("cat", "dog")
    task = cv.Task(*catdog_pairs(pairs, seed=1), metric=metric)
    held_out = cv.Task(*catdog_pairs(64, seed=2), metric=metric)

    def faithfulness(circuit: cv.Circuit) -> float:
        return cv.verify(model, held_out, circuit, n_random=0, progress=False).task.faithfulness.value

    exact = cv.attribute(model, task, "exact", progress=False)
    rows = []
    for name in cv.METHODS:
        start = perf_counter()
        scores = cv.attribute(model, task, name, progress=False)
        seconds = perf_counter() - start
        circuit = scores.connected(EDGES)
        alike = likeness(scores, exact), best(scores, exact)
        rows.append(Row(name, seconds, len(circuit), faithfulness(circuit), *alike))

    settings = cv.MaskSettings(steps=120, batch_size=8)
    plan = cv.Plan(steps=25, trim_runs=300, batch_size=8)
    searches: dict[str, Callable[[], cv.Circuit]] = {
        "acdc": lambda: cv.acdc(model, task, tau=0.05, progress=False),
        "learned mask": lambda: cv.learn_mask(model, task, EDGES, settings, progress=False).circuit,
        "find": lambda: cv.find(model, task, plan=plan, progress=False).circuit,
    }
    for name, search in searches.items():
        start = perf_counter()
        circuit = search()
        rows.append(Row(name, perf_counter() - start, len(circuit), faithfulness(circuit)))

    show(rows)
    return rows


def likeness(scores: cv.EdgeScores, exact: cv.EdgeScores) -> float:
    """Pearson correlation with the exact effects, over all edges."""
    edges = scores.graph.edge_mask
    return float(np.corrcoef(scores.values[edges], exact.values[edges])[0, 1])


def best(scores: cv.EdgeScores, exact: cv.EdgeScores) -> int:
    """How many of the strongest edges are among the strongest by exact effect."""
    strongest = {name for name, _ in exact.strongest(EDGES)}
    return sum(name in strongest for name, _ in scores.strongest(EDGES))


def show(rows: list[Row]) -> None:
    """Print the table."""
    titles = f"{'seconds':>9}{'edges':>7}{'faithfulness':>14}{'like exact':>12}{f'in top {EDGES}':>11}"
    print(f"{'method':14}{titles}")
    for row in rows:
        like = "" if row.correlation is None else f"{row.correlation:.2f}"
        shared = "" if row.shared is None else str(row.shared)
        print(f"{row.method:14}{row.seconds:9.2f}{row.edges:7}{row.faithfulness:14.2f}{like:>12}{shared:>11}")


if __name__ == "__main__":
    main()
