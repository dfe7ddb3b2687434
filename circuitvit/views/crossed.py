"""What crosses between groups of tokens, summed over pairs: to first order, along a path, or exactly.

What is asked and what comes of it is `circuitvit.views.crossings`; its formulas stand there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuitvit.attribution.eap import objective
from circuitvit.engine import (
    BatchRun,
    Gradients,
    gradients,
    members_at,
    run_from,
    stream_gradients,
)
from circuitvit.models import Model
from circuitvit.models.stages import Stage
from circuitvit.tasks import PreparedTask

Streams = Mapping[int, Tensor]
"""What each stage reads, by its number."""


class Sums:
    """Sums over pairs.

    Args:
        prepared: the task.
        places: heads by number of stage.
        heads: whether they are asked for.
    """

    def __init__(self, prepared: PreparedTask, places: dict[int, dict[str, int]], heads: bool) -> None:
        count = len(prepared.graph.groups)
        self.prepared, self.places, self.heads = prepared, places, heads
        self.stages = (*places, len(prepared.model.stages) - 1)
        self.crossing = np.zeros((len(places), count, count))
        self.by_head = np.zeros((sum(map(len, places.values())), count, count))
        self.held = np.zeros((len(places) + 1, count))
        self.read = np.zeros((len(places), count))
        self.effect = 0.0

    def pieces(self, stage: Stage) -> list[tuple[int, int, int]]:
        """The pieces of heads among a stage's senders: their places, and numbers of head and group."""
        numbers = {head: number for heads in self.places.values() for head, number in heads.items()}
        names = {
            f"{head}[{group}]": (number, place)
            for head, number in numbers.items()
            for place, group in enumerate(self.prepared.graph.groups)
        }
        return [(row, *names[name]) for row, name in enumerate(stage.nodes.senders) if name in names]


def effect_of(run: BatchRun) -> float:
    compacts = run.sources.reference.compacts
    assert compacts is not None, "the reference is a run"
    return float((run.metric(compacts[-1]) - run.metric(run.base.logits)).double().sum())


def inside_of(run: BatchRun, stage: int, shape: Sequence[int]) -> Tensor:
    """Which group each token is in that a stage reads, as `(batch, token, group)` of 0 and 1."""
    graph, (images, tokens) = run.prepared.graph, shape[:2]
    members = members_at(graph, stage, run.batch.members, tokens)
    assert members is not None, "there are groups"
    return F.one_hot(members.expand(images, tokens), len(graph.groups)).double()


# -- to first order, in one leg or several -------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Leg:
    """A part of the way from the base run to the reference run.

    Attributes:
        before: what each stage reads where it begins.
        after: where it ends.
        slopes: the gradient after each stage but the readout.
    """

    before: Streams
    after: Streams
    slopes: Sequence[Tensor]

    def change(self, stage: int) -> Tensor:
        """Of what a stage reads, at the tokens that matter."""
        tokens = self.slopes[stage - 1].shape[1]
        return self.after[stage][:, :tokens] - self.before[stage][:, :tokens]


def legs(run: BatchRun, steps: int | None) -> Iterator[Leg]:
    """The whole way in one leg, with the gradient where it begins; or in steps, with that of the middle."""
    model, metric = run.prepared.model, objective(run.prepared, run.batch, run.base.logits)
    reference = _numbered(run.sources.reference_streams)
    ends = run.base.stream(1), reference[1]
    slopes: Callable[..., Gradients] = partial(gradients, model, run.base.compacts[0], metric)
    if steps is None:
        found = slopes()
        yield Leg(_numbered(found.capture.streams), reference, stream_gradients(found))
        return
    before = _streams(model, ends[0])
    for low, high in pairwise(np.linspace(0.0, 1.0, steps + 1).tolist()):
        found = slopes(stream=torch.lerp(*ends, (low + high) / 2))
        after = _streams(model, torch.lerp(*ends, high))
        yield Leg(before, after, stream_gradients(found))
        before = after


@torch.no_grad()
def _streams(model: Model, stream: Tensor) -> Streams:
    """What each stage reads when the layers start from a stream."""
    streams = {1: stream}
    for index, stage in enumerate(model.essential[1:-1], 2):
        earlier = streams[index - 1]
        streams[index] = stage.add(earlier, stage.write(stage.read(earlier)))
    return streams


def _numbered(streams: Sequence[Tensor | None]) -> Streams:
    return {index: stream for index, stream in enumerate(streams) if stream is not None}


@torch.no_grad()
def add_leg(found: Sums, run: BatchRun, pieces: Model, leg: Leg) -> None:
    for cut, index in enumerate(found.stages):
        change, slope = leg.change(index), leg.slopes[index - 1]
        inside = inside_of(run, index, change.shape)
        found.held[cut] += _dot(change, slope, inside).cpu().numpy()
        if cut == len(found.places):
            return
        stage, after = pieces.essential[index], leg.slopes[index]
        around = torch.zeros_like(slope)
        if not stage.nodes.begins:  # what a pool reads is carried no further
            around[:, : after.shape[1]] = after
        found.read[cut] += _dot(change, slope - around, inside).cpu().numpy()
        moved = _moved(stage, leg.before[index], leg.after[index])
        at = _dot(moved, after, inside_of(run, index + 1, after.shape)).cpu().numpy()
        for row, head, source in found.pieces(stage):
            found.by_head[head, source] += at[row]
            found.crossing[cut, source] += at[row]


def _dot(change: Tensor, slope: Tensor, inside: Tensor) -> Tensor:
    """`change . slope` summed over the images and tokens of each group, `(*row, group)`."""
    return torch.einsum("...bt,btg->...g", (change * slope).sum(dim=-1).double(), inside)


def _moved(stage: Stage, before: Tensor, after: Tensor) -> Float[Tensor, "sender batch token d_model"]:
    """What each sender of a stage writes more on one stream than on another."""
    return stage.expand(stage.write(stage.read(after)) - stage.write(stage.read(before)))


# -- exactly ---------------------------------------------------------------------------------------


@torch.no_grad()
def add_exact(found: Sums, run: BatchRun, pieces: Model) -> None:
    model, groups = run.prepared.model, range(len(run.prepared.graph.groups))
    base, references = run.metric(run.base.logits), _numbered(run.sources.reference_streams)

    def effect(stage: int, change: Tensor) -> float:
        if not change.any():
            return 0.0
        logits = run_from(model, stage, run.base.stream(stage) + change)
        return float((run.metric(logits) - base).double().sum())

    for cut, index in enumerate(found.stages):
        stream, reference = run.base.stream(index), references[index]
        reference = F.pad(reference, (0, 0, 0, stream.shape[1] - reference.shape[1]))
        inside = inside_of(run, index, stream.shape).to(stream.dtype)
        for group in groups:
            change = (reference - stream) * inside[..., group, None]
            found.held[cut, group] += effect(index, change)
        if cut == len(found.places):
            return
        stage = pieces.stages[index]
        moved = _moved(stage, stream, reference)
        at = inside_of(run, index + 1, moved.shape[1:]).to(stream.dtype)
        for source in groups:
            mine = [(row, head) for row, head, own in found.pieces(stage) if own == source]
            for target in groups:
                there = at[..., target, None]
                if not mine or not there.any():
                    continue
                whole = moved[[row for row, _ in mine]].sum(dim=0)
                found.crossing[cut, source, target] += effect(index + 1, whole * there)
                for row, head in mine if found.heads else ():
                    found.by_head[head, source, target] += effect(index + 1, moved[row] * there)
