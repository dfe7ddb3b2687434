"""The metric's gradient at what every stage writes, from its gradient at what every stage reads.

A stage's output enters the stream that all later stages read, so its gradient is the sum of theirs, pulled
back through their reads. Nothing of the forward run is computed again but norms and projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from circuitvit.engine.gradients import Gradients

__all__ = ["output_gradients"]


def output_gradients(found: Gradients) -> tuple[Tensor, ...]:
    """The gradient at each stage's compact output, in the order of the stages; the readout's is left out.

    Args:
        found: of the run that is differentiated, at the reads.
    """
    stages, run = found.model.stages, found.capture
    d_stream = torch.zeros_like(run.stream(len(stages) - 1))
    d_compacts: list[Tensor] = []
    for index in range(len(stages) - 1, -1, -1):
        stage = stages[index]
        if not stage.is_readout:
            d_compacts.append(_pulled(stage.total, run.compacts[index], (d_stream,)))
        if not stage.is_source:
            d_stream = d_stream + _pulled(stage.read, run.stream(index), found.d_reads[index])
    return tuple(reversed(d_compacts))


def _pulled(
    function: Callable[[Tensor], Tensor | tuple[Tensor, ...]], at: Tensor, gradient: tuple[Tensor, ...]
) -> Tensor:
    """The gradient at a function's argument from that at its values."""
    leaf = at.detach().requires_grad_()
    with torch.enable_grad():
        values = function(leaf)
    return torch.autograd.grad(values if isinstance(values, tuple) else (values,), leaf, gradient)[0]
