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
    References,
    add_products,
    check_logits,
    clean_logits,
    gradients,
    progress_bar,
    reference_source,
)
from circuitvit.models import BackwardRules, Model
from circuitvit.tasks import Batch, PreparedTask


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
    references = reference_source(prepared, settings.batch_size)
    total = new_total(prepared)
    with progress_bar(len(prepared), name, settings.progress) as bar:
        for batch in prepared.batches(settings.batch_size):
            _add_batch(prepared, model, references, batch, total)
            bar.update(len(batch.rows))
    return finished(prepared, total)


def _add_batch(
    prepared: PreparedTask, model: Model, references: References, batch: Batch, total: Tensor
) -> None:
    """Add the scores of a batch; a function of its own, so that nothing of it is held during the next."""
    source = model.stages[0]
    with torch.no_grad():
        embedded = source.write(source.read(batch.base))
    found = gradients(model, embedded, objective(prepared, batch))
    check_logits(found.capture.logits, batch)
    deltas = references.deltas(batch, found.capture)
    add_products(total, prepared.graph, deltas, found.by_stage(), batch.members)


def new_total(prepared: PreparedTask) -> Tensor:
    """Zeros `(sender, receiver, group)` to add products to, in float64, on the model's device."""
    return torch.zeros(prepared.graph.shape, dtype=torch.float64, device=prepared.model.device)


def finished(prepared: PreparedTask, total: Tensor) -> NDArray[np.float64]:
    """The scores from a total: those of edges.

    Raises:
        DataError: if they are 0 everywhere.
    """
    scores = total.cpu().masked_fill(~torch.tensor(prepared.graph.edge_mask), 0.0)
    check_gradient(prepared, scores)
    return scores.numpy()


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
