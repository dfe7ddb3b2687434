"""Optimal ablation: constants that replace the senders' outputs with the least harm.

Zero and mean ablation hurt a model partly because it has never seen such values. The optimal constants are
those under which the ablated model stays closest to the whole one (by the KL of its prediction; where it has
no classes, by the square of what the metric changes), so what is still lost was carried by the ablated edges
themselves. They are learned by gradient descent, starting at the means, and used as an ablation
like any other.

Li and Janson 2024, "Optimal ablation for interpretability", arXiv:2409.09951.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import (
    BatchRun,
    Evaluator,
    Reference,
    progress_bar,
    refuse_inference_mode,
    soft_run,
)
from circuitvit.errors import check_number, check_whole
from circuitvit.graph import CircuitLike, as_circuit
from circuitvit.models import Model
from circuitvit.pruning.refine import require_noising
from circuitvit.tasks import Constants, Mean, Task, divergence, prepare


@torch.enable_grad()
@running
def learn_constants(
    model: Model,
    task: Task,
    circuit: CircuitLike,
    *,
    steps: int = 100,
    learning_rate: float = 0.01,
    per_token: bool = False,
    batch_size: int = 4,
    progress: bool = True,
) -> Constants:
    """The constants under which a circuit's complement is ablated with the least harm.

    Args:
        model: from `load` or `wrap`.
        task: whose clean images are used; its own ablation is not looked at.
        circuit: that stays whole; the empty one gives constants for ablating everything.
        steps: of Adam.
        learning_rate: in units of each sender's root mean square output.
        per_token: learn a constant for each token, or one for all.
        batch_size: images at each step.
        progress: whether to show a bar.

    Returns:
        An ablation, for `Task(..., ablation=constants)`.

    Raises:
        OptionError: if `steps` or `learning_rate` is not positive, the task is denoising, or the circuit
            belongs to another graph.

    Example:
        >>> import circuitvit as cv  # doctest: +SKIP
        >>> constants = cv.learn_constants(model, task, circuit)  # doctest: +SKIP
        >>> report = cv.verify(model, task.with_options(ablation=constants), circuit)  # doctest: +SKIP
    """
    check_whole("steps", steps)
    check_number("learning_rate", learning_rate)
    require_noising(task)
    refuse_inference_mode()
    prepared = prepare(model, task.with_options(ablation=Mean(per_token=per_token)), progress)
    pairs = Evaluator(prepared, batch_size=min(batch_size, len(prepared)))
    circuit = as_circuit(circuit, pairs.graph)
    start = pairs.batch(0).sources.reference_outputs()[:, :1, : None if per_token else 1]
    scale = start.flatten(1).square().mean(dim=1).sqrt().clamp_min(1e-6)[:, None, None, None]
    moves = torch.zeros_like(start, requires_grad=True)
    optimiser = torch.optim.Adam([moves], lr=learning_rate)
    mask = torch.tensor(circuit.kept, dtype=model.dtype, device=model.device)
    with progress_bar(steps, "optimal constants", progress) as bar:
        for step in range(steps):
            run = pairs.batch(step % pairs.n_batches)
            reference = Reference(wide=start + scale * moves)
            logits = soft_run(replace(run.sources, reference=reference), mask)
            loss = _loss(run, logits)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
    return Constants((start + scale * moves).detach()[:, 0].cpu())


def _loss(run: BatchRun, logits: Tensor) -> Tensor:
    """How far the ablated model is from the whole one, averaged over the images of a batch."""
    if run.prepared.model.chooses:
        return divergence(run.clean_logits, logits).mean()
    return (run.metric(logits) - run.metric(run.base.logits)).square().mean()
