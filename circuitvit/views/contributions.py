"""What every part of the residual stream adds to the image embedding itself: its direct contribution.

The embedding is read from a sum: the input, every head, every MLP and a few biases. With the final norm's
scale held at its value in the run (`norm_scale` says it) the way there is affine, so the embedding is the sum
of all contributions, and what a head contributes is the sum of what it has read from each token. As in direct
logit attribution, which asks for one direction of this space, what a head does by way of later heads and MLPs
is in *their* contributions.

Gandelsman, Efros and Steinhardt 2024, "Interpreting CLIP's image representation via text-based
decomposition", arXiv:2310.05916.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import Capture, capture
from circuitvit.errors import DataError, OptionError, counted, unknown_name
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, Stage
from circuitvit.models.held import Held, embedding_readout, logits_readout
from circuitvit.tasks.classes import class_label
from circuitvit.views.attribution import check_sum, direct_stages, draw_bars, draw_model, layer_of
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Output = Literal["features", "logits"]
"""What is decomposed: the image embedding, before it is normalised; or the logits."""

LARGEST = 2 * 2**30
"""Bytes that the contributions of tokens may take."""

ROUNDED = "rounding"
"""The name of what the additions of the stream have rounded off."""

ROUNDING = 1e-6
"""What embeddings vary by, as a share of their length, where it is float32 that varies and not the images."""

AT_ONCE = 2**24
"""Numbers of the stream that a head's tokens are expanded to at once."""


