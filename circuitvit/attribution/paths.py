"""Scores along the straight line between the two input embeddings: EAP-IG and conductance.

Both average gradients along the line from corrupt to clean. EAP-IG multiplies them with the difference of the
sender's two ends, conductance with what the sender itself does from step to step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.eap import finished, new_total, objective
from circuitvit.attribution.scoring import Running, require_gradient
from circuitvit.engine import (
    Capture,
    References,
    add_products,
    capture,
    check_logits,
    differences,
    gradients,
    progress_bar,
    reference_source,
)
from circuitvit.errors import check_whole, unknown_name
from circuitvit.models import Factored, Model
from circuitvit.tasks import Batch, PreparedTask

Rule = Literal["midpoint", "gauss-legendre", "left"]
"""Where the steps of an integral along the path are taken."""


def eap_ig(
    prepared: PreparedTask, how: Running, *, steps: int = 5, rule: Rule = "midpoint"
) -> NDArray[np.float64]:
    """EAP with integrated gradients: `g_v` averaged along the path, `(sender, receiver, group)`.

    Cost: 2 forwards, and a forward and backward for each step. Check: the scores of the edges that leave the
    input sum to metric(corrupt) - metric(clean) as the steps grow. Blind to: much the same as EAP, since only
    the input moves along the path; the senders' differences stay those of the two ends.

    Hanna, Pezzelle and Belinkov 2024, "Have faith in faithfulness", arXiv:2403.17806.

    Args:
        steps: points on the path.
        rule: where the points lie: "midpoint"; "gauss-legendre", the fewest steps for a smooth path; "left",
            the left Riemann sum of older code, only to reproduce published numbers.

    Raises:
        OptionError: if `steps` is not positive, or for a metric without a gradient.
        NameNotFoundError: for an unknown rule.
    """
    require_gradient(prepared, "eap-ig")
    nodes = path_nodes(steps, rule)
    references = reference_source(prepared, how.batch_size)
    total = new_total(prepared)
    with progress_bar(len(prepared) * len(nodes), "eap-ig", how.progress) as bar:
        for batch in prepared.batches(how.batch_size):
            average, deltas = _average(prepared, references, batch, nodes, bar.update)
            add_products(total, prepared.graph, deltas, average, batch.members)
            del average, deltas  # not held during the next batch
    return finished(prepared, total)


def ceap(prepared: PreparedTask, how: Running, *, steps: int = 5) -> NDArray[np.float64]:
    """Conductance: what flows through an edge while the input goes from clean to corrupt.

        s(u->v) = integral of g_v . dx_u along the path
                ~ sum over steps k of g_v(middle of k) . (x_u(end of k) - x_u(start of k))

    By the chain rule the scores of the edges that cross a cut between input and logits sum to
    metric(end) - metric(start), for every cut, and not at the input only.

    Cost: 2 forwards, and 2 forwards and a backward for each step. Blind to: what an edge does off this path,
    such as when it alone is ablated; with another ablation than patch, the path ends at the reference
    *input*, and the references of other senders are not looked at.

    "Demystifying variance in circuit discovery of LLMs" 2026, arXiv:2606.16920 (CEAP); Dhamdhere,
    Sundararajan and Yan 2018, "How important is a neuron?", arXiv:1805.12233 (conductance).

    Args:
        steps: parts of the path.

    Raises:
        OptionError: if `steps` is not positive, or for a metric without a gradient.
    """
    require_gradient(prepared, "ceap")
    check_whole("steps", steps)
    model, graph = prepared.model, prepared.graph
    references = reference_source(prepared, how.batch_size)
    places = np.linspace(0.0, 1.0, steps + 1)
    total = new_total(prepared)
    with progress_bar(len(prepared) * steps, "ceap", how.progress) as bar:
        for batch in prepared.batches(how.batch_size):
            base, clean, corrupt = _path(prepared, references, batch)[:3]
            metric = objective(prepared, batch, base.logits)
            before = base.compacts
            for low, high in pairwise(places.tolist()):
                middle = torch.lerp(clean, corrupt, (low + high) / 2)
                found = gradients(model, base.compacts[0], metric, stream=middle)
                after = _written(model, torch.lerp(clean, corrupt, high))
                moved = differences(model.stages, after, before)
                add_products(total, graph, moved, found.by_stage(), batch.members)
                before = after
                bar.update(len(batch.rows))
    return finished(prepared, total)


def path_nodes(steps: int, rule: Rule) -> list[tuple[float, float]]:
    """Places on the path (0 is the corrupt input, 1 the clean one) and their weights, which sum to 1.

    Args:
        steps: number of nodes.
        rule: "midpoint", "gauss-legendre", or "left": 0, 1/n, ..., (n-1)/n.

    Raises:
        OptionError: if `steps` is not positive.
        NameNotFoundError: for an unknown rule.

    Example:
        >>> path_nodes(2, "midpoint")
        [(0.25, 0.5), (0.75, 0.5)]
    """
    check_whole("steps", steps)
    if rule not in get_args(Rule):
        raise unknown_name("rule", str(rule), get_args(Rule))
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return [
            (float(point + 1) / 2, float(weight) / 2) for point, weight in zip(points, weights, strict=True)
        ]
    shift = 0.5 if rule == "midpoint" else 0.0
    return [((step + shift) / steps, 1.0 / steps) for step in range(steps)]


def _path(
    prepared: PreparedTask, references: References, batch: Batch
) -> tuple[Capture, Tensor, Tensor, list[Factored]]:
    """The base run of a batch, the path's clean and corrupt ends, and the senders' differences."""
    base = capture(prepared.model, batch.base, essential=True)
    check_logits(base.logits, batch)
    deltas = references.deltas(batch, base)
    clean = prepared.model.stages[0].total(base.compacts[0])
    return base, clean, clean + deltas[0].expand().sum(dim=0), deltas


def _average(
    prepared: PreparedTask,
    references: References,
    batch: Batch,
    nodes: Sequence[tuple[float, float]],
    advance: Callable[[int], object],
) -> tuple[list[Factored], list[Factored]]:
    """The weighted sum of the gradients at the nodes of a batch's path, and its senders' differences."""
    base, clean, corrupt, deltas = _path(prepared, references, batch)
    metric = objective(prepared, batch, base.logits)
    average: list[Factored] = []
    for place, weight in nodes:
        stream = torch.lerp(corrupt, clean, place)
        found = gradients(prepared.model, base.compacts[0], metric, stream=stream)
        step = [gradient.times(weight) for gradient in found.by_stage()]
        average = [sum_ + more for sum_, more in zip(average, step, strict=True)] if average else step
        advance(len(batch.rows))
    return average, deltas


@torch.no_grad()
def _written(model: Model, stream: Float[Tensor, "batch token d_model"]) -> tuple[Tensor, ...]:
    """What the senders write, in compact form, when the layers start from this stream; at last the stream."""
    *layers, _ = model.essential[1:]
    compacts = [stream]
    for stage in layers:
        compacts.append(stage.write(stage.read(stream)))
        stream = stage.add(stream, compacts[-1])
    return (*compacts, stream)
