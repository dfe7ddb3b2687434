"""Direct logit attribution: what every part of the residual stream says itself, straight to the logits.

The readout sees a sum: the input, every head, every MLP and a few biases. With the final norm's scale held at
its value in the run the readout is linear (`affine` of its stage), so a difference of logits is the sum of
all shares. A share is about the direct path alone: what a head does by way of later heads and MLPs is in
*their* shares, and is what edge scores are for.

Of a set of classes the logit is the log of the summed exponentials. With each class weighted by its
probability among the set's, held at its value in the run, that is a sum of shares too; what is left, the
entropy of these probabilities, is a constant of its own.

nostalgebraist 2020, "interpreting GPT: the logit lens"; Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits"; for Vision Transformers by patch Joseph and Nanda 2024, "Laying the Foundations for
Vision and Multimodal Mechanistic Interpretability", and Gandelsman et al. 2024, arXiv:2310.05916.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import Capture, capture
from circuitvit.errors import OptionError, UnsupportedModelError, counted
from circuitvit.export.sheet import Sheet
from circuitvit.export.style import COLOURS, INK, MUTED
from circuitvit.graph import StageNodes, is_residual
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model, Stage
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.tasks.classes import ClassSpec, opposed, spec_label
from circuitvit.tasks.images import Images
from circuitvit.tasks.metrics import BoundMetric
from circuitvit.tasks.task import BATCH
from circuitvit.views.subjects import ImageSpec, Subjects, images_of, subjects_of, watched_batches

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from circuitvit.views.canvas import Picture

ENTROPY = "classes.entropy"
"""The constant that a set of classes adds to the shares in its log-odds."""

LISTED = 14
"""Parts that have a bar of their own in the figure."""

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
"""How far the shares may be from the logits, relative to the largest share, before they are refused."""


@dataclass(frozen=True, eq=False, repr=False)
class DirectAttribution(Result):
    """Every part's share of a logit difference, in logits; positive shares speak for the target.

    `by_token` and `by_source` sum to the same over tokens. They differ for heads only: a head *writes* to a
    token what it has *read* from others. With token pooling all is written to the class token, and only the
    source says where in the image it came from. With attention pooling the stream that is read out is the
    pool's own: its heads and its MLP have all shares, and tokens written to are its latents.

    Attributes:
        subjects: the images.
        label: of the quantity, such as "cat - dog".
        senders: names of input, heads and MLPs that write what is read out, in running order.
        layers: the number of each sender's layer; "pool" for one of a pool.
        by_token: `(image, sender, token)`, shares by the token that a sender writes to.
        by_source: `(image, sender, token)`, shares by the token that a head reads its values from, by
            attention pattern times value; for other senders as `by_token`, and 0 for a pool's MLP, which
            reads no tokens. NaN for heads that are normed together, as what one of them writes is no sum over
            tokens then.
        constants: names of what no sender owns: biases of attention outputs, norms and classifier; and of
            sets of classes the entropy of their probabilities within the set.
        constant_values: `(image, constant)`.
        logit_difference: `(image,)`, the model's own; of sets the log-odds.
    """

    subjects: Subjects
    label: str
    senders: tuple[str, ...]
    layers: tuple[int | str, ...]
    by_token: Float[NDArray[np.float64], "image sender token"]
    by_source: Float[NDArray[np.float64], "image sender _source"]
    constants: tuple[str, ...]
    constant_values: Float[NDArray[np.float64], "image constant"]
    logit_difference: Float[NDArray[np.float64], " image"]

    along = "subjects:image senders:sender layers:sender constants:constant"
    may_be_nan = "by_source"

    def records(self) -> Iterator[Record]:
        """One row for each `image`, `sender` and `token`: the shares in logits `written_to` that token and
        `read_from` it (NaN where that is not known). A constant's share stands at no token (None)."""
        images, tokens = self.subjects.axes_of_tokens.values()
        shares = {"written_to": self.by_token, "read_from": self.by_source}
        yield from cells({"image": images, "sender": self.senders, "token": tokens}, **shares)
        constants = {"image": images, "sender": self.constants, "token": (None,)}
        yield from cells(constants, written_to=self.constant_values[..., None], read_from=None)

    @property
    def by_sender(self) -> NDArray[np.float64]:
        """`(image, sender)`: each sender's whole share."""
        return np.asarray(self.by_token.sum(axis=-1))

    @property
    def total(self) -> NDArray[np.float64]:
        """`(image,)`: the sum of all shares and constants; equals `logit_difference` to rounding."""
        return np.asarray(self.by_sender.sum(axis=-1) + self.constant_values.sum(axis=-1))

    @property
    def by_patch(self) -> NDArray[np.float64]:
        """`(image, sender, row, column)`: shares by source patch; other tokens have no place on it. Of clips
        with time before rows.
        """
        return self.subjects.on_grid(self.by_source)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of all senders, and then of all constants."""
        return (*self.senders, *self.constants)

    @property
    def by_part(self) -> NDArray[np.float64]:
        """`(image, part)`: the whole share of each of `parts`."""
        return np.concatenate([self.by_sender, self.constant_values], axis=1)

    def of(self, name: str, image: int | None = None) -> float:
        """The share of a sender or constant by name; the mean over images unless one is named.

        Raises:
            OptionError: if there is no such part.
        """
        if name not in self.parts:
            raise OptionError(f"no part is called {name!r}: there are {', '.join(self.parts)}")
        shares = self.by_part[:, self.parts.index(name)]
        return float(shares.mean() if image is None else shares[self.subjects.index(image)])

    def strongest(self, k: int = 10) -> list[tuple[str, float]]:
        """The `k` senders and constants of largest mean share by magnitude, strongest first."""
        shares = self.by_part.mean(axis=0)
        order = np.argsort(-np.abs(shares), kind="stable")[:k]
        return [(self.parts[index], float(shares[index])) for index in order]

    def __sub__(self, other: DirectAttribution) -> DirectAttribution:
        """What differs between two runs, such as clean minus corrupt: shares of the difference in the metric.

        Raises:
            OptionError: if the two have different parts or numbers of images.
        """
        if (self.senders, self.constants) != (other.senders, other.constants) or len(self.subjects) != len(
            other.subjects
        ):
            raise OptionError("only attributions of one model to as many images can be subtracted")
        parts = ("by_token", "by_source", "constant_values", "logit_difference")
        return replace(
            self,
            label=f"{self.label}, minus that of the other run",
            **{part: getattr(self, part) - getattr(other, part) for part in parts},
        )

    def figure(self, image: int | None = None, *, picture: bool = True, heads: int = 3) -> Picture:
        """Three panels: the strongest parts as bars, layers by heads as a map, and patches over the image.

        Args:
            image: which; by default the mean over all, where patches are shown for the first.
            picture: whether the image lies behind the patches.
            heads: how many single heads get their own map of patches, the strongest ones.

        Raises:
            OptionError: if there is no such image.
        """
        from circuitvit.views import canvas

        if heads < 0:
            raise OptionError(f"the number of heads cannot be {heads}")
        shown = self.subjects.index(image or 0)
        rows = slice(None) if image is None else [shown]
        name, mean = self.subjects.names[shown], image is None and len(self.subjects) > 1
        of = f"mean of {len(self.subjects)} images" if mean else name
        behind = self.subjects.pictures[shown] if picture else None
        shares, maps = self.by_part[rows].mean(axis=0), self.subjects.on_sheet(self.by_source[shown])
        chosen = sorted(_heads(self.senders), key=lambda place: -abs(shares[place]))[:heads]
        draw = partial(_draw_patches, sheet=self.subjects.sheet)
        with canvas.styled():
            title = f"Direct logit attribution: {self.label}, {of}"
            figure, bars, grid, patches, below = _panels(title, self.subjects.sheet, len(chosen))
            draw_bars(bars, self.parts, shares, float(self.logit_difference[rows].mean()), "sum = logits")
            bars.set_xlabel("logits")
            draw_model(grid, self.senders, self.layers, shares, "logits")
            where = f" of {canvas.label(name, 18)}" if mean else ""
            what = "word" if self.subjects.of_words else "patch"
            draw(patches, maps.sum(axis=0), behind, f"all parts, by source {what}{where}")
            digits = canvas.decimals(max((abs(shares[place]) for place in chosen), default=0.0), 2)
            for axes, place in zip(below, chosen, strict=True):
                draw(axes, maps[place], behind, f"{self.senders[place]}  {shares[place]:+.{digits}f}")
        return figure

    def __repr__(self) -> str:
        strongest = ", ".join(f"{name} {share:+.3g}" for name, share in self.strongest(3))
        of = counted(len(self.subjects), "image")
        return f"DirectAttribution({self.label} of {of}; strongest: {strongest})"


@running
def direct_logit_attribution(
    model: Model,
    images: ImageSpec,
    target: ClassSpec,
    foil: ClassSpec | None = None,
    *,
    batch_size: int | None = None,
    progress: bool = True,
) -> DirectAttribution:
    """Every part's share of `logit(target) - logit(foil)`, or of `logit(target)` without a foil.

    Args:
        model: from `load` or `wrap`.
        images: preprocessed `(image, channel, height, width)`, or paths.
        target: a class, a set or a group of them. Of several the logit is the log of the summed exponentials.
        foil: what it is compared with.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        NameNotFoundError: for an unknown class.
        OptionError: if target and foil share a class.
        DataError: for images that cannot be used.
        UnsupportedModelError: if the readout cannot be made linear.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(2, seed=0)
        >>> view = direct_logit_attribution(model, pairs.clean, "cat", "dog")
        >>> bool(abs(view.total - view.logit_difference).max() < 1e-4)
        True
    """
    found = images_of(model, images)
    wanted, others = opposed(model, target, foil)
    of = torch.zeros(len(found), model.n_logits)
    of[:, list(wanted)], of[:, list(others)] = 1.0, -1.0
    label = spec_label(model, target) + ("" if foil is None else f" - {spec_label(model, foil)}")
    return _attribute(model, found, of, label, batch_size, progress, sets=True)


@running
def attribution_of_task(
    model: Model, task: Task | PreparedTask, *, batch_size: int | None = None, progress: bool = True
) -> tuple[DirectAttribution, DirectAttribution | None]:
    """The shares in a task's metric on its clean and on its corrupt images (None where there are none).

    Their difference, `clean - corrupt`, says which parts write the difference in the metric.

    Raises:
        OptionError: if the metric is not a logit, a difference of two, or a projection; or the task was
            prepared for another model.
    """
    prepared = prepare(model, task)
    of, label = _linear(prepared.metric, len(prepared)), prepared.metric.label
    sets = prepared.metric.target is not None
    clean = _attribute(model, prepared.clean, of, label, batch_size, progress, sets=sets)
    if prepared.corrupt is None:
        return clean, None
    return clean, _attribute(model, prepared.corrupt, of, label, batch_size, progress, sets=sets)


# -- inside --------------------------------------------------------------------------------------


def _linear(metric: BoundMetric, count: int) -> Float[Tensor, "image class"]:
    """The weights of the logits in a metric that is a sum of them; of classes 1 for the target's, -1 for the
    foil's.
    """
    if metric.metric.name == "projection" and metric.vector is not None:
        return metric.vector.expand(count, -1)
    if metric.metric.name not in ("logit", "logit_diff") or metric.target is None:
        raise OptionError(
            f"{metric.label} is not a sum of shares: use the metric logit, logit_diff or projection"
        )
    return metric.target.float() - (0 if metric.foil is None else metric.foil.float())


def _attribute(
    model: Model,
    images: Images,
    of: Float[Tensor, "image class"],
    label: str,
    batch_size: int | None,
    progress: bool,
    *,
    sets: bool,
) -> DirectAttribution:
    """The shares in a sum of logits; with `sets` in the log-odds of classes marked 1 against others, -1."""
    sets = sets and bool(((of > 0).sum(dim=1) > 1).any() or ((of < 0).sum(dim=1) > 1).any())
    batches = watched_batches(model, images, batch_size, "attribution", progress)
    starts = count(0, BATCH if batch_size is None else batch_size)
    parts = [
        _shares(model, batch, of[start : start + len(batch)].to(batch), sets)
        for batch, start in zip(batches, starts, strict=False)
    ]
    by_token, by_source, constants, logits = zip(*parts, strict=True)
    stages = [stage for _, stage in direct_stages(model)]
    view = DirectAttribution(
        subjects_of(model, images),
        label,
        senders=tuple(name for stage in stages for name in stage.nodes.senders),
        layers=tuple(layer_of(stage.nodes) for stage in stages for _ in stage.nodes.senders),
        by_token=torch.cat(by_token).numpy(),
        by_source=torch.cat(by_source).numpy(),
        constants=tuple(constants[0]),
        constant_values=torch.cat([torch.stack([*each.values()], dim=1) for each in constants]).numpy(),
        logit_difference=torch.cat(logits).numpy(),
    )
    check_sum(model, view.by_sender, view.total, view.logit_difference)
    return view


@torch.no_grad()
def _shares(
    model: Model, images: Tensor, of: Float[Tensor, "image class"], sets: bool
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Shares `(image, sender, token)` by token and by source, constants, and the logits asked for."""
    run = capture(model, images)
    of, entropy = _within_sets(run.logits, of) if sets else (of, 0.0)
    weights, named = model.stages[-1].affine(run.stream(len(model.stages) - 1), of)
    by_token, by_source, constants = [], [], {}
    for place, stage in direct_stages(model):
        for part, compact in zip(stage.branches, stage.split(run.compacts[place]), strict=True):
            shares = torch.einsum("sitd,itd->ist", part.expand(compact), weights)
            by_token.append(shares)
            if part.nodes.kind == "attention":
                shares = _by_source(part, run, place, weights)
            elif not is_residual(part.nodes.writes_to):  # latents have no place among the tokens
                shares = shares.new_zeros(*shares.shape[:2], run.stream(1).shape[1])
            by_source.append(shares)
        if stage.constant is not None:
            constants[f"{stage.nodes.name}.bias"] = (weights * stage.constant).sum(dim=(1, 2))
    constants |= named
    if isinstance(entropy, Tensor):
        constants[ENTROPY] = entropy
    logits = (run.logits * of).sum(dim=1) + entropy
    return (
        torch.cat(by_token, dim=1).double().cpu(),
        torch.cat(by_source, dim=1).double().cpu(),
        {name: values.double().cpu() for name, values in constants.items()},
        logits.double().cpu(),
    )


