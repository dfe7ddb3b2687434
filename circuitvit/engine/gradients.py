"""Gradients at every receiver's own input, from one backward pass of the unsplit model.

At the unablated point all receivers of a stage share one stream, so the model runs with its own fused
layers; gradients are tapped at the stages' reads (queries, keys, values, normed MLP input), which are
narrow, and pulled back through projection and norm in closed form, receiver by receiver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.capture import Capture
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
    if torch.is_inference_mode_enabled():
        raise OptionError("torch.inference_mode gives no gradients: leave it, or use method='exact'")
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
        Capture(tuple(streams), tuple(compact.detach() for compact in compacts)),
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
