"""Running the model plainly, stage by stage, and keeping what the senders wrote."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvit.errors import ModelError
from circuitvit.models import Factored, Model, Stage, through
from circuitvit.tasks import Batch


@dataclass(frozen=True, eq=False)
class Capture:
    """What a plain run left behind.

    Attributes:
        streams: what each stage read, `(batch, token, d_model)`; None for the source, which reads images.
        compacts: what each stage's senders wrote, in compact form; the readout's is the logits.
        essential: whether tokens that the logits do not depend on were left out.
    """

    streams: tuple[Tensor | None, ...]
    compacts: tuple[Tensor, ...]
    essential: bool = False

    @property
    def logits(self) -> Float[Tensor, "batch class"]:
        return self.compacts[-1]

    def stream(self, stage: int) -> Float[Tensor, "batch token d_model"]:
        """What a stage read."""
        stream = self.streams[stage]
        assert stream is not None, "the source reads images, not the stream"
        return stream


@torch.no_grad()
def capture(model: Model, images: Float[Tensor, "batch *shape"], *, essential: bool = False) -> Capture:
    """Run the model's own fused layers on images and keep every stage's input and output.

    Args:
        model: to run.
        images: `(batch, channel, height, width)`.
        essential: leave out the tokens of the last layer that the logits do not depend on.
    """
    source, *layers, readout = model.essential if essential else model.stages
    compacts = [source.write(source.read(images))]
    streams: list[Tensor | None] = [None]
    stream = source.total(compacts[0])
    for stage in layers:
        compact = stage.write(stage.read(stream))
        streams.append(stream)
        compacts.append(compact)
        stream = stage.add(stream, compact)
    streams.append(stream)
    compacts.append(readout.write(readout.read(stream)))
    return Capture(tuple(streams), tuple(compacts), essential)


@torch.no_grad()
def run_from(
    model: Model, stage: int, stream: Float[Tensor, "batch token d_model"]
) -> Float[Tensor, "batch class"]:
    """The logits when stage number `stage` and all after it run plainly on `stream`."""
    return through(model.essential[stage:], stream)


def outputs(
    stages: tuple[Stage, ...], compacts: tuple[Tensor, ...]
) -> Float[Tensor, "sender batch token d_model"]:
    """Every sender's output, from the compact forms; the readout has no senders and is passed over.

    Where a sender writes less than others all beyond is 0: tokens that an essential run left out, or that
    latents are fewer.

    Args:
        stages: all of a model's.
        compacts: what their senders wrote.
    """
    parts = [stage.factored(compact) for stage, compact in zip(stages[:-1], compacts[:-1], strict=True)]
    senders, images, tokens, widths = zip(*(part.shape for part in parts), strict=True)
    stacked = compacts[0].new_zeros(sum(senders), images[0], max(tokens), max(widths))
    start = 0
    for part in parts:
        count, _, written, width = part.shape
        part.expand(stacked[start : start + count, :, :written, :width])
        start += count
    return stacked


def differences(
    stages: Sequence[Stage], compacts: Sequence[Tensor], others: Sequence[Tensor]
) -> list[Factored]:
    """What the senders of every stage but the readout write in one run minus what they write in another.

    Of the first run only the tokens that the other has are looked at.
    """
    return [
        stage.factored(compact[..., : other.shape[-2], :] - other)
        for stage, compact, other in zip(stages[:-1], compacts, others, strict=False)
    ]


def check_logits(logits: Tensor, batch: Batch) -> None:
    """Refuse logits that are no numbers.

    Raises:
        ModelError: naming the first pair that they come from.
    """
    bad = ~logits.isfinite().all(dim=-1)
    if bad.any():
        row = int(batch.rows[bad.cpu()][0])
        raise ModelError(
            f"the model gives NaN or infinite logits for pair {row}: check its weights and the image"
        )
