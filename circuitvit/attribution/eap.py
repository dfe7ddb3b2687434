"""First-order scores: a gradient times the sender's difference, for all edges at once. EAP, RelP and GIM.

    s(u->v) = sum over tokens of (r_u - x_u) . g_v

with `g_v` the gradient of the metric at the clean run with respect to what `v` alone reads. RelP and GIM take
another derivative of the same numbers: the model is wrapped by backward rules, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.scoring import Running, check_gradient, require_slope
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

RELP = BackwardRules(frozen_norms=True, identity_activation=True, gate_share=0.5)
GIM = BackwardRules(
    frozen_norms=True, softmax_temperature=2.0, query_key_share=0.25, value_share=0.5, gate_share=0.5
)


def eap(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Edge attribution patching: every edge's effect to first order, `(sender, receiver, group)`.

    Cost: 2 forwards and 1 backward. Blind to: saturation (a flat softmax or metric has no gradient), backup
    heads (OR), anything beyond first order; on real ViTs the early layers suffer most.

    Syed, Rager and Conmy 2023, "Attribution patching outperforms automated circuit discovery",
    arXiv:2310.10348.
    """
    return _first_order(prepared, how, "eap")


def relp(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Relevance patching: EAP with coefficients of layer-wise relevance propagation instead of gradients.

    The scale of every norm is a constant (LN-rule), an activation is a multiplication by the constant
    `act(x) / x` (identity rule), and each factor of a gated MLP gets half (half rule). Attention keeps its
    gradient, so that queries and keys are scored too.

    Cost: 2 forwards and 1 backward. Blind to: what EAP is blind to in attention and beyond first order; and
    what a norm takes away again when its input grows.

    Jafari, Eberle, Khakzar and Nanda 2025, "RelP: Faithful and efficient circuit discovery via relevance
    patching", arXiv:2508.21258.
    """
    return _first_order(prepared, how, "relp", RELP)


def gim(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Gradient interaction modifications: EAP with gradients that attention cannot repair away.

    The scale of every norm is a constant, the softmax has the Jacobian that it has at temperature 2, and
    products share their gradient among their factors: values get half of it, queries and keys a quarter, and
    each factor of a gated MLP half.

    Cost: 2 forwards and 1 backward, attention without its fused kernel. Blind to: what EAP is blind to in
    MLPs and beyond first order; the sizes of scores are not those of effects, as shares are given away.

    Edin et al. 2025, "GIM: Improved interpretability for large language models", arXiv:2505.17630.
    """
    return _first_order(prepared, how, "gim", GIM)


def _first_order(
    prepared: PreparedTask, how: Running, name: str, rules: BackwardRules | None = None
) -> NDArray[np.float64]:
    """Scores at the base run, differentiated by backward rules where there are any."""
    require_slope(prepared, name)
    model = prepared.model if rules is None else prepared.model.with_rules(rules)
    references = reference_source(prepared, how.batch_size)
    total = new_total(prepared)
    with progress_bar(len(prepared), name, how.progress) as bar:
        for batch in prepared.batches(how.batch_size):
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


# -- what all gradient methods share -------------------------------------------------------------


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
