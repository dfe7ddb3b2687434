"""Reference outputs: what the senders of a batch write on ablated edges, for every kind of ablation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.engine.capture import Capture, by_stage, capture, check_logits, differences, outputs
from circuitvit.errors import DataError, ModelError
from circuitvit.models import Factored, Model
from circuitvit.tasks import Batch, Constants, Mean, Noise, Patch, PreparedTask, Resample, Zero
from circuitvit.tasks.images import Images, as_images

Reference = tuple[Tensor, ...] | Float[Tensor, "sender batch token d_model"]
"""Reference outputs: the compact forms of a run's stages, or every sender's output."""


@dataclass(frozen=True)
class References:
    """The reference outputs of any batch whose base run has been captured.

    Attributes:
        model: that is run.
        make: gives them for a batch and its base run.
    """

    model: Model
    make: Callable[[Batch, Capture], Reference]

    def outputs(
        self, batch: Batch, base: Capture
    ) -> tuple[Float[Tensor, "sender batch token d_model"], tuple[Tensor, ...] | None]:
        """What every sender writes on ablated edges; and in compact form, where that is what a run writes."""
        made = self.make(batch, base)
        return (made, None) if isinstance(made, Tensor) else (outputs(self.model.stages, made), made)

    def deltas(self, batch: Batch, base: Capture) -> list[Factored]:
        """Reference minus base output of every stage's senders: what ablating all of their edges adds.

        Between two runs the difference is taken in the narrow compact forms.
        """
        made = self.make(batch, base)
        stages = self.model.stages
        if isinstance(made, Tensor):
            return by_stage(self.model.graph, outputs(stages, base.compacts).neg_().add_(made))
        return differences(stages, made, base.compacts)


def reference_source(prepared: PreparedTask, batch_size: int) -> References:
    """How the task's ablation gets its reference outputs; data-set statistics are computed here, once."""
    return References(prepared.model, _maker(prepared, batch_size))


def _maker(prepared: PreparedTask, batch_size: int) -> Callable[[Batch, Capture], Reference]:
    model, ablation = prepared.model, prepared.ablation
    match ablation:
        case Patch():
            return lambda batch, base: _patched(model, batch, base)
        case Zero():
            return lambda batch, base: torch.zeros_like(outputs(model.stages, base.compacts))
        case Mean():
            mean = _mean_outputs(prepared, ablation, batch_size)
            return lambda batch, base: mean.expand(-1, len(batch.rows), -1, -1)
        case Noise():
            return lambda batch, base: _noisy(model, ablation, batch)
        case Constants():
            return lambda batch, base: _constant(ablation, batch, base)
        case Resample():
            return lambda batch, base: _resampled(prepared, ablation, batch, base)


def _patched(model: Model, batch: Batch, base: Capture) -> tuple[Tensor, ...]:
    assert batch.reference is not None, "a task with patch ablation has corrupt images"
    run = capture(model, batch.reference, essential=base.essential)
    check_logits(run.logits, batch)
    return run.compacts


def _mean_outputs(
    prepared: PreparedTask, ablation: Mean, batch_size: int
) -> Float[Tensor, "sender 1 token d_model"]:
    """The mean output of every sender over the ablation's images: a sum over images, then one division."""
    model = prepared.model
    total: Tensor | None = None
    sources = _mean_images(prepared, ablation)
    for images in sources:
        for start in range(0, len(images), batch_size):
            batch = images.take(start, min(start + batch_size, len(images))).to(model.device, model.dtype)
            part = outputs(model.stages, capture(model, batch).compacts).sum(dim=1, keepdim=True)
            total = part if total is None else total.add_(part)
    assert total is not None, "image sources are never empty"
    if not total.isfinite().all():
        raise ModelError("the mean of the senders' outputs is NaN or infinite: check the images to average")
    mean = total / sum(len(images) for images in sources)
    return mean if ablation.per_token else mean.mean(dim=2, keepdim=True).expand_as(mean)


def _mean_images(prepared: PreparedTask, ablation: Mean) -> list[Images]:
    if ablation.images is None:
        return [prepared.clean] if prepared.corrupt is None else [prepared.clean, prepared.corrupt]
    images = as_images(ablation.images, prepared.spec)
    if images.shape != prepared.clean.shape:
        raise DataError(f"the images to average are {images.shape}, those of the task {prepared.clean.shape}")
    return [images]


def _constant(ablation: Constants, batch: Batch, base: Capture) -> Tensor:
    stream = base.stream(1)
    values = ablation.values.to(stream)[:, None]
    if values.shape[2] not in (1, stream.shape[1]) or values.shape[3] != stream.shape[2]:
        raise DataError(
            f"the constants are for {values.shape[2]} tokens of width {values.shape[3]}, "
            f"the model has {stream.shape[1]} of width {stream.shape[2]}"
        )
    return values.expand(-1, len(batch.rows), stream.shape[1], -1)


def _noisy(model: Model, ablation: Noise, batch: Batch) -> Tensor:
    own = outputs(model.stages, capture(model, batch.base).compacts)
    spread = own.flatten(2).std(dim=2)[..., None, None]
    noise = torch.empty_like(own)
    for place, row in enumerate(batch.rows.tolist()):
        generator = torch.Generator().manual_seed((ablation.seed * 1_000_003 + row) % 2**63)
        shape = (own.shape[0], *own.shape[2:])
        noise[:, place] = torch.randn(shape, generator=generator).to(own)
    return own + ablation.scale * spread * noise


def _resampled(prepared: PreparedTask, ablation: Resample, batch: Batch, base: Capture) -> tuple[Tensor, ...]:
    """Outputs on other base images: image `i` gets image `order[(place of i) + 1]` of one random cycle."""
    generator = torch.Generator().manual_seed(ablation.seed)
    order = torch.randperm(len(prepared), generator=generator)
    successor = torch.empty_like(order)
    successor[order] = order.roll(-1)
    images = [prepared.base.take(int(row), int(row) + 1) for row in successor[batch.rows]]
    model = prepared.model
    return capture(model, torch.cat(images).to(model.device, model.dtype), essential=base.essential).compacts
