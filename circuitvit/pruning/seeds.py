"""Several searches with different seeds: which edges they agree on, and how far they differ.

A faithful circuit is seldom unique. Edges that every search keeps are those that the behaviour cannot do
without, as far as the searches can tell; the others may be one of several ways to the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations
from typing import Any

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit
from circuitvit.models import Model
from circuitvit.pruning.find import Finding, find
from circuitvit.tasks import Task


@dataclass(frozen=True, eq=False)
class Agreement:
    """What several searches found.

    Attributes:
        findings: one for each seed, in the order of the seeds.
    """

    findings: tuple[Finding, ...]

    @property
    def shared(self) -> Circuit:
        """The edges that every search keeps; they need not make a circuit on their own."""
        return reduce(lambda a, b: a & b, self.circuits)

    @property
    def union(self) -> Circuit:
        """The edges that any search keeps."""
        return reduce(lambda a, b: a | b, self.circuits)

    @property
    def circuits(self) -> tuple[Circuit, ...]:
        """The circuits found, in the order of the seeds."""
        return tuple(finding.circuit for finding in self.findings)

    @property
    def overlap(self) -> float:
        """The mean Jaccard overlap between two of the circuits, 0 to 1."""
        pairs = [a.jaccard(b) for a, b in combinations(self.circuits, 2)]
        return sum(pairs) / len(pairs)

    @property
    def frequency(self) -> dict[str, float]:
        """How often each edge of the union is kept, 0 to 1, most often first and then in graph order."""
        kept = {edge: sum(edge in circuit for circuit in self.circuits) for edge in self.union}
        return {edge: kept[edge] / len(self.findings) for edge in sorted(kept, key=lambda edge: -kept[edge])}

    @property
    def summary(self) -> str:
        """How far the searches agree, in plain sentences."""
        sizes = sorted(len(circuit) for circuit in self.circuits)
        alike = all(circuit == self.circuits[0] for circuit in self.circuits)
        if alike:
            return f"All {len(self.findings)} searches found the same circuit of {sizes[0]} edges."
        return (
            f"{len(self.findings)} searches found circuits of {sizes[0]} to {sizes[-1]} edges that overlap "
            f"by {self.overlap:.0%} on average; {len(self.shared)} edges are in all of them and "
            f"{len(self.union)} in any. The circuit is not unique: trust the shared edges most."
        )


def find_several(model: Model, task: Task, seeds: Sequence[int] = (0, 1, 2), **options: Any) -> Agreement:
    """Search once for each seed; the numbers of steps are measured once, for the first.

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
    options.setdefault("start", "mask")  # trimming the whole model does not depend on the seed
    findings: list[Finding] = []
    for seed in seeds:
        plan = None if plan is None else replace(plan, seed=seed)
        findings.append(find(model, task, seed=seed, plan=plan, **options))
        plan = findings[0].plan
    return Agreement(tuple(findings))
