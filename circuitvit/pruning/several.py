"""Several searches: what circuits that were found with other seeds, or on other pairs, have in common.

A faithful circuit is seldom unique. `find_several` searches with several seeds: edges that every search keeps
are those that the behaviour cannot do without, as far as the searches can tell; the others may be one of
several ways to the same end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np

from circuitvit.errors import OptionError, counted
from circuitvit.graph import Circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.pruning.find import Finding, find
from circuitvit.tasks import Task


@dataclass(frozen=True, eq=False, repr=False)
class Agreement(Result):
    """Several circuits of one graph, found with other seeds or on other pairs: what they have in common.

    Attributes:
        circuits: at least one.
        findings: of the searches that gave them, where `find_several` made them.
        at_least: the share of circuits from which on an edge belongs to the consensus.
    """

    circuits: tuple[Circuit, ...]
    findings: tuple[Finding, ...] = ()
    at_least: float = 0.5

    def records(self) -> Iterator[Record]:
        """One row for each edge that any circuit has, most often first: `edge`, its `frequency` (0 to 1),
        and whether it is in the `consensus`."""
        consensus = self.consensus
        for edge, frequency in self.frequency.items():
            yield {"edge": edge, "frequency": frequency, "consensus": edge in consensus}

    @property
    def shared(self) -> Circuit:
        """The edges that every circuit has; they need not make a circuit on their own."""
        return reduce(lambda a, b: a & b, self.circuits)

    @property
    def union(self) -> Circuit:
        """The edges that any circuit has."""
        return reduce(lambda a, b: a | b, self.circuits)

    @property
    def consensus(self) -> Circuit:
        """The edges of circuits enough, without dead ones; it carries their frequencies as its scores."""
        often = np.mean([each.kept for each in self.circuits], axis=0)
        return Circuit(self.circuits[0].graph, often >= self.at_least, often).pruned()

    @property
    def overlap(self) -> float:
        """The mean Jaccard overlap between two of the circuits, 0 to 1."""
        pairs = [a.jaccard(b) for a, b in combinations(self.circuits, 2)]
        return sum(pairs) / len(pairs) if pairs else 1.0

    @property
    def frequency(self) -> dict[str, float]:
        """How often each edge of the union is kept, 0 to 1, most often first and then in graph order."""
        kept = self.of(self.union)
        return dict(sorted(kept.items(), key=lambda edge: -edge[1]))

    def of(self, circuit: Circuit) -> dict[str, float]:
        """How often each edge of a circuit is kept, 0 to 1, in graph order."""
        return {edge: sum(edge in each for each in self.circuits) / len(self.circuits) for edge in circuit}

    @property
    def summary(self) -> str:
        """How far the circuits agree, in plain sentences."""
        n, sizes = len(self.circuits), sorted(len(circuit) for circuit in self.circuits)
        if all(circuit == self.circuits[0] for circuit in self.circuits):
            return f"All {n} searches found the same circuit of {sizes[0]} edges."
        span = f"{sizes[0]} edges" if sizes[0] == sizes[-1] else f"{sizes[0]} to {sizes[-1]} edges"
        return (
            f"{n} searches found circuits of {span} that overlap by "
            f"{self.overlap:.0%} on average; {len(self.shared)} edges are in all of them, "
            f"{len(self.consensus)} in the consensus (at least {self.at_least:.0%}) and {len(self.union)} in "
            "any. The circuit is not unique: trust the shared edges most."
        )

    def __str__(self) -> str:
        return self.summary

    def __repr__(self) -> str:
        sizes = f"{len(self.shared)} edges in all, {len(self.consensus)} in the consensus"
        return f"Agreement({counted(len(self.circuits), 'circuit')}, overlap {self.overlap:.2f}: {sizes})"

    def _check(self) -> None:
        if not self.circuits:
            raise OptionError("agreement needs at least one circuit")
        for each in self.circuits:
            self.circuits[0].graph.check_same(each.graph, "another of the circuits")


def find_several(model: Model, task: Task, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Agreement:
    """Search once for each seed, each as far as the first one came.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        seeds: at least two different ones.
        **options: as for `find`; `within` is the time for one search.

    Raises:
        OptionError: if there are fewer than two different seeds.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> print(cv.find_several(model, task, within="60s").summary)  # doctest: +SKIP
    """
    if len(set(seeds)) < 2 or len(set(seeds)) < len(seeds):
        raise OptionError(f"agreement needs at least two different seeds, not {list(seeds)}")
    plan = options.pop("plan", None)
    options.setdefault("start", "thin")  # trimming the whole model does not depend on the seed
    findings: list[Finding] = []
    for seed in seeds:
        plan = None if plan is None else replace(plan, seed=seed)
        findings.append(find(model, task, seed=seed, plan=plan, **options))
        plan = findings[0].plan
    return Agreement(tuple(each.circuit for each in findings), tuple(findings))
