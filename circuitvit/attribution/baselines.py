"""Scores to compare with, which know nothing of the behaviour: information flow routes, and noise."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.attribution.eap import new_total
from circuitvit.attribution.scoring import Running
from circuitvit.engine import capture, check_logits, members_at, outputs, progress_bar
from circuitvit.errors import check_whole
from circuitvit.tasks import PreparedTask


@torch.no_grad()
def ifr(prepared: PreparedTask, how: Running) -> NDArray[np.float64]:
    """Information flow routes: how much of what a receiver reads a sender wrote. Not causal.

        s(u->v) = mean over tokens of  p_u / (sum over w of p_w),    p_u = max(0, |X_v|_1 - |X_v - x_u|_1)

    A share between 0 and 1 that looks at the base run alone: neither the metric nor the corrupt image enters,
    so that a large share says what is loud, not what matters. Shares are not in units of the metric and have
    no sign; rank by magnitude. Constants that no sender owns take part in `X_v` and have no share.

    Cost: 1 forward, and one subtraction for each sender and stage. Blind to: whether anything is used, and
    for what.

    Ferrando and Voita 2024, "Information flow routes: automatically interpreting language models at scale",
    arXiv:2403.00824; per edge, as in MIB.
    """
    graph, model = prepared.graph, prepared.model
    total = new_total(prepared)
    with progress_bar(len(prepared), "ifr", how.progress) as bar:
        for batch in prepared.batches(how.batch_size):
            run = capture(model, batch.base)
            check_logits(run.logits, batch)
            written = outputs(model.stages, run.compacts)
            for index, stage in enumerate(model.stages):
                if stage.is_source:
                    continue
                stream, upstream = run.stream(index), graph.upstream[index]
                _, tokens, width = stream.shape
                found = shares(stream, written[upstream, :, :tokens, :width])
                members = members_at(graph, index, batch.members, tokens)
                for group in range(len(graph.groups)):
                    inside = found if members is None else found * (members == group)
                    summed = inside.double().mean(dim=2).sum(dim=1)
                    total[upstream, graph.receiver_slices[index], group] += summed[:, None]
            bar.update(len(batch.rows))
    return np.where(graph.edge_mask, total.cpu().numpy(), 0.0)


def shares(
    stream: Float[Tensor, "batch token d_model"], written: Float[Tensor, "sender batch token d_model"]
) -> Float[Tensor, "sender batch token"]:
    """Each sender's share of each token of a stream; 0 where no sender comes near it."""
    size = stream.abs().sum(dim=-1)
    rest = torch.stack([(stream - each).abs().sum(dim=-1) for each in written])
    near = (size - rest).clamp_min(0.0)
    return near / near.sum(dim=0).clamp_min(torch.finfo(near.dtype).tiny)


def random(prepared: PreparedTask, how: Running, *, seed: int = 0) -> NDArray[np.float64]:
    """Standard normal scores, the same for every number of pairs: what a method must beat.

    Cost: nothing is run. Blind to: everything; that is its use.

    Args:
        seed: of the draw.

    Raises:
        OptionError: if the seed is negative.
    """
    check_whole("a seed", seed, 0)
    drawn = np.random.default_rng(seed).standard_normal(prepared.graph.shape)
    return np.where(prepared.graph.edge_mask, drawn, 0.0) * len(prepared)
