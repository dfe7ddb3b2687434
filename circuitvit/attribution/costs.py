"""What methods cost, counted from the list of stages, and how long that takes here and now.

A forward-equivalent is the work of one plain forward on one image.
"""

from __future__ import annotations

import time

import numpy as np
import torch
from jaxtyping import Float

from circuitvit.engine import announce
from circuitvit.graph import EdgeMask, Graph
from circuitvit.tasks import PreparedTask

GRADIENT_COST = 10.0
"""Forward-equivalents of two captured runs, a backward pass, and gradients at both ends of all edges."""

TIMED_FORWARDS = 3

WORTH_SAYING = 60.0
"""Seconds from which on it is said beforehand how long work will take."""


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
    firsts = [receivers.start for receivers in graph.receiver_slices if receivers.stop > receivers.start]
    return GRADIENT_COST + int(graph.edge_mask[:, firsts].sum()) / (len(graph.stages) - 1)


def seconds_per_forward(prepared: PreparedTask, batch_size: int, runs: int = TIMED_FORWARDS) -> float:
    """The time of one image in a batch, the shortest of a few runs after one to warm up."""
    images = prepared.batch(range(min(batch_size, len(prepared)))).base
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        prepared.model(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        times.append(time.perf_counter() - start)
    return min(times[1:]) / len(images)


def tell_time(
    prepared: PreparedTask, what: str, forwards: float, batch_size: int, show: bool, most: bool = False
) -> None:
    """Say how long work will take before it begins, where that is a minute or more.

    Args:
        prepared: the task.
        what: is begun.
        forwards: forward-equivalents for each pair.
        batch_size: pairs at once.
        show: whether anybody wants to know; else nothing is timed.
        most: whether it may take less.
    """
    if not show:
        return
    each = seconds_per_forward(prepared, batch_size, runs=1)
    needed = each * forwards * len(prepared)
    if needed >= WORTH_SAYING:
        about = "at most about" if most else "about"
        announce(
            f"{what}: {about} {spoken(needed)} at the speed of now: {forwards:,.0f} forwards a pair, "
            f"{spoken(each)} each",
            show,
        )


def spoken(seconds: float) -> str:
    """A duration as people say it.

    Example:
        >>> spoken(0.0123), spoken(95.0), spoken(600.0), spoken(9e4)
        ('12 ms', '95 s', '10 minutes', '25 hours')
    """
    for limit, unit, name in ((1.0, 1e-3, "ms"), (120.0, 1.0, "s"), (7200.0, 60.0, "minutes")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}" if seconds >= 10 * unit else f"{seconds / unit:.2g} {name}"
    return f"{seconds / 3600:,.0f} hours"
