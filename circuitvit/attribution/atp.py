"""Attribution patching with AtP*'s two repairs: exact attention patterns, and gradients that cannot cancel.

`atp-qk` is EAP in which an edge into a query or key recomputes the softmax:

    s(u->v) = sum over tokens of ( head(q + dq, k, v) - head(q, k, v) ) . d metric / d head
    dq = J (r_u - x_u)

so that saturated attention is seen. `J` is the gradient of norm and projection: only the softmax is exact
(`local` recomputes the norm, values and MLPs as well).

`atp-star` adds GradDrop: for each layer, the score when no gradient flows through that layer, so that a
direct effect and one of opposite sign through the layer cannot hide each other:

    |s(u->v)| = mean over the layers other than v's of | s(u->v) without the layer |

The size is AtP*'s, taken of the mean over pairs; the sign, which it does not have, is that of `atp-qk`.

Cost: 2 forwards, 1 backward and for each sender all later attention layers; for `atp-star`, that again for
each layer. Blind to: what MLPs and norms do beyond first order; everything after the receiver beyond it, too.

Kramár, Lieberum, Shah and Nanda 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to
components", arXiv:2403.00745.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.eap import new_total, objective
from circuitvit.attribution.local import candidate_streams
from circuitvit.attribution.scoring import Running, check_effects, require_slope
from circuitvit.engine import (
    BatchRun,
    Gradients,
    add_products,
    batch_runs,
    gradients,
    output_gradients,
    progress_bar,
)
from circuitvit.graph import port_of
from circuitvit.models import BackwardRules, Model, Reads
from circuitvit.tasks import PreparedTask


def atp_qk(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Scores with exact attention patterns `(sender, receiver, group)`, summed over pairs."""
    scores: NDArray[np.float64] = _scores(prepared, how, "atp-qk", ())[0]
    return scores


def atp_star(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """The same with GradDrop, summed over pairs."""
    layers = sorted({stage.nodes.layer for stage in prepared.model.layers})
    plain, *others = _scores(prepared, how, "atp-star", layers)
    own = np.array([prepared.graph.stages[stage].layer for stage in prepared.graph.receiver_stages])
    counts = np.array([[layer != receiver for receiver in own] for layer in layers])  # (layer, receiver)
    heard = counts.sum(axis=0)
    sizes = np.einsum("lr,lsrg->srg", counts, np.abs(others)) / np.maximum(1, heard)[None, :, None]
    scores: NDArray[np.float64] = np.where(heard[None, :, None] > 0, np.copysign(sizes, plain), plain)
    return scores


def _scores(prepared: PreparedTask, how: Running, name: str, dropped: Sequence[int]) -> NDArray[np.float64]:
    """Scores `(gradient, sender, receiver, group)`: the plain gradient's first, then without each layer."""
    require_slope(prepared, name)
    models = [prepared.model, *(_without(prepared.model, layer) for layer in dropped)]
    totals = torch.stack([new_total(prepared) for _ in models])
    with progress_bar(len(prepared), name, how.progress) as bar:
        for run in batch_runs(prepared, how.batch_size):
            if not run.sources.differs:
                continue
            metric = objective(prepared, run.batch, run.base.logits)
            found = [gradients(model, run.base.compacts[0], metric) for model in models]
            totals += _first_order(run, found)
            slopes = [output_gradients(each) for each in found]
            for index, stage in enumerate(prepared.model.stages):
                if any(map(port_of, stage.nodes.receivers)):
                    at_outputs = [d_compacts[index] for d_compacts in slopes]
                    _exact_patterns(totals, run, found, at_outputs, index)
            bar.update(len(run.batch.rows))
    scores = np.where(prepared.graph.edge_mask, totals.cpu().numpy(), 0.0)
    check_effects(prepared, scores)
    return scores


def _first_order(run: BatchRun, found: Sequence[Gradients]) -> Tensor:
    """EAP scores of every edge whose receiver is not attention, by gradient."""
    graph = run.prepared.graph
    deltas, totals = run.sources.factored_deltas, []
    for each in found:
        total = new_total(run.prepared)
        add_products(total, graph, deltas, each.by_stage(), run.batch.members)
        totals.append(total)
    of_heads = torch.tensor([bool(port_of(receiver)) for receiver in graph.receivers])
    return torch.stack(totals).masked_fill_(of_heads.to(total.device, non_blocking=True)[:, None], 0.0)


@torch.no_grad()
def _exact_patterns(
    totals: Tensor,
    run: BatchRun,
    found: Sequence[Gradients],
    d_compacts: Sequence[Tensor],
    index: int,
) -> None:
    """Add the scores of the edges into an attention layer, for each gradient.

    Args:
        totals: `(gradient, sender, receiver, group)`; added to in place.
        run: the batch.
        found: the gradients at the reads.
        d_compacts: those at the layer's output.
        index: number of the layer's stage.
    """
    stage, graph = run.prepared.model.essential[index], run.prepared.graph
    stream = found[0].capture.stream(index)
    receivers, reads = graph.receiver_slices[index], found[0].reads[index]
    of_heads = torch.tensor([[bool(port_of(receiver))] for receiver in stage.nodes.receivers])
    of_heads = of_heads.to(stream.device, non_blocking=True)
    for places, streams in candidate_streams(run, index, stream):
        shared = stream.expand_as(streams).flatten(0, 1).clone()
        moved: Reads = torch.func.jvp(stage.read, (shared,), ((streams - stream).flatten(0, 1),))[1]
        others = tuple(
            read + change.view(len(places), *read.shape) for read, change in zip(reads, moved, strict=True)
        )
        for total, each, d_compact in zip(totals, found, d_compacts, strict=True):
            effects = stage.answers(reads, others, each.d_reads[index], d_compact)
            summed = effects.double().sum(dim=-1) * of_heads
            total[places[:, 0], receivers, places[:, 1]] += summed.T


def _without(model: Model, layer: int) -> Model:
    """The model with the same outputs, through one of whose layers no gradient flows."""
    silent = BackwardRules(output_share=0.0)
    inner = [stage.with_rules(silent) if stage.nodes.layer == layer else stage for stage in model.layers]
    return replace(model, stages=(model.stages[0], *inner, model.stages[-1]))
