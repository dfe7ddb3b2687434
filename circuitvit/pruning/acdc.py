"""ACDC: from the output backwards, remove every edge that the behaviour can do without.

Starting with every edge kept, each edge in turn is ablated; it stays ablated when that raises the divergence
from the clean run by less than `tau`. The answer depends on the order, which is total and fixed: receivers
from the last of the graph to the first; for each, its senders from the last to the first; for each, its token
groups from the last to the first.

Shortcuts change the cost, never the answer. Edges into the stages before the receiver's are all still kept,
so a test restarts at the receiver's own stage; of what comes after, only what hears the receiver on kept
paths is run (`engine/replay.py`). A receiver that leads nowhere loses all its edges without a run, since
ablating them changes nothing. The next decisions are predicted and run together. Where rounding could decide,
both states are run plainly.

Conmy et al. 2023, "Towards automated circuit discovery for mechanistic interpretability", arXiv:2304.14997.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.attribution.costs import exact_cost, tell_time
from circuitvit.attribution.scoring import provenance_of
from circuitvit.engine import (
    Evaluator,
    Replay,
    Saved,
    StateFile,
    agreed,
    new_workspace,
    own_part,
    place_in_group,
    progress_bar,
    summed,
)
from circuitvit.errors import DataError, OptionError, check_number
from circuitvit.graph import Circuit, EdgeMask
from circuitvit.graph.liveness import live_receivers
from circuitvit.models import Model
from circuitvit.pruning.refine import require_noising, without_dead
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.tasks.metrics import divergence as kl

Divergence = Literal["kl", "metric"]
"""How far a run is from the clean one: KL(clean || current), or the metric's absolute difference."""

CLOSE = 1e-4
"""How near to `tau`, as a share of what is measured, rounding could decide."""

CPU_IMAGES, GPU_IMAGES = 6, 64
"""Predicted states times pairs that run at once."""

WORTH = 6
"""States that are run together even after a wrong prediction: fewer would take nearly as long."""

NEGLIGIBLE = 1e-6
"""What rounding alone may cause: a divergence in nats, or as a share of the metric."""


