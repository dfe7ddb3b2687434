"""Training the maps of a tuned lens: streams of batches, the divergence of a lens, and the loop.

All positions and all strengths are trained side by side on the same batches; each is a problem of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import capture
from circuitvit.errors import DataError, ModelError
from circuitvit.models import Model, through
from circuitvit.tasks.images import Images
from circuitvit.verification.statistics import MIN_PAIRS
from circuitvit.views.lens import positions_of

STRENGTHS = (0.0, 0.01, 0.1)
"""Of the pull to the identity, in nats for each unit of `|W|^2`; each position keeps the one that serves."""

STEP, SHIFT_STEP = 0.01, 0.1
"""Steps of AdamW for `W`, and for `b` in units of the last stream's spread; both fall to 0 by a cosine."""

CHOOSE = 5
"""Of the images that are not held out every so many-th is not fitted to, but chooses strength and epoch."""


def split(count: int, held_out: float, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """The images to measure on, to choose by and to fit to.

    Raises:
        DataError: if one of them would have too few.
    """
    measured = round(count * held_out)
    choosing = round((count - measured) / CHOOSE)
    if min(measured, choosing) < MIN_PAIRS:
        raise DataError(
            f"{count} images with {measured} held out and {choosing} to choose by are too few for a tuned "
            f"lens: each needs {MIN_PAIRS}, so give 33 or more; a few hundred are usual"
        )
    rows = rng.permutation(count)
    held, choice, fitted = np.split(rows, [measured, measured + choosing])
    return held, choice, fitted


class Source:
    """Streams and outputs of batches of images; kept as long as there is room, else computed anew.

    Args:
        model: whose.
        images: all of them.
        memory: bytes to keep.
    """

    def __init__(self, model: Model, images: Images, memory: int = 0) -> None:
        self.model, self.images, self.memory = model, images, memory
        self.places = positions_of(model, "layer")
        self._readout = model.essential[model.reading :]
        self._kept: dict[bytes, tuple[list[Tensor], Tensor]] = {}

    def __call__(self, rows: NDArray[np.int64]) -> tuple[list[Tensor], Float[Tensor, "image class"]]:
        """What the readout could read at each position, `(image, token, d_model)`, and log probabilities."""
        kept = self._kept.get(rows.tobytes())
        if kept is not None:
            return kept
        taken = torch.cat([self.images.take(int(row), int(row) + 1) for row in rows])
        run = capture(self.model, taken.to(self.model.device, self.model.dtype), essential=True)
        bad = ~run.logits.isfinite().all(dim=-1)
        if bad.any():
            name = self.images.names[int(rows[int(bad.nonzero()[0])])]
            raise ModelError(f"the logits of {name} are NaN or infinite: check the weights and the image")
        streams = [run.stream(place)[:, : self.model.leading].clone() for place in self.places]
        found = streams, run.logits.float().log_softmax(dim=-1)
        size = sum(each.numel() * each.element_size() for each in (*streams, found[1]))
        if size <= self.memory:
            self.memory -= size
            self._kept[rows.tobytes()] = found
        return found

    def named(self, rows: NDArray[np.int64]) -> tuple[str, ...]:
        """The names of some of the images."""
        return tuple(self.images.names[row] for row in rows)

    def read(self, streams: Float[Tensor, "*map image token d_model"]) -> Float[Tensor, "*map image class"]:
        """Log probabilities of what the model's readout makes of streams."""
        logits = through(self._readout, streams.flatten(0, -3).to(self.model.dtype))
        return logits.float().log_softmax(dim=-1).view(*streams.shape[:-2], -1)


def _batches(rows: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _divergence(wanted: Tensor, read: Tensor) -> Float[Tensor, "*map image"]:
    """KL of what is read from what is wanted, both log probabilities `(..., image, class)`, in nats."""
    return F.kl_div(read, wanted.expand_as(read), reduction="none", log_target=True).sum(dim=-1)


def affine(weight: Tensor, bias: Tensor, stream: Tensor) -> Float[Tensor, "image token d_model"]:
    precise = torch.promote_types(stream.dtype, weight.dtype)
    weight, bias = weight.to(stream.device, precise), bias.to(stream.device, precise)
    return (stream.to(precise) @ weight.T + bias).to(stream.dtype)


@torch.no_grad()
def compared(
    source: Source,
    rows: NDArray[np.int64],
    weight: Float[Tensor, "position d_model d_model"],
    bias: Float[Tensor, "position d_model"],
    size: int,
    bar: Any,
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """KL of both lenses from the output, and whether they have its top class, `(lens, position, image)`."""
    parts: list[tuple[Tensor, Tensor]] = []
    for batch in _batches(rows, size):
        streams, wanted = source(batch)
        mapped = [affine(*each) for each in zip(weight, bias, streams, strict=True)]
        mapped[-1] = streams[-1]
        read = torch.stack([torch.stack([source.read(one) for one in each]) for each in (streams, mapped)])
        agrees = read.argmax(dim=-1) == wanted.argmax(dim=-1)
        parts.append((_divergence(wanted, read).double().cpu(), agrees.cpu()))
        bar.update(len(batch))
    kl, same = (torch.cat(each, dim=-1).numpy() for each in zip(*parts, strict=True))
    return kl, same


def trained(
    source: Source,
    fitted: NDArray[np.int64],
    choosing: NDArray[np.int64],
    size: int,
    epochs: int,
    rng: np.random.Generator,
    bar: Any,
) -> tuple[Tensor, Tensor, tuple[float, ...], tuple[int, ...]]:
    """Weights, biases, strengths and epochs by position; those of the last are the identity.

    All strengths are trained side by side, and each position is a problem of its own.
    """
    batches = _batches(fitted, size)
    centres, spread = _centred(source, batches, bar)
    n_places, width = centres.shape
    shape = len(STRENGTHS), n_places - 1, width
    weights = torch.zeros(*shape, width, device=centres.device, requires_grad=True)
    shifts = torch.zeros(*shape, device=centres.device, requires_grad=True)
    pull = torch.tensor(STRENGTHS, device=centres.device)
    optimizer = torch.optim.AdamW(
        [{"params": [weights], "lr": STEP}, {"params": [shifts], "lr": SHIFT_STEP}], weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))

    def divergences(batch: NDArray[np.int64]) -> Iterator[Float[Tensor, "strength image"]]:
        streams, wanted = source(batch)
        for place, stream in enumerate(streams[:-1]):
            plain = stream.float()
            turned = (plain - centres[place]) @ weights[:, place, None].mT
            yield _divergence(wanted, source.read(plain + turned + spread * shifts[:, place, None, None]))

    best = _Best(weights, shifts)
    for epoch in range(epochs + 1):
        with torch.no_grad():
            found = [torch.stack([*divergences(batch)]).sum(dim=-1) for batch in _batches(choosing, size)]
        best.look(epoch, torch.stack(found).sum(dim=0), weights, shifts)
        if epoch == epochs:
            break
        for number in rng.permutation(len(batches)):
            optimizer.zero_grad()
            with torch.enable_grad():
                for place, divergence in enumerate(divergences(batches[number])):
                    penalty = pull @ weights[:, place].square().sum(dim=(-2, -1))
                    loss = divergence.mean(dim=-1).sum() + penalty
                    loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            bar.update(len(batches[number]))
    eye = torch.eye(width, device=centres.device)
    weight = torch.cat([eye + best.weights, eye[None]])
    bias = spread * best.shifts - torch.einsum("pij,pj->pi", best.weights, centres[:-1])
    bias = torch.cat([bias, torch.zeros_like(centres[-1:])])
    return weight.cpu(), bias.cpu(), (*best.strengths, 0.0), (*best.epochs, 0)


class _Best:
    """For each position the maps that came nearest to the output on the images that choose."""

    def __init__(self, weights: Tensor, shifts: Tensor) -> None:
        self.weights, self.shifts = weights[0].detach().clone(), shifts[0].detach().clone()
        count = len(self.weights)
        self.found, self.strengths, self.epochs = [float("inf")] * count, [0.0] * count, [0] * count

    def look(self, epoch: int, found: Tensor, weights: Tensor, shifts: Tensor) -> None:
        """Take what is nearer than all before; `found` is `(position, strength)`."""
        for place, each in enumerate(found):
            which = int(each.argmin())
            if float(each[which]) < self.found[place]:
                self.found[place], self.epochs[place] = float(each[which]), epoch
                self.strengths[place] = STRENGTHS[which]
                self.weights[place], self.shifts[place] = (
                    weights[which, place].detach(),
                    shifts[which, place].detach(),
                )


@torch.no_grad()
def _centred(
    source: Source, batches: Sequence[NDArray[np.int64]], bar: Any
) -> tuple[Float[Tensor, "position d_model"], float]:
    """The mean stream at each position, and how far the last one spreads around its mean."""
    sums, squares, count = torch.zeros(()), torch.zeros(()), 0
    for batch in batches:
        streams, _ = source(batch)
        doubled = torch.stack(streams).double().flatten(1, 2)
        sums, squares = (
            sums.to(doubled) + doubled.sum(dim=1),
            squares.to(doubled) + doubled[-1].square().sum(dim=0),
        )
        count += doubled.shape[1]
        bar.update(len(batch))
    centres = sums / count
    variance = (squares / count - centres[-1].square()).clamp_min(0).mean()
    return centres.float(), float(variance.sqrt()) or 1.0
