"""Edge attribution patching: every edge's effect to first order, from 2 forwards and 1 backward.

    s(u->v) = sum over tokens of (r_u - x_u) . g_v

with `g_v` the gradient of the metric at the clean run with respect to what `v` alone reads.

Blind to: saturation (a flat softmax or metric has no gradient), backup heads (OR), anything beyond first
order; on real ViTs the early layers suffer most.

Syed, Rager and Conmy 2023, "Attribution patching outperforms automated circuit discovery", arXiv:2310.10348.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.method import Settings, check_gradient, refuse_flat, require_gradient
from circuitvit.engine import (
    Gradients,
    check_logits,
    clean_logits,
    gradients,
    outputs,
    progress_bar,
    reference_source,
)
from circuitvit.graph import Graph
from circuitvit.models import BackwardRules
from circuitvit.tasks import Batch, PreparedTask

__all__ = ["add_products", "eap", "first_order", "objective"]


def eap(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """EAP scores `(sender, receiver, group)`, summed over pairs."""
    return first_order(prepared, settings, "eap")


def first_order(
    prepared: PreparedTask, settings: Settings, name: str, rules: BackwardRules | None = None
) -> NDArray[np.float64]:
    """Scores to first order at the base run, differentiated by backward rules where there are any.

    Args:
        prepared: the task.
        settings: of the run.
        name: of the method, for messages.
        rules: of the gradient; the plain one by default.
    """
    require_gradient(prepared, name)
    refuse_flat(prepared, name)
    model = prepared.model if rules is None else prepared.model.with_rules(rules)
    source = model.stages[0]
    references = reference_source(prepared, settings.batch_size)
    total = torch.zeros(prepared.graph.shape, dtype=torch.float64)
    with progress_bar(len(prepared), name, settings.progress) as bar:
        for batch in prepared.batches(settings.batch_size):
            with torch.no_grad():
                embedded = source.write(source.read(batch.base))
            found = gradients(model, embedded, objective(prepared, batch))
            check_logits(found.capture.logits, batch)
            deltas = references(batch, found.capture) - outputs(model.stages, found.capture.compacts)
            add_products(total, prepared.graph, deltas, found, batch.members)
            bar.update(len(batch.rows))
    check_gradient(prepared, total)
    return total.numpy()


def objective(
    prepared: PreparedTask, batch: Batch, base_logits: Tensor | None = None
) -> Callable[[Float[Tensor, "batch class"]], Float[Tensor, " batch"]]:
    """The task's metric as a function of logits alone.

    Args:
        prepared: the task.
        batch: the pairs that the logits belong to.
        base_logits: of the base run; None where the logits to come are those of the base run itself.
    """

    def metric(logits: Tensor) -> Tensor:
        clean = clean_logits(prepared, batch, logits if base_logits is None else base_logits)
        return prepared.metric(logits, clean, batch.rows)

    return metric


def add_products(
    total: Tensor,
    graph: Graph,
    deltas: Float[Tensor, "sender batch token d_model"],
    found: Gradients,
    members: Tensor | None,
    weight: float = 1.0,
) -> None:
    """Add `weight * sum over images and tokens of delta_u . g_v` to `total`, in place.

    One matrix product for each stage, between the senders before it and its receivers.
    """
    flat = deltas.flatten(1)
    for index, gradient in found.by_stage():
        upstream, receivers = graph.sender_slices[index].start, graph.receiver_slices[index]
        for group in range(len(graph.groups)):
            seen = gradient
            if members is not None:
                seen = gradient * (members == group).to(gradient.dtype)[..., None]
            products = flat[:upstream] @ seen.flatten(1).t()
            total[:upstream, receivers, group] += weight * products.double().cpu()
    total.masked_fill_(~torch.tensor(graph.edge_mask), 0.0)
