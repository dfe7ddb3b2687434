"""The metric's gradient at the stream and at what every stage writes, from its gradient at what stages read.

A stage's output enters the stream that all later stages read, so its gradient is the sum of theirs, pulled
back through their reads. Nothing of the forward run is computed again but norms and projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.gradients import Gradients


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
        d_stream = d_read + _skipped(run.stream(index), d_stream)
        after.append(d_stream)
    return tuple(reversed(after))


def _skipped(stream: Tensor, d_after: Tensor) -> Tensor:
    """The gradient that goes around a stage: of the tokens that it leaves in the stream."""
    return F.pad(d_after, (0, 0, 0, stream.shape[1] - d_after.shape[1]))


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