def _within_sets(
    logits: Float[Tensor, "image class"], marked: Float[Tensor, "image class"]
) -> tuple[Float[Tensor, "image class"], Float[Tensor, " image"]]:
    """Weights of the logits that sum, with the entropies, to the log-odds of two sets: each class's
    probability among its set's in this run.
    """
    weights, entropy = torch.zeros_like(logits), torch.zeros_like(logits[:, 0])
    for sign in (1, -1):
        own = marked == sign
        if own.any():
            logs = logits.masked_fill(~own, -torch.inf).log_softmax(dim=1)
            weights += sign * logs.exp()
            entropy -= sign * (logs.exp() * logs.masked_fill(~own, 0.0)).sum(dim=1)
    return weights, entropy


def layer_of(nodes: StageNodes) -> int | str:
    """The number of a stage's layer; what a pool is called, for a pool's."""
    return nodes.layer if is_residual(nodes.writes_to) else nodes.writes_to


def direct_stages(model: Model) -> list[tuple[int, Stage]]:
    """The stages that write what the readout reads, and their places; behind a pool only the pool's own."""
    part = model.stages[-1].nodes.reads_from
    return [(place, stage) for place, stage in enumerate(model.stages[:-1]) if stage.nodes.writes_to == part]


def _by_source(
    stage: Stage, run: Capture, place: int, weights: Float[Tensor, "image token d_model"]
) -> Float[Tensor, "image head source"]:
    """Shares of heads by source token: pattern times what the token's value would write on its own."""
    reads = stage.read(run.stream(place))
    try:
        gain = stage.gain(reads)
    except UnsupportedModelError:
        return torch.full_like(stage.carried(reads)[..., 0], torch.nan)
    alone = stage.factored(stage.carried(reads))  # as if a head attended to one token only
    asked = torch.einsum("hkd,itd->ihtk", alone.weight, weights)
    said = torch.einsum("hisk,ihtk->ihts", alone.narrow, asked if gain is None else asked * gain[0])
    if gain is not None:  # rows of the pattern sum to 1, and share it out
        said += (asked * gain[1]).sum(dim=-1)[..., None]
    return (said * stage.pattern(reads)).sum(dim=2)


