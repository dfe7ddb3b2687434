"""A circuit taken home: a module that runs images through it, with nothing but torch's own operations.

Ablated edges carry what does not depend on the image, so all that a receiver hears of them is one constant:

    X_v = constant_v + sum over kept edges of x_u
        = constant'_v + (sum over all senders of x_u) - sum over ablated edges of x_u,

whichever sum is shorter. Receivers that hear the same share a stream, and senders that no kept path joins to
the logits do not run. The parts are those of the model's stages; nothing is looked up or decided while it
runs, so that `torch.export` can follow it, and ONNX.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from circuitvit._keywords import running
from circuitvit.engine.batches import choose_batch_size
from circuitvit.engine.references import Sources, reference_source
from circuitvit.engine.runs import capture
from circuitvit.errors import DataError, OptionError, UnsupportedModelError
from circuitvit.graph import CircuitLike, EdgeMask, Graph, as_circuit
from circuitvit.graph.liveness import NEVER, needed_senders
from circuitvit.models import Model, Reads, Stage
from circuitvit.tasks import Constants, Mean, PreparedTask, Task, Zero, prepare


@running
def masked_module(
    model: Model,
    circuit: CircuitLike,
    reference: Task | PreparedTask,
    *,
    batch_size: int | None = None,
    memory: int | str | None = None,
) -> nn.Module:
    """A module whose logits are those of the model with everything outside a circuit ablated.

    It holds a copy of the model's weights and, as buffers, what ablated edges carry: the same for every
    image, by "mean", "mean-tokens" or "zero" ablation or `Constants`. It takes images of the model's own
    size, on the device and in the dtype of the model, and can be given to `torch.export.export` and
    `torch.onnx.export(..., dynamo=True)`.

    Args:
        model: from `load`, `wrap`, `edit`, `with_head` or `with_prompts`.
        circuit: the edges that are kept.
        reference: a task, whose ablation and token groups hold; its metric is not asked for anything.
        batch_size: images at once, where means are taken.
        memory: bytes that this may take.

    Raises:
        OptionError: if what ablated edges carry differs from image to image, or token groups do.
        DataError: where the module is given images of another shape.
        UnsupportedModelError: if the model has edits for certain images.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(4), metric=cv.logit_diff("cat", "dog"), ablation="mean")
        >>> circuit = cv.attribute(model, task, "eap", progress=False).top(100)
        >>> module = masked_module(model, circuit, task)
        >>> module(task.prepare(model).batch(range(2)).base).shape
        torch.Size([2, 4])
    """
    prepared = prepare(model, reference)
    if not isinstance(prepared.ablation, (Mean, Zero, Constants)):
        raise OptionError(
            f"{prepared.ablation.name!r} ablation carries something else for every image, which a module "
            "cannot know beforehand: give the task ablation='mean', 'mean-tokens' or 'zero'"
        )
    if model.edited_images is not None:
        raise UnsupportedModelError(f"{model.name} has edits for {model.edited_images} images alone")
    kept = as_circuit(circuit, prepared.graph).kept
    sources = _sources(prepared, batch_size or choose_batch_size(prepared, memory))
    with torch.inference_mode(False), torch.no_grad():
        twin = copy.deepcopy(model)
        blank = twin.blank()
        module = MaskedModule(twin, sources, kept, blank.shape[1:])
        module(blank)  # what stages keep of their weights is made now
    return module.eval()


def _sources(prepared: PreparedTask, batch_size: int) -> Sources:
    """What a masked run of one image starts from; only what holds for all images is looked at."""
    model, batch = prepared.model, prepared.batch(range(1))
    if batch.members is not None and batch.members.ndim > 1:
        raise OptionError("the token groups differ from image to image: a module has to know them beforehand")
    with torch.no_grad():
        base = capture(model, batch.base)
        reference = reference_source(prepared, batch_size).make(batch, base)
    return Sources(model, prepared.graph, base, reference, batch.members)


# -- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """A stage, cut to the senders that are needed, and the streams that its receivers see.

    Attributes:
        index: number of the stage.
        part: what runs of it.
        is_all: whether all of its senders do, so that what it adds in sum has its constant in it.
        seen: for each receiver of the part the number of its stream.
        hears: the kept edges of each stream, `(stream, upstream sender, group)`.
        whole: for each stream whether it is what all senders write, less some.
        weights: what each sender is multiplied with in it then: 1, -1 or 0.
    """

    index: int
    part: Stage
    is_all: bool
    seen: tuple[int, ...]
    hears: NDArray[np.bool_]
    whole: tuple[bool, ...]
    weights: NDArray[np.int8]


def _plan(model: Model, graph: Graph, kept: EdgeMask) -> list[Step]:
    """The stages that run, in order."""
    runs = needed_senders(graph, kept, False) != NEVER
    steps = []
    for index, stage in enumerate(model.stages):
        own = runs[graph.sender_slices[index]]
        if not own.any() and not stage.is_readout:
            continue
        part = stage if own.all() else stage.restrict(np.flatnonzero(own).tolist())
        receivers = [graph.receiver_index[name] for name in part.nodes.receivers]
        heard = graph.upstream[index]
        columns = kept[heard, receivers].transpose(1, 0, 2)
        hears, seen = np.unique(columns, axis=0, return_inverse=True)
        running = np.broadcast_to(runs[heard, None], hears.shape[1:])
        whole = 2 * hears.sum(axis=(1, 2)) > running.sum()
        weights = hears.astype(np.int8) - (whole[:, None, None] & running)
        streams = tuple(seen.ravel().tolist())
        steps.append(Step(index, part, bool(own.all()), streams, hears, tuple(whole.tolist()), weights))
    return steps


def _by_token(
    by_group: NDArray[Any], members: Tensor | None, like: Tensor
) -> Float[Tensor, "stream sender token"] | Float[Tensor, "stream sender 1"]:
    """Something of each token group, for each token."""
    found = torch.from_numpy(by_group).to(like)
    return found if members is None else found[..., members]


# -- the module ----------------------------------------------------------------------------------


class MaskedModule(nn.Module):
    """See `masked_module`.

    Args:
        model: a copy that is this module's alone.
        sources: of the model that it is a copy of.
        kept: `(sender, receiver, group)`.
        shape: of an image; constants are for the tokens of this one.
    """

    def __init__(self, model: Model, sources: Sources, kept: EdgeMask, shape: Sequence[int]) -> None:
        super().__init__()
        self.body, graph, self._shape = model.module, sources.graph, tuple(shape)
        self._steps = _plan(model, graph, graph.in_run(kept))
        told = np.zeros(len(graph.senders), dtype=bool)  # those that some stream tells from the others
        for step in self._steps:
            told[graph.upstream[step.index]] |= step.weights.any(axis=(0, 2))
        self._told = {step.index: _places(step.part, graph, told) for step in self._steps}
        self._heard = {step.index: _stages(step, graph) for step in self._steps}
        references = sources.reference_outputs()[:, 0]
        for step in self._steps:
            if step.part.is_source:
                continue
            _, tokens, width = sources.base.stream(step.index).shape
            heard, members = graph.upstream[step.index], sources.members_at(step.index, tokens)
            ablated = _by_token(~step.hears, members, references).expand(-1, -1, tokens)
            constant = torch.einsum("put,utd->ptd", ablated, references[heard, :tokens, :width])
            constant = constant[:, None] + self._added(step, model, graph).to(constant)
            self.register_buffer(f"constant{step.index}", constant)
            used = np.zeros_like(told)
            for place in self._heard[step.index]:
                used[graph.sender_slices[place]] = told[graph.sender_slices[place]]
            mix = _by_token(step.weights[:, used[heard]], members, references)
            self.register_buffer(f"mix{step.index}", mix[..., 0] if members is None else mix)

    def _added(self, step: Step, model: Model, graph: Graph) -> Tensor:
        """What stages add that no sender owns, for each stream, `(stream, 1, token or 1, d_model)`; but for
        what is in the sums of those that run in full.
        """
        summed, heard = {each.index for each in self._steps if each.is_all}, graph.upstream[step.index]
        whole = torch.tensor(step.whole).view(-1, 1, 1, 1)
        total = torch.zeros(1, 1, 1, 1)
        for place, slots in enumerate(graph.sender_slices[: step.index]):
            own = model.stages[place].constant
            if own is not None and heard.start <= slots.start < heard.stop:
                missing = ~whole if place in summed else torch.ones_like(whole)
                total = total.to(own) + missing.to(own) * own
        return total

    def forward(self, images: Float[Tensor, "batch *shape"]) -> Float[Tensor, "batch classes"]:
        if tuple(images.shape[1:]) != self._shape:
            raise DataError(
                f"images of shape {tuple(images.shape)} for a module that takes (batch, "
                f"{', '.join(map(str, self._shape))}): its constants are for the tokens of that size"
            )
        totals: dict[str, Tensor] = {}
        written: dict[int, Tensor] = {}
        for step in self._steps:
            part, nodes = step.part, step.part.nodes
            if nodes.receivers:
                streams = self._streams(step, totals, written, images.shape[0])
                compact = part.write(_reads(part, streams, step.seen))
            else:
                compact = part.write(part.read(images))
            if part.is_readout:
                return compact
            each = None if step.is_all and not self._told[step.index] else part.expand(compact)
            total = part.total(compact) if each is None or step.is_all else each.sum(dim=0)
            before = None if nodes.begins else totals.get(nodes.writes_to)
            totals[nodes.writes_to] = total if before is None else before + total
            if each is not None:
                written[step.index] = each[self._told[step.index]]
        raise AssertionError("a model ends with its readout")

    def _streams(
        self, step: Step, totals: dict[str, Tensor], written: dict[int, Tensor], images: int
    ) -> list[Float[Tensor, "batch token d_model"]]:
        """What the receivers of a step see, each different stream once."""
        streams = self.get_buffer(f"constant{step.index}").expand(-1, images, -1, -1)
        if heard := self._heard[step.index]:
            senders, mix = torch.cat([written[place] for place in heard]), self.get_buffer(f"mix{step.index}")
            says = "pc,cbtd->pbtd" if mix.ndim == 2 else "pct,cbtd->pbtd"
            streams = streams + torch.einsum(says, mix, senders)
        total = totals.get(step.part.nodes.reads_from)
        return [
            stream if total is None or not whole else stream + total
            for stream, whole in zip(streams.unbind(0), step.whole, strict=True)
        ]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MaskedModule:
        """Refuse to be moved or cast: what stages have made of their weights would stay behind.

        Raises:
            OptionError: saying what to do instead.
        """
        raise OptionError(
            "a module of a circuit stays on the device and in the dtype of its model: load the model there, "
            "and make the module of that"
        )


def _places(part: Stage, graph: Graph, told: NDArray[np.bool_]) -> list[int]:
    """Which of the senders of a part are told from the others."""
    return [place for place, name in enumerate(part.nodes.senders) if told[graph.sender_index[name]]]


def _stages(step: Step, graph: Graph) -> list[int]:
    """The stages of which some sender is added to a stream of a step, or taken off."""
    heard, used = graph.upstream[step.index], step.weights.any(axis=(0, 2))
    numbers = np.arange(heard.start, heard.stop)[used]
    return [
        place
        for place, slots in enumerate(graph.sender_slices)
        if ((slots.start <= numbers) & (numbers < slots.stop)).any()
    ]


def _reads(part: Stage, streams: Sequence[Tensor], seen: Sequence[int]) -> Reads:
    """What the receivers of a part read, each of its own stream."""
    reads: Reads = ()
    first = 0
    for branch in part.branches:
        own = seen[first : first + len(branch.nodes.receivers)]
        first += len(own)
        each = {number: branch.read(streams[number]) for number in dict.fromkeys(own)}
        most = max(each, key=own.count)
        found = each[most]
        for receiver, number in enumerate(own):
            if number != most:
                found = branch.exchanged(found, each[number], receiver)
        reads += found
    return reads
