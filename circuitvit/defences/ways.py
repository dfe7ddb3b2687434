"""Ways of saying which nodes to remove from a model, and in which order to try them.

| method | what it tries, and in which order |
| --- | --- |
| circuit | all that may be removed, by its effect on the unwanted behaviour less that on wanted ones |
| dyslexify | heads by the class token's attention on the cue's region, silenced at the class token |
| contrast | heads by how much more they write to the answer with the cue than without |
| projection | directions of the stream before the readout along which the cue moves it |
| random | as many nodes as the first method removed, drawn |

Dyslexify: Hufe et al. 2026 (ICLR), see `silenced`.

Contrast: Locate-Then-Correct, Yeo et al. 2025, "Debiasing CLIP: Interpreting and correcting bias in attention
heads", arXiv:2505.17425. There those heads are found that write most to the answer on images on which the cue
misleads, and not on others; what they write to the output becomes its mean, for all of them at once, and what
later layers make of it stays. Here the two images of a pair are contrasted, the head as a whole becomes its
mean, so that it folds, and heads are taken one by one.

Projection: differences of means, after Ravfogel et al. 2020, "Null it out", arXiv:2004.07667. It folds into
no weights where a norm comes before the classifier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.attribution import attribute
from circuitvit.defences.choosing import Choice, Search, Watched, by_effects
from circuitvit.defences.mended import DRAWN, Row
from circuitvit.defences.removable import AT_ONCE, Removable
from circuitvit.defences.silenced import CLS, check_class_token, looks_at
from circuitvit.engine import capture
from circuitvit.errors import DataError, OptionError
from circuitvit.models import Model
from circuitvit.models.sites import stream_names
from circuitvit.tasks import Patch, PreparedTask
from circuitvit.tasks.images import Images
from circuitvit.tasks.split import as_task
from circuitvit.tasks.task import batches_of

Method = Literal["circuit", "dyslexify", "contrast", "projection", "random"]

LARGE = 1e-2
"""Of the largest: directions along which the cue moves the stream less are left out."""


@dataclass(frozen=True, eq=False)
class Way:
    """What a method may remove, and in which order it is tried.

    Attributes:
        without: the model without some of it.
        ranked: what is to be tried, given the model without what was chosen so far.
        constants: what some of it becomes, where that is a constant; None where it is none.
        kind: of one of them, in words.
        folds: whether it folds into weights.
    """

    without: Callable[[Sequence[str]], Model]
    ranked: Callable[[Model], Iterable[str]]
    constants: Callable[[Sequence[str]], Mapping[str, Tensor | float]] | None
    kind: Callable[[str], str]
    folds: bool = True

    def row(self, method: str, choice: Choice) -> Row:
        """A row of the table."""
        given = {} if self.constants is None else self.constants(choice.names)
        constants = {
            name: np.atleast_1d(torch.as_tensor(value, dtype=torch.float64).cpu().numpy())
            for name, value in given.items()
        }
        kinds = tuple(self.kind(name) for name in choice.names)
        return Row(method, choice.names, kinds, constants, self.folds, choice.tried)


def way_of(
    method: Method,
    search: Search,
    nodes: Removable,
    region: str | None,
    batch_size: int | None,
    progress: bool,
) -> Way:
    if method == "circuit":
        return of_nodes(nodes, by_effects(search, nodes, batch_size))
    if method == "dyslexify":
        return _dyslexify(search.unwanted.task, region, batch_size, progress)
    if method == "contrast":
        order = _contrast(search.unwanted, nodes, progress)
        return of_nodes(nodes, lambda model: order)
    return _projection(search.unwanted.task, batch_size)


def of_nodes(nodes: Removable, ranked: Callable[[Model], Iterable[str]]) -> Way:
    """Some nodes with their constants, in an order."""
    return Way(nodes.without, ranked, nodes.removal, lambda name: nodes.kinds[nodes.numbers[name]])


def _dyslexify(task: PreparedTask, region: str | None, batch_size: int | None, progress: bool) -> Way:
    """Heads by the class token's attention on the cue's region, whose output there becomes 0."""
    model = task.model
    if region is None or task.groups is None:
        raise OptionError("it needs to know where the cue is: region= names a token group of the task")
    check_class_token(model)
    members = task.groups.members == task.groups.names.index(region)
    tokens = members if members.ndim == 2 else members.expand(len(task), -1)
    names, shares = looks_at(model, task.clean, tokens, batch_size, "attention", progress)
    order = [f"{names[at]}@{CLS}" for at in np.argsort(-shares, kind="stable")]

    def constants(chosen: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(chosen, 0.0)

    return Way(
        lambda chosen: model.edit(constants(chosen)) if chosen else model,
        lambda edited: order, constants, lambda name: "head", folds=False,
    )  # fmt: skip


def _contrast(unwanted: Watched, nodes: Removable, progress: bool) -> list[str]:
    """Heads by how much more they write to the answer with the cue than without, where that is more at all.

    That is the first-order effect of the edge from the head to the logits.
    """
    heads = [site.node for site in nodes.sites if site.kind == "z"]
    if not heads:
        raise OptionError("it chooses among heads: units= must have 'heads' in it")
    task = as_task(unwanted.task).with_options(ablation=Patch(), direction="noising", groups=None)
    scores = attribute(unwanted.task.model, task, "eap", progress=progress)
    edges = {head: f"{head}->logits" for head in heads}
    known = set(scores.graph.edges)
    direct = {head: scores[edge] for head, edge in edges.items() if edge in known}
    if not direct:
        raise OptionError("no head writes to the logits directly: a pool lies between")
    sign = np.sign(unwanted.size)
    order = sorted(direct, key=lambda head: sign * direct[head])
    return [f"{head}.z" for head in order if sign * direct[head] < 0]


@dataclass(frozen=True, eq=False)
class Levelled:
    """A stream held at given levels along some directions.

    Attributes:
        basis: the directions, of length 1 and at right angles, `(direction, d_model)`.
        level: the coordinate along each, `(direction,)`.
    """

    basis: Float[Tensor, "direction d_model"]
    level: Float[Tensor, " direction"]

    def __call__(self, stream: Tensor) -> Tensor:
        return stream + (self.level - stream @ self.basis.T) @ self.basis


def _projection(task: PreparedTask, batch_size: int | None) -> Way:
    """Directions along which the cue moves the stream that the readout reads, held at their mean.

    Pairs with one target are averaged, and of the means of all targets the main directions taken: what the
    cue adds for one answer it may take away for another.
    """
    model, bare = task.model, task.model.bare or task.model
    assert task.corrupt is not None, "checked at first"
    clean, corrupt = (_read(model, images, batch_size) for images in (task.clean, task.corrupt))
    target = task.metric.target
    labels = torch.zeros(len(task), 1) if target is None else target.cpu().float()
    _, kinds = torch.unique(labels, dim=0, return_inverse=True)
    moved = torch.stack([(clean - corrupt)[kinds == kind].mean(dim=0) for kind in kinds.unique()])
    _, sizes, axes = torch.linalg.svd(moved, full_matrices=False)
    if not sizes[0] > 0:
        raise DataError("the cue does not move the stream that the readout reads")
    basis = axes[sizes > LARGE * sizes[0]]
    level = torch.cat([clean, corrupt]).mean(dim=0) @ basis.T
    basis, level = (each.to(model.device, model.dtype) for each in (basis, level))
    names, site = [f"direction {at}" for at in range(len(basis))], stream_names(bare)[len(bare.stages) - 1]

    def without(chosen: Sequence[str]) -> Model:
        rows = [names.index(name) for name in chosen]
        return model.edit({site: Levelled(basis[rows], level[rows])}) if rows else model

    return Way(without, lambda edited: names, None, lambda name: "direction", folds=False)


@torch.no_grad()
def _read(model: Model, images: Images, batch_size: int | None) -> Float[Tensor, "image d_model"]:
    """The stream that the readout reads, the mean of the tokens that it does, in float64."""
    found = []
    for batch in batches_of(model, images, batch_size or AT_ONCE):
        stream = capture(model, batch, essential=True).streams[-1]
        assert stream is not None, "of the readout"
        found.append(stream.double().mean(dim=1).cpu())
    return torch.cat(found)


def drawn_rows(nodes: Removable, row: Row, draws: int, seed: int) -> Iterator[Row]:
    """Rows of as many nodes of each kind as a row has, drawn from those that it has not.

    Args:
        nodes: that may be removed.
        row: whose size is taken; where it removed nothing, or most of what there is, there are no rows.
        draws: how many.
        seed: of the draws.
    """
    rng, taken = np.random.default_rng(seed), set(row.removed)
    free: dict[str, list[str]] = {kind: [] for kind in row.kinds}
    for name, kind in zip(nodes.names, nodes.kinds, strict=True):
        if kind in free and name not in taken:
            free[kind].append(name)
    enough = all(len(names) >= row.kinds.count(kind) for kind, names in free.items())
    way = of_nodes(nodes, lambda model: ())
    for number in range(draws if taken and enough else 0):
        each = [rng.choice(names, row.kinds.count(kind), replace=False) for kind, names in free.items()]
        drawn = tuple(str(name) for names in each for name in names)
        yield way.row(f"{DRAWN} {number + 1}", Choice(drawn, 1.0, 0.0, ()))
