"""What dictionaries miss: how much of the variance, and how much of the behaviour goes through it.

A circuit of features is about what its dictionaries explain. What they miss is a node too, `m8.error`; a
report says how much of the behaviour depends on it, whether a circuit may lack its edges or they are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from circuitvit.engine import Evaluator
from circuitvit.engine.batches import BatchRun
from circuitvit.engine.runs import run_from

ERROR = ".error"
"""How the nodes end that stand for what a dictionary misses."""


@dataclass(frozen=True)
class Missed:
    """What one dictionary misses on the images of a task.

    Attributes:
        node: such as `m8.error`.
        effect: the share of the task's effect that is lost when that node alone is ablated, for all readers.
        variance: the squared length of what is missed, over that of what the dictionary stands for around its
            mean; of a head of what it writes.
        kept: whether its edges are kept in every run.
    """

    node: str
    effect: float
    variance: float
    kept: bool

    def __str__(self) -> str:
        return f"{self.node} carries {self.effect:.0%} of the effect, and {self.variance:.0%} of the variance"


@torch.no_grad()
def missed_by_dictionaries(evaluator: Evaluator) -> tuple[Missed, ...]:
    """Of every dictionary in the model what it misses; () where there is none.

    The effect is whole minus nothing, everything ablated, what is kept in every run as well.
    """
    graph = evaluator.graph
    errors = [place for place, name in enumerate(graph.senders) if name.endswith(ERROR)]
    sums = torch.zeros(len(errors) + 1, dtype=torch.float64)
    moments = {place: _Moments() for place in errors}
    for run in evaluator.batches() if errors else ():
        whole = run.metric(run.base.logits)
        alone = [_without(run, place) for place in errors]
        lost = torch.stack([whole - run.metric(logits) for logits in (*alone, _nothing(run))])
        sums += lost.double().sum(dim=1).cpu()
        for place, moment in moments.items():
            moment.add(*_pieces(run, place))
    every, kept = sums[-1].item(), {name for stage in graph.stages for name in stage.kept}
    return tuple(
        Missed(name, lost / every if every else float("nan"), moments[place].share, name in kept)
        for lost, place in zip(sums.tolist(), errors, strict=False)
        for name in [graph.senders[place]]
    )


def about_missed(evaluator: Evaluator) -> Iterator[str]:
    """The same in sentences."""
    found = missed_by_dictionaries(evaluator)
    if not found:
        return
    yield f"What dictionaries miss, each ablated alone: {'; '.join(map(str, found))}."
    given = {edit.name for edit in evaluator.prepared.model.edits}
    if held := [each.node for each in found if each.node in given]:
        yield (
            f"What {', '.join(held)} writes was given, such as frozen at what it was on the base images: it "
            "is the same in every run, and its edges carry nothing."
        )
    if kept := [each.node for each in found if each.kept]:
        yield (
            f"The edges of {', '.join(kept)} are kept in every run, also in that of the circuit's complement "
            "and where everything is ablated: figures are about the rest."
        )


class _Moments:
    """Sums over tokens, for the share of what is missed."""

    def __init__(self) -> None:
        self.count, self.squares, self.missed = 0, 0.0, 0.0
        self.sum: Tensor | float = 0.0

    def add(self, whole: Tensor, missed: Tensor) -> None:
        """Those of some images `(image, token, d_model)`."""
        rows = whole.flatten(0, 1).double()
        self.count += len(rows)
        self.sum = self.sum + rows.sum(dim=0)
        self.squares += float(rows.square().sum())
        self.missed += float(missed.double().square().sum())

    @property
    def share(self) -> float:
        around = self.squares - float(torch.as_tensor(self.sum).square().sum()) / max(1, self.count)
        return self.missed / around if around > 0 else float("nan")


def _without(run: BatchRun, place: int) -> Tensor:
    """The logits when a sender alone writes its reference output, for all readers."""
    stage = run.sources.graph.sender_stages[place]
    tokens, width = run.sources.written_shape(stage)
    (change,) = run.sources.deltas([place])
    stream = run.base.stream(stage + 1) + change[:, :tokens, :width]
    return run_from(run.prepared.model, stage + 1, stream)


def _nothing(run: BatchRun) -> Tensor:
    """The logits with everything ablated."""
    last = len(run.prepared.model.stages) - 1
    return run.prepared.model.stages[last].write(run.sources.reference_reads(last))


def _pieces(run: BatchRun, place: int) -> tuple[Tensor, Tensor]:
    """What a node writes that is cut, and of that what is missed, `(image, token, d_model)`."""
    graph = run.sources.graph
    index, node = graph.sender_stages[place], graph.senders[place].removesuffix(ERROR)
    stage = run.prepared.model.stages[index]
    outputs = stage.expand(run.base.compacts[index])
    mine = [number for number, name in enumerate(stage.nodes.senders) if name.startswith(f"{node}.")]
    return outputs[mine].sum(dim=0), outputs[place - graph.sender_slices[index].start]
