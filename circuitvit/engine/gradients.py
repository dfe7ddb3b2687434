"""Gradients at every receiver's own input, from one backward pass of the unsplit model.

At the unablated point all receivers of a stage share one stream, so the model runs with its own fused
layers; gradients are tapped at the stages' reads (queries, keys, values, normed MLP input), which are
narrow, and pulled back through projection and norm in closed form, receiver by receiver.

A stage's output enters the stream that all later stages read, so its gradient is the sum of theirs, pulled
back through their reads: nothing of the forward run is computed again but norms and projections.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.runs import Capture
from circuitvit.errors import OptionError
from circuitvit.models import Factored, Model, Reads


@dataclass(frozen=True, eq=False)
class Gradients:
    """A captured run and the metric's gradient at every read.

    Attributes:
        capture: of the run.
        reads: what each stage's receivers read; empty for the source.
        d_reads: the gradient of the summed metric at each of them.
        values: the metric of each image, `(batch,)`.
    """

    model: Model
    capture: Capture
    reads: tuple[Reads, ...]
    d_reads: tuple[Reads, ...]
    values: Float[Tensor, " batch"]

    def by_stage(self) -> list[Factored]:
        """The gradient at each receiver's own stream, for every stage that reads one."""
        return [
            stage.pull_back(self.capture.stream(index), self.reads[index], self.d_reads[index])
            for index, stage in enumerate(self.model.essential)
            if not stage.is_source
        ]


def refuse_inference_mode() -> None:
    """Refuse work with gradients under `torch.inference_mode`; `torch.no_grad` does no harm.

    Raises:
        OptionError: always under it.
    """
    if torch.is_inference_mode_enabled():
        raise OptionError("torch.inference_mode gives no gradients: leave it, or use method='exact'")


def gradients(
    model: Model,
    embedded: Tensor,
    objective: Callable[[Float[Tensor, "batch class"]], Float[Tensor, " batch"]],
    stream: Float[Tensor, "batch token d_model"] | None = None,
) -> Gradients:
    """Run the layers on what the source wrote, and differentiate the objective, summed over images.

    Args:
        model: to run.
        embedded: what the source wrote, in compact form.
        objective: logits `(batch, class)` to one number for each image.
        stream: where the layers start instead, such as a point between two inputs.
    """
    refuse_inference_mode()
    source, *layers, readout = model.essential
    streams: list[Tensor | None] = [None]
    compacts = [embedded]
    reads: list[Reads] = [()]
    stream = source.total(embedded) if stream is None else stream
    with torch.enable_grad():
        for stage in layers:
            taps = _tapped(stage.read(stream))
            compact = stage.write(taps)
            streams.append(stream.detach())
            compacts.append(compact)
            reads.append(taps)
            stream = stage.add(stream, compact)
        taps = _tapped(readout.read(stream))
        logits = readout.write(taps)
        values = objective(logits)
        flat = [tap for stage_reads in (*reads, taps) for tap in stage_reads]
        if values.requires_grad:
            found = iter(torch.autograd.grad(values.sum(), flat, materialize_grads=True))
        else:  # a metric that does not look at the logits
            found = iter([torch.zeros_like(tap) for tap in flat])
    reads.append(taps)
    streams.append(stream.detach())
    compacts.append(logits)
    return Gradients(
        model,
        Capture(tuple(streams), tuple(compact.detach() for compact in compacts), essential=True),
        tuple(tuple(tap.detach() for tap in stage_reads) for stage_reads in reads),
        tuple(tuple(next(found) for _ in stage_reads) for stage_reads in reads),
        values.detach(),
    )


def _tapped(reads: Reads) -> Reads:
    """The reads as tensors of their own, so that a gradient at one goes through its receiver alone.

    A stage without a norm reads the stream itself, which the skip connection and other receivers use as
    well; a view of it is used by nobody else. In the first layer nothing is differentiable yet, as the input
    is no receiver.
    """
    return tuple(
        read.view_as(read) if read.requires_grad else read.detach().requires_grad_() for read in reads
    )


# -- at the stream and at what stages write -------------------------------------------------------


def stream_gradients(found: Gradients) -> tuple[Float[Tensor, "batch token d_model"], ...]:
    """The gradient at the stream after each stage but the readout, at the tokens that are left in it.

    Args:
        found: of the run that is differentiated, at the reads.
    """
    stages, run = found.model.essential, found.capture
    d_stream = found.d_reads[-1][0].new_zeros(run.stream(len(stages) - 1).shape)
    after = []
    for index in range(len(stages) - 1, 0, -1):
        d_read = _pulled(stages[index].read, run.stream(index), found.d_reads[index])
        if not stages[index].nodes.begins:
            # around a stage goes the gradient of the tokens that it leaves in the stream
            d_read = d_read + F.pad(d_stream, (0, 0, 0, d_read.shape[1] - d_stream.shape[1]))
        d_stream = d_read
        after.append(d_stream)
    return tuple(reversed(after))


def slopes_of_streams(
    model: Model,
    embedded: Tensor,
    objective: Callable[[Float[Tensor, "batch class"]], Float[Tensor, " batch"]],
    stages: Collection[int],
    stream: Float[Tensor, "batch token d_model"] | None = None,
) -> tuple[Capture, dict[int, Float[Tensor, "batch token d_model"]]]:
    """Run the layers, and differentiate the objective at the streams that some stages read, and nowhere else.

    Cheaper than gradients at every read where those are not asked for: nothing before the first of these
    stages is differentiated, and nothing is pulled back.

    Args:
        model: to run.
        embedded: what the source wrote, in compact form.
        objective: logits `(batch, class)` to one number for each image.
        stages: their numbers, at least one.
        stream: where the layers start instead, such as a point between two inputs.
    """
    refuse_inference_mode()
    source, *others = model.essential
    stream = source.total(embedded) if stream is None else stream
    streams: list[Tensor | None] = [None]
    compacts = [embedded]
    with torch.enable_grad():
        for number, stage in enumerate(others, 1):
            if number in stages and not stream.requires_grad:
                stream = stream.detach().requires_grad_()
            compacts.append(stage.write(stage.read(stream)))
            streams.append(stream)
            stream = stream if stage.is_readout else stage.add(stream, compacts[-1])
        values = objective(compacts[-1])
        asked = {number: each for number, each in enumerate(streams) if number in stages and each is not None}
        if values.requires_grad:
            found = torch.autograd.grad(values.sum(), list(asked.values()), materialize_grads=True)
        else:  # a metric that does not look at the logits
            found = tuple(torch.zeros_like(each) for each in asked.values())
    run = Capture(
        tuple(None if each is None else each.detach() for each in streams),
        tuple(each.detach() for each in compacts),
        essential=True,
    )
    return run, dict(zip(asked, found, strict=True))


def output_gradients(found: Gradients) -> tuple[Tensor, ...]:
    """The gradient at each stage's compact output, in the order of the stages; the readout's is left out."""
    stages, compacts = found.model.essential[:-1], found.capture.compacts[:-1]
    return tuple(
        _pulled(stage.total, compact, (d_stream,))
        for stage, compact, d_stream in zip(stages, compacts, stream_gradients(found), strict=True)
    )


def _pulled(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], at: Tensor, gradient: tuple[Tensor, ...]
) -> Tensor:
    """The gradient at a function's argument from that at its values."""
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        values = function(leaf)
    return torch.autograd.grad(values if isinstance(values, tuple) else (values,), leaf, gradient)[0]
