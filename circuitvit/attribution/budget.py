"""What scores may cost: forward-equivalents for each pair, or seconds for the whole task.

A forward-equivalent is the work of one plain forward on one image. Costs are counted from the list of stages,
so that a budget in forward-equivalents buys the same scores on every machine. Seconds are turned into them
with the time that one forward takes here and now; what they buy depends on the machine.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask, Graph
from circuitvit.tasks import PreparedTask

GRADIENT_COST = 10.0
"""Forward-equivalents of two captured runs, a backward pass, and gradients at both ends of all edges."""

TIMED_FORWARDS = 3

LARGEST = 1e13
"""Above any budget that `parse` lets through, in its largest unit."""

_UNITS = {"": None, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Budget:
    """An amount of work.

    Attributes:
        amount: a positive number.
        seconds: whether it is seconds for the whole task; else forward-equivalents for each pair.

    Raises:
        OptionError: if the amount is no positive number.

    Example:
        >>> Budget.parse("2m")
        Budget(amount=120.0, seconds=True)
        >>> Budget.parse(60)
        Budget(amount=60.0, seconds=False)
    """

    amount: float
    seconds: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.amount < LARGEST:
            raise OptionError(f"a budget is a positive number, not {self.amount!r}")

    @classmethod
    def parse(cls, spec: str | float | Budget) -> Budget:
        """A budget from a number of forward-equivalents, or a duration such as "60s" or "2m".

        Raises:
            OptionError: if it is neither, or not positive.
        """
        if isinstance(spec, Budget):
            return spec
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(spec))
        if match is None or match[2] not in _UNITS or not 0 < float(match[1]) < 1e9:
            raise OptionError(
                "a budget is a number of forward-equivalents for each pair, such as 60, or a duration with "
                f"s, m or h, such as '60s', not {spec!r}"
            )
        unit = _UNITS[match[2]]
        return cls(float(match[1]), False) if unit is None else cls(float(match[1]) * unit, True)

    def forwards(self, prepared: PreparedTask, batch_size: int) -> float:
        """The budget in forward-equivalents for each pair; seconds are turned into them by timing a few."""
        if not self.seconds:
            return self.amount
        return self.amount / (len(prepared) * _seconds_per_forward(prepared, batch_size))

    def __str__(self) -> str:
        return f"{self.amount:g} s" if self.seconds else f"{self.amount:g} forward-equivalents a pair"


def exact_costs(graph: Graph) -> Float[np.ndarray, "sender receiver group"]:
    """Forward-equivalents of each edge's exact effect: the share of the stages from its receiver on."""
    last = len(graph.stages) - 1
    remaining = 1.0 - (np.array(graph.receiver_stages) - 1) / last
    return np.where(graph.edge_mask, remaining[None, :, None], 0.0)


def exact_cost(graph: Graph, wanted: EdgeMask | None = None) -> float:
    """Forward-equivalents for each pair of the exact effects of all edges, or of the wanted ones."""
    costs = exact_costs(graph)
    return float(costs.sum() if wanted is None else costs[wanted].sum())


def local_cost(graph: Graph) -> float:
    """Forward-equivalents for each pair of `local`: every sender visits every later stage once."""
    visits: int = sum(senders.start for senders in graph.sender_slices)
    return GRADIENT_COST + visits * len(graph.groups) / (len(graph.stages) - 1)


def _seconds_per_forward(prepared: PreparedTask, batch_size: int) -> float:
    """The time of one image in a batch, the shortest of a few runs after one to warm up."""
    images = prepared.batch(range(min(batch_size, len(prepared)))).base
    times = []
    for _ in range(TIMED_FORWARDS + 1):
        start = time.perf_counter()
        prepared.model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - start)
    return min(times[1:]) / len(images)