def check_sum(
    model: Model, shares: NDArray[np.float64], total: NDArray[np.float64], own: NDArray[np.float64]
) -> None:
    """Refuse shares whose sum is not what the model itself gives.

    Raises:
        UnsupportedModelError: saying by how much they are off.
    """
    scale = max(1.0, float(np.abs(shares).max()))
    off = float(np.abs(total - own).max())
    if not off <= TOLERANCE.get(model.dtype, 1e-3) * scale:
        raise UnsupportedModelError(
            f"the shares of {model.name} miss what it gives by {off:.2g}: its readout does something that is "
            "not linear and that this view does not know of"
        )


# -- the figure ----------------------------------------------------------------------------------


def _heads(senders: Sequence[str]) -> list[int]:
    """The places of the attention heads among the senders."""
    return [place for place, name in enumerate(senders) if re.fullmatch(r"\w+\.h\d+", name)]


def _panels(title: str, sheet: Sheet, heads: int) -> tuple[Picture, Axes, Axes, Axes, list[Axes]]:
    """The figure, with room for bars, the map of the model, all parts' patches, and some heads'.

    Patches of an image stand beside the bars and beside each other, strips of frames below each other.
    """
    from circuitvit.views import canvas

    if sheet.frames > 1:
        _, high = canvas.proportions(sheet, 2.0, 8.0)
        below = (high + 0.35) * (1 + heads)
        figure = canvas.blank(9.2, 3.4 + below, title)
        halves = figure.subfigures(2, 1, height_ratios=[3.1, below], squeeze=False)
        bars, grid = halves[0, 0].subplots(1, 2, width_ratios=[1.15, 1])
        patches, *each = halves[1, 0].subplots(1 + heads, 1, squeeze=False)[:, 0]
        return figure, bars, grid, patches, each
    figure = canvas.blank(9.2, 3.9 + (2.0 if heads else 0.0), title)
    lines = figure.subfigures(2 if heads else 1, 1, height_ratios=[3.6, 2][: 1 + bool(heads)], squeeze=False)
    bars, grid, patches = lines[0, 0].subplots(1, 3, width_ratios=[1.15, 1, 1.05])
    each = list(lines[1, 0].subplots(1, heads, squeeze=False)[0]) if heads else []
    return figure, bars, grid, patches, each


