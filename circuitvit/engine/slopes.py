"""The metric's gradient at the stream and at what every stage writes, from its gradient at what stages read.

A stage's output enters the stream that all later stages read, so its gradient is the sum of theirs, pulled
back through their reads. Nothing of the forward run is computed again but norms and projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.gradients import Gradients

__all__ = ["output_gradients", "stream_gradients"]


def stream_gradients(found: Gradients) -> tuple[Float[Tensor, "batch token d_model"], ...]:
    """The gradient at the stream after each stage but the readout, in the order of the stages.

    Args:
        found: of the run that is differentiated, at the reads.
    """
    run = found.capture
    d_stream = torch.zeros_like(run.stream(len(found.model.stages) - 1))
    after = []
    for index in range(len(found.model.stages) - 1, 0, -1):
        stage = found.model.stages[index]
        d_stream = d_stream + _pulled(stage.read, run.stream(index), found.d_reads[index])
        after.append(d_stream)
    return tuple(reversed(after))


def output_gradients(found: Gradients) -> tuple[Tensor, ...]:
    """The gradient at each stage's compact output, in the order of the stages; the readout's is left out."""
    stages, compacts = found.model.stages[:-1], found.capture.compacts[:-1]
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
