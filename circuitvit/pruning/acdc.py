"""ACDC: from the output backwards, remove every edge that the behaviour can do without.

Starting with every edge kept, each edge in turn is ablated; it stays ablated when that raises the divergence
from the clean run by less than `tau`. The answer depends on the order, which is total and fixed: receivers
from the last of the graph to the first; for each, its senders from the last to the first; for each, its token
groups from the last to the first.

Three shortcuts change the cost, never the answer. Edges into the stages before the receiver's are all still
kept, so a test restarts at the receiver's own stage from captured streams. Senders that no kept path joins
to the logits are not run. And a receiver that leads nowhere loses all its edges without a run, since ablating
them changes nothing.

Conmy et al. 2023, "Towards automated circuit discovery for mechanistic interpretability", arXiv:2304.14997.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from circuitvit.attribution import provenance_of
from circuitvit.engine import (
    BatchRun,
    choose_batch_size,
    held_runs,
    masked_run,
    new_workspace,
    progress_bar,
)
from circuitvit.errors import DataError, OptionError
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.graph.liveness import live_receivers
from circuitvit.models import Model
from circuitvit.pruning.dead import without_dead
from circuitvit.pruning.divergence import kl
from circuitvit.tasks import PreparedTask, Task, ready

__all__ = ["Divergence", "acdc"]

Divergence = Literal["kl", "metric"]
"""How far a run is from the clean one: KL(clean || current), or the metric's absolute difference."""

NEGLIGIBLE = 1e-6
"""What rounding alone may cause: a divergence in nats, or as a share of the metric."""


def acdc(
    model: Model,
    task: Task | PreparedTask,
    tau: float,
    *,
    divergence: Divergence = "kl",
    batch_size: int | None = None,
    memory: int | None = None,
    progress: bool = True,
) -> Circuit:
    """The circuit that ACDC finds.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        tau: the rise in divergence that removing an edge must cause for the edge to stay, in nats for "kl",
            in units of the metric for "metric".
        divergence: "kl" keeps the whole prediction, "metric" the behaviour.
        batch_size: pairs at once; chosen from the memory budget by default.
        memory: that budget, in bytes.
        progress: whether to show a bar.

    Raises:
        OptionError: if `tau` is not positive, or the task is in the denoising direction.
        DataError: if ablating every edge causes no divergence.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> circuit = cv.acdc(model, task, tau=0.02)  # doctest: +SKIP
    """
    if not tau > 0:
        raise OptionError(f"tau must be positive, not {tau!r}: with 0 no edge would ever go")
    if divergence not in ("kl", "metric"):
        raise OptionError(f"the divergence is 'kl' or 'metric', not {divergence!r}")
    if task.direction == "denoising":
        raise OptionError("ACDC ablates edges of the clean run: give the task direction='noising'")
    prepared = ready(model, task, progress)
    size = choose_batch_size(prepared, memory) if batch_size is None else batch_size
    runs = held_runs(prepared, size)
    judge = _Judge(runs, divergence)
    _refuse_no_effect(prepared, judge)
    kept = _search(prepared, judge, tau, progress)
    provenance = provenance_of(prepared, "acdc").with_parameters(tau=tau, divergence=divergence)
    return Circuit(prepared.graph, without_dead(prepared, kept), provenance=provenance)


def _search(
    prepared: PreparedTask, judge: Callable[[EdgeMask, int], float], tau: float, progress: bool
) -> EdgeMask:
    graph = prepared.graph
    kept = graph.edge_mask.copy()
    current = 0.0
    with progress_bar(graph.n_edges, "acdc", progress) as bar:
        for index in reversed(range(1, len(graph.stages))):
            for receiver in reversed(range(*graph.receiver_slices[index].indices(len(graph.receivers)))):
                bar.set_postfix_str(f"{graph.receivers[receiver]}, {kept.sum():,} edges kept", refresh=False)
                for sender, group in np.argwhere(graph.edge_mask[:, receiver])[::-1]:
                    bar.update()
                    if not live_receivers(graph, kept)[receiver, group]:
                        kept[sender, receiver, group] = False
                        continue
                    kept[sender, receiver, group] = False
                    without = judge(kept, index)
                    if without - current < tau:
                        current = without
                    else:
                        kept[sender, receiver, group] = True
    return kept


class _Judge:
    """The mean divergence from the clean run over all pairs, for masks that ablate from a given stage on."""

    def __init__(self, runs: list[BatchRun], divergence: Divergence) -> None:
        self.divergence = divergence
        self.runs = [(run, run.metric(run.base.logits), new_workspace(run.sources)) for run in runs]
        self.scale = 1.0 if divergence == "kl" else max(float(clean.abs().max()) for _, clean, _ in self.runs)

    def __call__(self, kept: EdgeMask, start: int) -> float:
        total, count = 0.0, 0
        for run, clean, workspace in self.runs:
            logits = masked_run(run.sources, kept, start=start, workspace=workspace)
            distances = (
                kl(run.clean_logits, logits)
                if self.divergence == "kl"
                else (run.metric(logits) - clean).abs()
            )
            total += float(distances.double().sum())
            count += len(distances)
        return total / count


def _refuse_no_effect(prepared: PreparedTask, judge: _Judge) -> None:
    """Refuse a task that ablating every edge does not touch. The run leaves the judge's workspaces alone."""
    distance = judge(np.zeros(prepared.graph.shape, dtype=bool), 1)
    if distance <= NEGLIGIBLE * judge.scale:
        raise DataError(
            f"with every edge ablated the {judge.divergence} divergence from the clean run is "
            f"{distance:.2g}, so there is nothing to explain: choose images that differ more, another metric "
            "or another ablation"
        )
