"""The few nodes that turn the answer on one image when they are patched from another: ranked, then run.

Nodes are ranked to first order; the highest are run alone and ranked again by what that does. Where none of
them flips the answer alone, the shortest beginning of that order that does is cut down until no single node
can be spared. Every step that decides is a run, none an estimate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import Capture, gradients, patch_senders, stream_gradients
from circuitvit.models import Model

CONFIRMED = 64
"""How many of the nodes that rank highest to first order are run alone."""

AT_ONCE = 8
"""Runs that share a forward."""

Margins = Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]
"""The margin with each of several sets of nodes patched, by their numbers."""


def margin(logits: Float[Tensor, "*run class"], label: Bool[Tensor, " class"]) -> Float[Tensor, "*run"]:
    """The largest logit of the label's classes minus the largest of all others: above 0 where it is right."""
    ours: Tensor = logits[..., label].amax(dim=-1) - logits[..., ~label].amax(dim=-1)
    return ours


@dataclass(frozen=True, eq=False)
class PatchedPair:
    """An image, and another whose nodes' outputs are patched into it.

    Attributes:
        model: to run.
        label: the classes that would be right.
        base: the essential run on the image.
        other: the essential run on the other.
        leading: of how many of the first tokens outputs are patched; None for all.
    """

    model: Model
    label: Bool[Tensor, " class"]
    base: Capture
    other: Capture
    leading: int | None

    @cached_property
    def nodes(self) -> list[int]:
        """The numbers of all senders but the input, which is the other image itself."""
        return nodes_of(self.model)

    def logits(self, sets: Sequence[Sequence[int]]) -> Float[Tensor, "run class"]:
        """With each of several sets of nodes patched."""
        chosen = np.zeros((len(sets), len(self.model.graph.senders)), dtype=bool)
        for row, nodes in enumerate(sets):
            chosen[row, list(nodes)] = True
        starts = range(0, len(sets), AT_ONCE)
        return torch.cat(
            [
                patch_senders(self.model, self.base, self.other, chosen[at : at + AT_ONCE], self.leading)
                for at in starts
            ]
        )

    def margins(self, sets: Sequence[Sequence[int]]) -> Float[NDArray[np.float64], " run"]:
        """The margin with each of several sets of nodes patched."""
        found: NDArray[np.float64] = margin(self.logits(sets), self.label).double().cpu().numpy()
        return found

    def first_order(self) -> Float[NDArray[np.float64], " sender"]:
        """By how much each node alone would move the margin, to first order at the image."""
        stages, graph = self.model.essential, self.model.graph
        found = gradients(self.model, self.base.compacts[0], lambda logits: margin(logits, self.label))
        effects = np.zeros(len(graph.senders))
        slopes = stream_gradients(found)
        for place, senders in enumerate(graph.sender_slices[:-1]):
            change = (self.other.compacts[place] - self.base.compacts[place])[..., : self.leading, :]
            slope = slopes[place][:, : self.leading]
            effects[senders] = (
                (stages[place].expand(change) * slope).double().sum(dim=(1, 2, 3)).cpu().numpy()
            )
        return effects


@dataclass(frozen=True, eq=False)
class Flipping:
    """What was found for one pair of images.

    Attributes:
        nodes: numbers of nodes that flip the answer together, none of which can be spared; in the order of
            what each does alone. Empty where no beginning of the ranking flips it.
        alone: the margin with each sender patched alone, minus that without; NaN where it was not run.
        tried: how many nodes the shortest beginning of the ranking had that flips it; 0 where none does.
    """

    nodes: tuple[int, ...]
    alone: Float[NDArray[np.float64], " sender"]
    tried: int


def flipping(pairs: Sequence[PatchedPair], done: Callable[[], object] = lambda: None) -> list[Flipping]:
    """The few nodes that flip the answer on one image, patched from each of several others.

    Where single nodes flip it, the one of them is taken that does most over all pairs, so that what is common
    to pairs is seen.

    Args:
        pairs: of the same image.
        done: called after each.
    """
    alone, ranked = [], []
    for pair in pairs:
        before, scores = float(margin(pair.base.logits[0], pair.label)), pair.first_order()
        order = sorted(pair.nodes, key=lambda node: -scores[node])
        effects = np.full(len(scores), np.nan)
        effects[order[:CONFIRMED]] = pair.margins([[node] for node in order[:CONFIRMED]]) - before
        order[:CONFIRMED] = sorted(order[:CONFIRMED], key=lambda node: -effects[node])
        alone.append(effects)
        ranked.append(order)
        done()
    common = np.nan_to_num(alone).mean(axis=0)
    return [_few(*each, common) for each in zip(pairs, alone, ranked, strict=True)]


def _few(
    pair: PatchedPair,
    alone: NDArray[np.float64],
    ranked: Sequence[int],
    common: Float[NDArray[np.float64], " sender"],
) -> Flipping:
    single = np.flatnonzero(float(margin(pair.base.logits[0], pair.label)) + alone > 0)
    if len(single):
        return Flipping((int(single[common[single].argmax()]),), alone, 1)
    start = shortest(ranked, pair.margins)
    return Flipping(tuple(spared(start, pair.margins)), alone, len(start))


def shortest(ranked: Sequence[int], margins: Margins) -> list[int]:
    """The shortest beginning of a ranking with which the margin is above 0; nothing where there is none.

    Example:
        >>> shortest([3, 1, 2], lambda sets: np.array([len(each) - 1.5 for each in sets]))
        [3, 1]
    """
    for first in range(1, len(ranked) + 1, AT_ONCE):
        sets = [list(ranked[:count]) for count in range(first, min(first + AT_ONCE, len(ranked) + 1))]
        for nodes, found in zip(sets, margins(sets), strict=True):
            if found > 0:
                return nodes
    return []


def spared(nodes: Sequence[int], margins: Margins) -> list[int]:
    """What is left when no single node can go, those tried first that rank last.

    Example:
        >>> spared([3, 1, 2], lambda sets: np.array([1.0 if {1} <= set(each) else -1.0 for each in sets]))
        [1]
    """
    left = list(nodes)
    while len(left) > 1:
        smaller = [[node for node in left if node != gone] for gone in reversed(left)]
        holds = np.flatnonzero(margins(smaller) > 0)
        if not len(holds):
            break
        left = smaller[int(holds[0])]
    return left


def nodes_of(model: Model) -> list[int]:
    """The numbers of the heads and MLPs among the senders."""
    return [
        number
        for number, (node, stage) in enumerate(
            zip(model.graph.senders, model.graph.sender_stages, strict=True)
        )
        if model.stages[stage].nodes.kind_of(node) in ("attention", "mlp")
    ]
