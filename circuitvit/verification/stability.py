"""Would other images have given another circuit? Discovery on resampled pairs, edge by edge.

Meinshausen and Bühlmann 2010, "Stability selection", JRSS B 72.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from circuitvit.engine import progress_bar
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, Graph
from circuitvit.models import Model
from circuitvit.tasks import Task
from circuitvit.verification.subtask import subtask

Discover = Callable[[Model, Task], Circuit]


@dataclass(frozen=True, eq=False)
class Stability:
    """How often each edge was found.

    Attributes:
        graph: of the circuits.
        frequency: share of resamples whose circuit has the edge, `(sender, receiver, group)`.
        circuits: one for each resample.
        at_least: frequency from which an edge belongs to the consensus.
    """

    graph: Graph
    frequency: Float[NDArray[np.float64], "sender receiver group"]
    circuits: tuple[Circuit, ...]
    at_least: float = 0.5

    @property
    def consensus(self) -> Circuit:
        """The edges found often enough, without dead ones; it carries the frequencies as its scores."""
        return Circuit(self.graph, self.frequency >= self.at_least, self.frequency).pruned()

    @property
    def agreement(self) -> float:
        """Mean Jaccard index of two of the circuits: 1 when all are the same."""
        pairs = [one.jaccard(other) for one, other in combinations(self.circuits, 2)]
        return float(np.mean(pairs)) if pairs else 1.0

    def of(self, circuit: Circuit) -> dict[str, float]:
        """How often each edge of a circuit was found again."""
        return {name: float(self.frequency[self.graph.edge_index(name)]) for name in circuit}

    def __str__(self) -> str:
        sizes = [len(each) for each in self.circuits]
        always = int((self.frequency >= 1).sum())
        return (
            f"{len(self.circuits)} resamples give circuits of {min(sizes)} to {max(sizes)} edges, alike by "
            f"{self.agreement:.2f} (Jaccard); {always} edges are in all of them, {len(self.consensus)} in "
            f"the consensus (at least {self.at_least:.0%})."
        )


def stability(
    model: Model,
    task: Task,
    discover: Discover,
    *,
    n: int = 20,
    at_least: float = 0.5,
    seed: int = 0,
    progress: bool = True,
) -> Stability:
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
    prepared = task.prepare(model)
    if len(prepared) < 2:
        raise DataError("a single pair cannot be resampled: stability is about several")
    rng = np.random.default_rng(seed)
    circuits = []
    with progress_bar(n, "resampled discovery", progress) as bar:
        for _ in range(n):
            rows = rng.integers(len(prepared), size=len(prepared)).tolist()
            circuits.append(discover(model, subtask(prepared, rows)))
            bar.update()
    frequency = np.mean([each.kept for each in circuits], axis=0)
    return Stability(prepared.graph, frequency, tuple(circuits), at_least)