def draw_bars(
    axes: Axes, names: Sequence[str], shares: NDArray[np.float64], whole: float, called: str
) -> None:
    """The strongest shares as bars, the others as one, and the whole with what it is called."""
    from circuitvit.views import canvas

    order = np.argsort(-np.abs(shares), kind="stable")
    bars = [(names[place], float(shares[place])) for place in order[:LISTED]]
    if len(rest := order[LISTED:]):
        bars.append((f"{len(rest)} others", float(shares[rest].sum())))
    bars.append((called, whole))
    values = [value for _, value in bars]
    colours = [COLOURS["supports" if value > 0 else "opposes"] for value in values[:-1]]
    drawn = axes.barh(range(len(bars)), values, color=[*colours, INK], height=0.72)
    digits = canvas.decimals(max(map(abs, values)), 2)
    axes.bar_label(drawn, [f"{value:+.{digits}f}" for value in values], padding=2, fontsize=6.5)
    axes.axvline(0, color=MUTED, linewidth=0.6)
    axes.axhline(len(bars) - 1.5, color=MUTED, linewidth=0.5)
    axes.set_yticks(range(len(bars)), [canvas.label(name) for name, _ in bars], color=INK)
    axes.invert_yaxis()
    low, high = min(0.0, *values), max(0.0, *values)
    room = 0.2 * (high - low)
    axes.set_xlim(low - (room if low < 0 else 0.0), high + (room if high > 0 else 0.0))
    axes.tick_params(axis="y", length=0)
    axes.set_title("strongest parts")


