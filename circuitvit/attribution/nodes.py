"""Node scores: a head, an MLP or the input ablated for everything that hears it, also by token group.

    exact   s(u) = metric(x_u replaced by r_u) - metric(base),  one run from the next stage on for each node
    atp     s(u) = sum over tokens of (r_u - x_u) . d metric / d x_u,  2 forwards and 1 backward for all nodes

A node's effect is not the sum of its edges': its readers change together. Exact node effects are activation
patching; they cost a part of a forward each. `atp` is blind to all beyond first order.

Heimersheim and Nanda 2024, "How to use and interpret activation patching", arXiv:2404.15255; Nanda 2023,
"Attribution patching".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.eap import objective
from circuitvit.attribution.local import edge_deltas, on_device
from circuitvit.attribution.scoring import provenance_of, require_gradient
from circuitvit.engine import (
    BatchRun,
    batch_runs,
    choose_batch_size,
    gradients,
    progress_bar,
    run_from,
    stream_gradients,
)
from circuitvit.errors import unknown_name
from circuitvit.graph import Graph, NodeScores
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare

NODE_METHODS = ("exact", "atp")


@running
def attribute_nodes(
    model: Model,
    task: Task | PreparedTask,
    method: str = "exact",
    *,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> NodeScores:
    """Score every head, every MLP and the input of a model for a task; with token groups, each group of it.

    Args:
        model: from `load` or `wrap`.
        task: images, metric and ablation; its token groups tell a node's tokens apart.
        method: "exact" or "atp".
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: for a metric that the method cannot use.
        DataError: if the images cannot be used.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> cv.attribute_nodes(model, task).strongest(3)  # doctest: +SKIP
    """
    if method not in NODE_METHODS:
        raise unknown_name("method", method, NODE_METHODS)
    prepared = prepare(model, task, progress)
    if method == "atp":
        require_gradient(prepared, "atp")
    score: Callable[[BatchRun], NDArray[np.float64]] = _exact if method == "exact" else _first_order
    total = np.zeros((len(prepared.graph.senders), len(prepared.graph.groups)))
    with progress_bar(len(prepared), f"nodes, {method}", progress) as bar:
        for run in batch_runs(prepared, batch_size or choose_batch_size(prepared, memory)):
            total += score(run)
            bar.update(len(run.batch.rows))
    provenance = provenance_of(prepared, f"nodes, {method}")
    return NodeScores(prepared.graph, total / len(prepared), method, prepared.direction, provenance)


@torch.no_grad()
def _exact(run: BatchRun) -> NDArray[np.float64]:
    """The effect of each sender and group, summed over the pairs of a batch."""
    graph, clean = run.prepared.graph, run.metric(run.base.logits)
    effects = []
    for sender, stage in enumerate(graph.sender_stages):
        stream = run.base.stream(stage + 1)
        for group in range(len(graph.groups)):
            change = _change(run, sender, group, stream)
            logits = run_from(run.sources.model, stage + 1, stream + change)
            effects.append((run.metric(logits) - clean).double().sum())
    return _gathered(effects, graph)


def _first_order(run: BatchRun) -> NDArray[np.float64]:
    """The same to first order."""
    graph, metric = run.prepared.graph, objective(run.prepared, run.batch, run.base.logits)
    slopes = stream_gradients(gradients(run.prepared.model, run.base.compacts[0], metric))
    effects = []
    for sender, stage in enumerate(graph.sender_stages):
        for group in range(len(graph.groups)):
            change = _change(run, sender, group, slopes[stage])
            effects.append((change * slopes[stage]).double().sum())
    return _gathered(effects, graph)


def _gathered(effects: Sequence[Tensor], graph: Graph) -> NDArray[np.float64]:
    """The effects `(sender, group)`, fetched from the device at once."""
    return torch.stack(list(effects)).view(len(graph.senders), len(graph.groups)).cpu().numpy()


def _change(
    run: BatchRun, sender: int, group: int, after: Float[Tensor, "batch token d_model"]
) -> Float[Tensor, "batch token d_model"]:
    """Reference minus base output of a sender, at the tokens of a group that are left after its stage."""
    stage = run.prepared.graph.sender_stages[sender]
    return edge_deltas(run, stage + 1, on_device(np.array([[sender, group]]), after), after)[0]
