"""EAP with integrated gradients: `g_v` averaged along the straight line from corrupt to clean input.

Cost: 2 forwards, and a forward and backward for each step. Check: the scores of the edges that leave the
input sum to metric(corrupt) - metric(clean) as the steps grow. Blind to: much the same as EAP, since only the
input moves along the path; the senders' differences stay those of the two ends.

Hanna, Pezzelle and Belinkov 2024, "Have faith in faithfulness", arXiv:2403.17806.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.attribution.eap import finished, new_total, objective
from circuitvit.attribution.method import Settings, require_gradient
from circuitvit.engine import (
    References,
    add_products,
    capture,
    check_logits,
    gradients,
    progress_bar,
    reference_source,
)
from circuitvit.models import Factored
from circuitvit.tasks import Batch, PreparedTask

Rule = Literal["midpoint", "gauss-legendre", "left"]


def eap_ig(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """Scores at midpoint nodes, `(sender, receiver, group)`, summed over pairs."""
    return _scores(prepared, settings, "midpoint")


def eap_ig_gauss(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """Scores at Gauss-Legendre nodes: the fewest steps for a smooth path."""
    return _scores(prepared, settings, "gauss-legendre")


def eap_ig_left(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """Scores by the left Riemann sum of the common code: only to reproduce published numbers."""
    return _scores(prepared, settings, "left")


def path_nodes(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """Places on the path (0 is the corrupt input, 1 the clean one) and their weights, which sum to 1.

    Args:
        steps: number of nodes.
        rule: "midpoint", "gauss-legendre", or "left": 0, 1/n, ..., (n-1)/n.

    Example:
        >>> path_nodes(2, "midpoint")
        [(0.25, 0.5), (0.75, 0.5)]
    """
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return [
            (float(point + 1) / 2, float(weight) / 2) for point, weight in zip(points, weights, strict=True)
        ]
    shift = 0.5 if rule == "midpoint" else 0.0
    return [((step + shift) / steps, 1.0 / steps) for step in range(steps)]


def _scores(prepared: PreparedTask, settings: Settings, rule: Rule) -> NDArray[np.float64]:
    require_gradient(prepared, "eap-ig")
    references = reference_source(prepared, settings.batch_size)
    nodes = path_nodes(settings.steps, rule)
    total = new_total(prepared)
    with progress_bar(len(prepared) * len(nodes), "eap-ig", settings.progress) as bar:
        for batch in prepared.batches(settings.batch_size):
            average, deltas = _average(prepared, references, batch, nodes, bar.update)
            add_products(total, prepared.graph, deltas, average, batch.members)
            del average, deltas  # not held during the next batch
    return finished(prepared, total)


def _average(
    prepared: PreparedTask,
    references: References,
    batch: Batch,
    nodes: Sequence[tuple[float, float]],
    advance: Callable[[int], object],
) -> tuple[list[Factored], list[Factored]]:
    """The weighted sum of the gradients at the nodes of a batch's path, and its senders' differences."""
    model = prepared.model
    base = capture(model, batch.base, essential=True)
    check_logits(base.logits, batch)
    deltas = references.deltas(batch, base)
    embedded = base.compacts[0]
    end = model.stages[0].total(embedded)
    start = end + deltas[0].expand().sum(dim=0)
    metric = objective(prepared, batch, base.logits)
    average: list[Factored] = []
    for place, weight in nodes:
        found = gradients(model, embedded, metric, stream=torch.lerp(start, end, place))
        step = [gradient.times(weight) for gradient in found.by_stage()]
        average = [sum_ + more for sum_, more in zip(average, step, strict=True)] if average else step
        advance(len(batch.rows))
    return average, deltas