def draw_model(
    axes: Axes, senders: Sequence[str], of: Sequence[int | str], shares: NDArray[np.float64], unit: str
) -> None:
    """Shares of senders in the layers that they are `of`, as a map of layers by heads."""
    from circuitvit.views import canvas

    layers = list(dict.fromkeys(of))
    heads = {layer: [place for place in _heads(senders) if of[place] == layer] for layer in layers}
    width = max(map(len, heads.values()), default=0)
    table = np.full((len(layers), width + 1), np.nan)
    for row, layer in enumerate(layers):
        table[row, : len(heads[layer])] = shares[heads[layer]]
        for name in {f"m{layer}", f"{layer}.mlp"}.intersection(senders):
            table[row, width] = shares[senders.index(name)]
    names = [f"h{head}" if width <= 6 else str(head) if head % 3 == 0 else "" for head in range(width)]
    colours, norm = canvas.signed_colours(), canvas.even_norm(table)
    drawn = canvas.model_map(axes, table, layers, names, cmap=colours, norm=norm)
    axes.set_title("by layer and head")
    axes.figure.colorbar(drawn, ax=axes, shrink=0.7, label=unit)


def _draw_patches(
    axes: Axes, values: NDArray[np.float64], picture: NDArray[np.uint8] | None, title: str, sheet: Sheet
) -> None:
    """Patches as opaque as they matter, or all of them where no image lies behind."""
    from circuitvit.views import canvas

    norm = canvas.even_norm(values, 0.985)
    weight = 0.15 + 0.75 * np.sqrt(np.clip(np.abs(values) / norm.vmax, 0, 1))
    opacity = 1.0 if picture is None else weight
    look: dict[str, Any] = {"cmap": canvas.signed_colours(), "norm": norm, "alpha": opacity}
    drawn = canvas.overlay(axes, values, picture, sheet=sheet, **look)
    axes.set_title(title)
    axes.figure.colorbar(drawn, ax=axes, shrink=0.7, extend="both")
