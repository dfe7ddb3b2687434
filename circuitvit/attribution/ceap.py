"""Conductance: what flows through an edge while the input goes from clean to corrupt. Complete on every cut.

    s(u->v) = integral of g_v . dx_u along the path
            ~ sum over steps k of g_v(middle of k) . (x_u(end of k) - x_u(start of k))

The path is that of EAP-IG, the straight line between the two input embeddings, but the sender's own change
along it takes the place of the difference of its two ends. By the chain rule the scores of the edges that
cross a cut between input and logits sum to metric(end) - metric(start), for every cut, and not at the input
only.

Cost: 2 forwards, and 2 forwards and a backward for each step. Blind to: what an edge does off this path, such
as when it alone is ablated; with another ablation than patch, the path ends at the reference *input*, and the
references of other senders are not looked at.

"Demystifying variance in circuit discovery of LLMs" 2026, arXiv:2606.16920 (CEAP); Dhamdhere, Sundararajan
and Yan 2018, "How important is a neuron?", arXiv:1805.12233 (conductance).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.eap import finished, new_total, objective
from circuitvit.attribution.method import Settings, require_gradient
from circuitvit.engine import (
    add_products,
    capture,
    check_logits,
    differences,
    gradients,
    progress_bar,
    reference_source,
)
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask


def ceap(prepared: PreparedTask, settings: Settings) -> NDArray[np.float64]:
    """Conductances `(sender, receiver, group)`, summed over pairs."""
    require_gradient(prepared, "ceap")
    model, graph = prepared.model, prepared.graph
    references = reference_source(prepared, settings.batch_size)
    places = np.linspace(0.0, 1.0, settings.steps + 1)
    total = new_total(prepared)
    with progress_bar(len(prepared) * settings.steps, "ceap", settings.progress) as bar:
        for batch in prepared.batches(settings.batch_size):
            base = capture(model, batch.base, essential=True)
            check_logits(base.logits, batch)
            start = model.stages[0].total(base.compacts[0])
            end = start + references.deltas(batch, base)[0].expand().sum(dim=0)
            metric = objective(prepared, batch, base.logits)
            before = base.compacts
            for low, high in pairwise(places.tolist()):
                middle = torch.lerp(start, end, (low + high) / 2)
                found = gradients(model, base.compacts[0], metric, stream=middle)
                after = _written(model, torch.lerp(start, end, high))
                steps = differences(model.stages, after, before)
                add_products(total, graph, steps, found.by_stage(), batch.members)
                before = after
                bar.update(len(batch.rows))
    return finished(prepared, total)


@torch.no_grad()
def _written(model: Model, stream: Float[Tensor, "batch token d_model"]) -> tuple[Tensor, ...]:
    """What the senders write, in compact form, when the layers start from this stream; at last the stream."""
    *layers, _ = model.essential[1:]
    compacts = [stream]
    for stage in layers:
        compacts.append(stage.write(stage.read(stream)))
        stream = stage.add(stream, compacts[-1])
    return (*compacts, stream)