@running
def acdc(
    model: Model,
    task: Task | PreparedTask,
    tau: float,
    *,
    divergence: Divergence = "kl",
    state: str | Path | None = None,
    processes: bool = False,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> Circuit:
    """The circuit that ACDC finds.

    Args:
        model: from `load` or `wrap`.
        task: in the noising direction.
        tau: the rise in divergence that removing an edge must cause for the edge to stay, in nats for "kl",
            in units of the metric for "metric".
        divergence: "kl" keeps the whole prediction, "metric" the behaviour; where the model has no classes,
            only "metric" means anything.
        state: a file in which the search keeps what it has done: given again after an interruption, with
            the same model, task and settings, it goes on where it was. Deleted at the end.
        processes: share the pairs, or of few pairs the tests, among the processes of `torch.distributed`,
            which must all make this call.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        OptionError: if `tau` is not positive, the task is in the denoising direction, or "kl" is asked for
            where the model has no classes.
        DataError: if ablating every edge causes no divergence.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> circuit = cv.acdc(model, task, tau=0.02)  # doctest: +SKIP
    """
    check_number("tau", tau)  # with 0 no edge would ever go
    if divergence not in ("kl", "metric"):
        raise OptionError(f"the divergence is 'kl' or 'metric', not {divergence!r}")
    require_noising(task)
    if divergence == "kl" and not model.chooses:
        raise OptionError(
            f"the outputs of {model.name} are no classes, so there is no KL of predictions: give "
            "divergence='metric', and tau in units of the metric"
        )
    prepared = prepare(model, task, progress, processes)
    size = Evaluator(prepared, batch_size=batch_size, memory=memory).batch_size
    work = f"acdc, tau {tau!r}, {divergence}, batch size {batch_size}"
    with StateFile(state, prepared, work, settings={"size": size}) as kept_in:
        evaluator = Evaluator(prepared, batch_size=int(kept_in.settings["size"]), memory=memory)
        judge = _Judge(evaluator, divergence)
        _refuse_no_effect(prepared, judge)
        tell_time(
            prepared, "acdc", exact_cost(prepared.graph), evaluator.batch_size, progress, most=True
        )  # shortcuts and small circuits make it less
        kept = _search(prepared, judge, tau, kept_in, progress)
    provenance = provenance_of(prepared, "acdc").with_parameters(tau=tau, divergence=divergence)
    return Circuit(prepared.graph, without_dead(prepared, kept), provenance=provenance)


def _search(prepared: PreparedTask, judge: _Judge, tau: float, state: StateFile, progress: bool) -> EdgeMask:
    graph = prepared.graph
    kept, current, left = graph.edge_mask.copy(), 0.0, len(graph.receivers)
    if state.saved is not None:
        kept = state.saved.tensors["kept"].numpy().astype(bool)
        current, left = float(state.saved.numbers["current"]), int(state.saved.numbers["left"])
        judge.take_up(kept)
    prices = len(graph.stages) - np.array(graph.receiver_stages)  # stages that run: an honest bar
    work = graph.edge_mask.sum(axis=(0, 2)) * prices
    with progress_bar(int(work.sum()), "acdc", progress, unit="stage") as bar:
        bar.update(int(work[left:].sum()))
        for receiver in reversed(range(left)):
            state.keep(partial(_state, kept.copy(), current, receiver + 1))
            bar.set_postfix_str(f"{graph.receivers[receiver]}, {kept.sum():,} edges kept", refresh=False)
            live = live_receivers(graph, kept)[receiver]
            kept[:, receiver, ~live] = False
            if live.any():
                current = _Visit(judge, kept, receiver, tau, current).decide()
            bar.update(int(work[receiver]))
    return kept


def _state(kept: EdgeMask, current: float, left: int) -> Saved:
    """Before the last of the receivers that are `left`."""
    return Saved({"kept": torch.from_numpy(kept.astype(np.uint8))}, {"current": current, "left": left})


class _Visit:
    """The tests of all edges into one receiver, on a mask that is changed in place.

    A test needs the outcome of the one before. The next few outcomes are predicted, the states that follow
    are run together, and results are accepted up to the first wrong prediction: the answer is that of one
    test after the other.
    """

    def __init__(self, judge: _Judge, kept: EdgeMask, receiver: int, tau: float, current: float) -> None:
        self.judge, self.kept, self.receiver = judge, kept, receiver
        self.tau, self.current = tau, current
        self.replays = judge.replays(kept, receiver)
        self.pace = judge.at_once
        self.goes: dict[tuple[int, int], bool] = {}  # predictions from runs that started from a wrong one

    def decide(self) -> float:
        """Test every edge, and give the divergence of the mask that is left."""
        left = [(int(sender), int(group)) for sender, group in np.argwhere(self.kept[:, self.receiver])[::-1]]
        while left:
            ahead = left[: self.pace]
            states = self._states(ahead)
            done, accepted = self._accept(ahead, self.judge.divergences(self.replays, states))
            if accepted is not None:
                self.judge.commit(self.replays, states, accepted)
            left = left[done:]
            most = self.judge.at_once
            right = done == len(ahead)
            self.pace = min(2 * self.pace, most) if right else max(self.pace // 4, min(most, WORTH))
        return self.current

    def _states(self, ahead: list[tuple[int, int]]) -> EdgeMask:
        """Edges into the receiver `(sender, candidate, group)`: each of `ahead` removed in turn, and what is
        predicted to go before it."""
        column = self.kept[:, self.receiver].copy()
        states = []
        for edge in ahead:
            column[edge] = False
            states.append(column.copy())
            column[edge] = not self.goes.get(edge, True)
        return np.stack(states, axis=1)

    def _accept(self, ahead: list[tuple[int, int]], found: list[float]) -> tuple[int, int | None]:
        """The number of tests that hold, and the place of the last of them whose edge went."""
        before, accepted = self.current, None
        for place, (edge, without) in enumerate(zip(ahead, found, strict=True)):
            goes = self._goes(edge, without)
            if goes:
                self.kept[edge[0], self.receiver, edge[1]] = False
                self.current, accepted = without, place
            if goes != self.goes.get(edge, True):
                before = self.current if goes else without
                for later, value in zip(ahead[place + 1 :], found[place + 1 :], strict=True):
                    self.goes[later] = value - before < self.tau
                    before = value if self.goes[later] else before
                return place + 1, accepted
        return len(ahead), accepted

    def _goes(self, edge: tuple[int, int], without: float) -> bool:
        """Whether the edge is removed. Near `tau` rounding could decide, so both states are run plainly."""
        rise = without - self.current
        if abs(rise - self.tau) > CLOSE * max(self.judge.scale, abs(without)):
            return rise < self.tau
        removed = self.kept.copy()
        removed[edge[0], self.receiver, edge[1]] = False
        return self.judge(removed) - self.judge(self.kept) < self.tau


class _Judge:
    """The mean divergence from the clean run over all pairs. Processes share batches, or predicted states
    where batches are too few, and all know what any of them found."""

    def __init__(self, evaluator: Evaluator, divergence: Divergence) -> None:
        self.divergence, self.evaluator, self.processes = divergence, evaluator, evaluator.prepared.processes
        self.runs = [
            (run, run.metric(run.base.logits), new_workspace(run.sources)) for run in evaluator.own_batches()
        ]
        self.by_batch = len(evaluator.own) < evaluator.n_batches
        largest = np.zeros(evaluator.n_batches)
        largest[evaluator.own] = [float(clean.abs().max()) for _, clean, _ in self.runs]
        largest = summed(largest, self.by_batch)
        self.scale = 1.0 if divergence == "kl" else agreed(float(largest.max()), self.processes)
        images = GPU_IMAGES if self.runs[0][1].is_cuda else CPU_IMAGES
        among = 1 if self.by_batch else place_in_group(self.processes)[1]
        self.at_once = among * max(1, images // min(len(evaluator), evaluator.batch_size))

    def take_up(self, kept: EdgeMask) -> None:
        """Bring the workspaces to the run of a mask."""
        for run, _, room in self.runs:
            run.logits(kept, room)

    def __call__(self, kept: EdgeMask) -> float:
        """The divergence of a mask, by a plain masked run."""
        mine = self._mine(1)
        return self._mean([run.logits(kept)[None] for run, _, _ in self.runs if mine], mine, 1)[0]

    def replays(self, kept: EdgeMask, receiver: int) -> list[Replay]:
        """Replays at a receiver for every batch; the workspaces hold the run of `kept`."""
        return [Replay(run.sources, kept, receiver, room) for run, _, room in self.runs]

    def divergences(self, replays: list[Replay], heard: EdgeMask) -> list[float]:
        """That of each candidate for the edges into the replays' receiver, `(sender, candidate, group)`."""
        mine = self._mine(heard.shape[1])
        states = self._upstream(replays, heard)[:, mine.start : mine.stop]
        return self._mean([replay(states) for replay in replays if mine], mine, heard.shape[1])

    def commit(self, replays: list[Replay], heard: EdgeMask, accepted: int) -> None:
        """Make one of the candidates just asked for the present run; who has not run it does so."""
        mine = self._mine(heard.shape[1])
        for replay in replays:
            if accepted not in mine:
                replay(self._upstream(replays, heard)[:, accepted : accepted + 1])
            replay.commit(mine.index(accepted) if accepted in mine else 0)

    def _upstream(self, replays: list[Replay], heard: EdgeMask) -> EdgeMask:
        graph = self.evaluator.graph
        return heard[graph.upstream[graph.receiver_stages[replays[0].receiver]]]

    def _mine(self, count: int) -> range:
        """Which of so many candidates this process runs."""
        return range(count)[slice(None) if self.by_batch else own_part(count, self.processes)]

    def _mean(
        self, logits: list[Float[Tensor, "candidate batch class"]], mine: range, count: int
    ) -> list[float]:
        """The mean over all pairs, from the logits of own batches and candidates."""
        sums = np.zeros((self.evaluator.n_batches, count))
        for number, (run, clean, _), found in zip(self.evaluator.own, self.runs, logits, strict=False):
            distances = (
                kl(run.clean_logits, found) if self.divergence == "kl" else (run.metric(found) - clean).abs()
            )
            sums[number, mine] = distances.double().sum(dim=-1).cpu().numpy()
        total: list[float] = (summed(sums, self.processes).sum(axis=0) / len(self.evaluator)).tolist()
        return total


def _refuse_no_effect(prepared: PreparedTask, judge: _Judge) -> None:
    """Refuse a task that ablating every edge does not touch."""
    distance = judge(np.zeros(prepared.graph.shape, dtype=bool))
    if distance <= NEGLIGIBLE * judge.scale:
        raise DataError(
            f"with every edge ablated the {judge.divergence} divergence from the clean run is "
            f"{distance:.2g}, so there is nothing to explain: choose images that differ more, another metric "
            "or another ablation"
        )