@dataclass(frozen=True, eq=False, repr=False)
class Decomposition(Result):
    """The embedding of each image as a sum of direct contributions.

    Attributes:
        subjects: the images.
        output: "features", the image embedding before it is normalised, or "logits".
        dims: names of the embedding's dimensions where they have some: classes, or directions asked for.
        senders: names of input, heads and MLPs that write what is read out, in running order.
        kinds: what each sender is: "input", "head", "mlp", or "edit".
        layers: the number of each sender's layer; "pool" for one of a pool.
        by_sender: `(image, sender, dim)`, each sender's contribution.
        by_token: `(image, head, token, dim)`, where it was asked for: the contributions of `heads` by the
            token that they read their values from.
        constants: names of what no sender owns: biases of attention outputs, norms and projections; and
            "rounding", what the stream's own additions have rounded off in less than float64.
        constant_values: `(image, constant, dim)`.
        embedding: `(image, dim)`, the model's own.
        norm_scale: `(image, token)`, what the final norms multiplied each token that is read out with (the
            first ones alone, where no others are). It is held: a contribution is what a part adds at the
            scale that all parts together have.
    """

    subjects: Subjects
    output: Output
    dims: tuple[str, ...]
    senders: tuple[str, ...]
    kinds: tuple[str, ...]
    layers: tuple[int | str, ...]
    by_sender: Float[NDArray[np.float64], "image sender dim"]
    by_token: Float[NDArray[np.float64], "image head _source dim"] | None
    constants: tuple[str, ...]
    constant_values: Float[NDArray[np.float64], "image constant dim"]
    embedding: Float[NDArray[np.float64], "image dim"]
    norm_scale: Float[NDArray[np.float64], "image _read"]

    along = "subjects:image senders:sender kinds:sender layers:sender constants:constant"

    def _check(self) -> None:
        if self.by_token is not None and self.by_token.shape[1] != len(self.heads):
            raise OptionError(f"contributions of {self.by_token.shape[1]} heads for {len(self.heads)}")

    def records(self) -> Iterator[Record]:
        """One row for each `image` and part (`sender`, or a constant): the `length` of its contribution, and
        how long that is `along` the embedding; these sum to the embedding's length."""
        unit = self.embedding / np.maximum(np.linalg.norm(self.embedding, axis=1, keepdims=True), 1e-300)
        each = np.concatenate([self.by_sender, self.constant_values], axis=1)
        axes = {"image": list(self.subjects.names), "sender": (*self.senders, *self.constants)}
        yield from cells(axes, length=np.linalg.norm(each, axis=2), along=np.einsum("isd,id->is", each, unit))

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the senders that are attention heads."""
        return tuple(name for name, kind in zip(self.senders, self.kinds, strict=True) if kind == "head")

    @property
    def total(self) -> NDArray[np.float64]:
        """`(image, dim)`: the sum of all contributions; equals `embedding` to rounding."""
        return np.asarray(self.by_sender.sum(axis=1) + self.constant_values.sum(axis=1))

    def of(self, name: str) -> NDArray[np.float64]:
        """`(image, dim)`: the contribution of one sender.

        Raises:
            NameNotFoundError: for another one.
        """
        if name not in self.senders:
            raise unknown_name("sender", name, self.senders)
        return np.asarray(self.by_sender[:, self.senders.index(name)])

    @property
    def spread(self) -> NDArray[np.float64]:
        """`(sender,)`: each sender's share of how the embedding varies over the images.

        It is the covariance of the contribution and the embedding, over the embedding's variance, so shares
        sum to 1, but for constants that vary; one that works against the others is negative. Of one image
        the share of its length.

        Raises:
            DataError: if the embedding is the same for all images.
        """
        moved, each = self.embedding, self.by_sender
        if len(moved) > 1:
            moved, each = moved - moved.mean(axis=0), each - each.mean(axis=0)
        whole = float((moved**2).sum())
        if whole <= ROUNDING**2 * float((self.embedding**2).sum()):
            raise DataError("the embedding does not vary over these images: there is nothing to share out")
        return np.asarray(np.einsum("isd,id->s", each, moved) / whole)

    def strongest(self, k: int = 10) -> list[tuple[str, float]]:
        """The `k` senders with the largest share of the `spread` by magnitude, strongest first."""
        shares = self.spread
        return [
            (self.senders[at], float(shares[at])) for at in np.argsort(-np.abs(shares), kind="stable")[:k]
        ]

    def ablated(self, senders: Sequence[str]) -> NDArray[np.float64]:
        """`(image, dim)`: the embedding when these senders contribute their mean over the images instead.

        Raises:
            NameNotFoundError: for one that is not there.
        """
        for name in senders:
            if name not in self.senders:
                raise unknown_name("sender", name, self.senders)
        places = [self.senders.index(name) for name in dict.fromkeys(senders)]
        own = self.by_sender[:, places]
        return np.asarray(self.embedding + (own.mean(axis=0) - own).sum(axis=1))

    def figure(self) -> Picture:
        """Two panels: the largest shares of the spread as bars, and all senders by layer and head."""
        from circuitvit.views import canvas

        shares = self.spread
        what = "spread of the embedding" if len(self.subjects) > 1 else "length of the embedding"
        with canvas.styled():
            of = counted(len(self.subjects), "image")
            figure = canvas.blank(7.4, 3.9, f"Direct contributions to the {self.output} of {of}")
            bars, grid = figure.subplots(1, 2, width_ratios=[1.05, 1])
            draw_bars(bars, self.senders, shares, float(shares.sum()), "sum")
            bars.set_xlabel(f"share of the {what}")
            draw_model(grid, self.senders, self.layers, shares, "share")
        return figure

    def __repr__(self) -> str:
        strongest = ", ".join(f"{name} {share:+.0%}" for name, share in self.strongest(3))
        size = f"{self.output} of {counted(len(self.subjects), 'image')}, {self.embedding.shape[1]} wide"
        return f"Decomposition({size}; largest shares of the spread: {strongest})"


@running
def decompose(
    model: Model,
    images: ImageSpec,
    *,
    output: Output = "features",
    tokens: bool = False,
    directions: Float[Tensor, "direction width"] | ArrayLike | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Decomposition:
    """The image embedding as the sum of every head's, MLP's and token's direct contribution.

    It is exact up to the final norm's scale, which is held at its value in the run. The embedding is what the
    model's own classifier, or the head or the prompts that were put on it, reads; of a CLIP what is compared
    with sentences, before it is normalised.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        output: "features" for the embedding, "logits" for the logits.
        tokens: whether heads' contributions are also told apart by the token that they were read from.
        directions: `(direction, width)`; contributions are then numbers along each of these, which takes less
            memory.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        DataError: for images that cannot be used, and if the contributions of tokens take too much memory.
        OptionError: for another output, or directions of another width.
        UnsupportedModelError: if the readout cannot be made linear, or with `tokens` if what a head writes is
            no sum over tokens.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(2, seed=0)
        >>> found = decompose(model, pairs.clean)
        >>> found.by_sender.shape, bool(abs(found.total - found.embedding).max() < 1e-5)
        ((2, 21, 64), True)
    """
    if output not in ("features", "logits"):
        raise unknown_name("output", str(output), ("features", "logits"))
    found = images_of(model, images)
    readout = embedding_readout(model) if output == "features" else logits_readout(model)
    wanted = None if directions is None else as_rows("directions", directions)
    parts: list[_Part] = []
    for batch in watched_batches(model, found, batch_size, "contributions", progress):
        run = capture(model, batch)
        stream = run.stream(len(model.stages) - 1)[:, : readout.tokens]
        held = Held.at(readout, stream)
        if wanted is not None:
            _check_width(wanted, held)
        if not parts and tokens:
            _check_room(model, held, len(found), wanted, run.stream(1).shape[1])
        parts.append(_part(model, run, held, tokens, wanted))
    stages = [branch for _, stage in direct_stages(model) for branch in stage.branches]
    made = Decomposition(
        subjects_of(model, found),
        output,
        dims=_dims(model, output, wanted),
        senders=tuple(name for stage in stages for name in stage.nodes.senders),
        kinds=tuple(_kind(stage) for stage in stages for _ in stage.nodes.senders),
        layers=tuple(layer_of(stage.nodes) for stage in stages for _ in stage.nodes.senders),
        by_sender=_joined(part.by_sender for part in parts),
        by_token=_joined(part.by_token for part in parts) if tokens else None,
        constants=tuple(parts[0].constants),
        constant_values=_joined(torch.stack([*part.constants.values()], dim=1) for part in parts)
        if parts[0].constants
        else np.zeros((len(found), 0, parts[0].embedding.shape[1])),
        embedding=_joined(part.embedding for part in parts),
        norm_scale=_joined(part.scale for part in parts),
    )
    rounding = sum(
        made.constant_values[:, place] for place, name in enumerate(made.constants) if name == ROUNDED
    )
    check_sum(model, made.by_sender, made.total - rounding, made.embedding)  # which must not hide in there
    return made


# -- inside --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """The contributions in one batch."""

    by_sender: Float[Tensor, "image sender dim"]
    by_token: Float[Tensor, "image head token dim"]
    constants: dict[str, Float[Tensor, "image dim"]]
    embedding: Float[Tensor, "image dim"]
    scale: Float[Tensor, "image token"]


@torch.no_grad()
def _part(model: Model, run: Capture, held: Held, tokens: bool, directions: Tensor | None) -> _Part:
    read = held.normed.shape[1]

    def out(vectors: Tensor) -> Tensor:
        """What is kept of vectors `(..., width)`."""
        wide = vectors.double().cpu()
        return wide if directions is None else wide @ directions.to(wide).t()

    def pushed(parts: Tensor) -> Tensor:
        return out(held.push(parts.double())).transpose(0, 1)

    by_sender, by_token, constants = [], [], dict[str, Tensor]()
    rounded = run.stream(len(model.stages) - 1)[:, :read].double()
    for place, stage in direct_stages(model):
        for branch, compact in zip(stage.branches, stage.split(run.compacts[place]), strict=True):
            wrote = branch.expand(compact)[..., :read, :]
            rounded = rounded - wrote.double().sum(dim=0)
            by_sender.append(pushed(wrote))
            if tokens and branch.nodes.kind == "attention":
                heads = _by_token(branch, run.stream(place), held)
                by_token.append(torch.stack([out(each).transpose(0, 1) for each in heads], dim=1))
        if stage.constant is not None:
            constant = stage.constant if stage.constant.ndim == 1 else stage.constant[:read]
            rounded = rounded - constant.double()
            constants[f"{stage.nodes.name}.bias"] = pushed(constant.expand_as(held.normed)[None])[:, 0]
    constants |= {name: out(values) for name, values in held.constants().items()}
    if model.dtype != torch.float64:
        constants[ROUNDED] = pushed(rounded[None])[:, 0]
    return _Part(
        torch.cat(by_sender, dim=1),
        torch.cat(by_token, dim=1) if by_token else torch.empty(0),
        constants,
        out(held.output()),
        (held.scale[..., 0] * held.after.mean(dim=1)).double().cpu(),
    )


def _by_token(stage: Stage, stream: Tensor, held: Held) -> Iterator[Float[Tensor, "token image width"]]:
    """The contributions of one head after the other by source token: pattern times what the token's value
    writes on its own.
    """
    reads = stage.read(stream)
    gain, pattern = stage.gain(reads), stage.pattern(reads)[:, :, : held.normed.shape[1]]
    alone = stage.factored(stage.carried(reads))  # as if a head attended to one token only
    for head in range(len(alone.narrow)):
        values, weight = alone.narrow[head], None if alone.weight is None else alone.weight[head]
        if gain is None and weight is not None:
            values = values @ weight
        widest = max(values.shape[-1], held.normed.shape[-1])
        step = max(1, AT_ONCE // (values.shape[0] * pattern.shape[2] * widest))
        found = []
        for start in range(0, values.shape[1], step):
            some = values[:, start : start + step].transpose(0, 1)[:, :, None]  # source, image, 1, width
            if gain is not None:  # rows of the pattern sum to 1, and share out what is added
                factor, added = (each[:, head, : pattern.shape[2]] for each in gain)
                some = some * factor + added
                some = some if weight is None else some @ weight
            attended = pattern[:, head, :, start : start + step].permute(2, 0, 1)[..., None]
            found.append(held.push(some * attended))
        yield torch.cat(found)


def _joined(parts: Iterator[Tensor]) -> NDArray[np.float64]:
    return np.asarray(torch.cat([*parts]).numpy())


def _kind(stage: Stage) -> str:
    return {"attention": "head"}.get(stage.nodes.kind, stage.nodes.kind)


def _dims(model: Model, output: Output, directions: Tensor | None) -> tuple[str, ...]:
    if directions is not None:
        return tuple(f"direction {place}" for place in range(len(directions)))
    if output == "logits" and model.has_classes:
        return tuple(class_label(model, place) for place in range(model.n_logits))
    return ()


def as_rows(name: str, given: Tensor | ArrayLike) -> Tensor:
    """Rows of numbers that a user gave, on the CPU.

    Raises:
        OptionError: if they are no numbers.
    """
    if isinstance(given, Tensor):
        return given.detach().cpu()
    try:
        return torch.as_tensor(np.asarray(given))
    except (TypeError, ValueError) as error:
        raise OptionError(f"the {name} are an array of numbers, not {given!r:.60}") from error


def _check_width(directions: Tensor, held: Held) -> None:
    width = held.output().shape[1]
    if directions.ndim != 2 or directions.shape[1] != width or not len(directions):
        raise OptionError(
            f"directions of shape {tuple(directions.shape)} in a space of {width} dimensions: give "
            f"(direction, {width})"
        )
    if not directions.is_floating_point() or not directions.isfinite().all():
        raise OptionError("directions are made of real numbers, and finite ones")


def _check_room(model: Model, held: Held, images: int, directions: Tensor | None, tokens: int) -> None:
    """Refuse contributions of tokens that are larger than memory should be asked for."""
    stages = [branch for _, stage in direct_stages(model) for branch in stage.branches]
    heads = sum(len(stage.nodes.senders) for stage in stages if stage.nodes.kind == "attention")
    if not heads:
        raise OptionError(f"{model.name} has no heads that write what is read out: leave out tokens=True")
    width = held.output().shape[1] if directions is None else len(directions)
    size = images * heads * tokens * width * 8
    if size > LARGEST:
        raise DataError(
            f"contributions of {counted(images, 'image')}, {heads} heads and {tokens} tokens in {width} "
            f"dimensions take {size / 2**30:.1f} GiB: give fewer images, or the directions that are asked for"
        )
