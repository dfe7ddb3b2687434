"""Registers, and patches that act as such: which heads read them, who writes them, what breaks without.

A register is a token that stands for no part of the image, so that a model has somewhere to keep what it works
out. Models without any make their own: in middle layers a few patches of low information take on a norm many
times that of the others and hold what is true of the whole image (Darcet et al. 2024, "Vision Transformers Need
Registers", arXiv:2309.16588; Sun et al. 2024, "Massive Activations in Large Language Models", arXiv:2402.17762).

**Outliers** are patches whose norm in the stream exceeds, at one position of the stream, both `times` its median
over all patches of all images and the median by `z` robust standard deviations (1.4826 times the median absolute
deviation). A threshold always finds the end of a tail, so it is also said how many patches lie within 10 % of it
for each outlier: 0 where outliers are a group of their own, 1 or more where they are but a tail.

**Read**: the share of attention that the class token, and that ordinary patches, pay to these tokens; and the same
with each key's attention weighted by the length of what its value adds, as heads may rest where values are short.

**Written**: the mean length of what a node writes at these tokens, beside ordinary patches; and its push, the share
of the tokens' length at the chosen position of the stream which lies in what the node wrote: with the constants
(biases of the attention outputs) the pushes sum to 1.

**Broken**: what happens to the output when nobody else attends to them (`knock-out`, attention shared out among the
rest), or when at every layer's input they are `zero`, their `mean` over images, or those of another image
(`shuffled`). Zero takes the model where it never was, so it overstates; a mean keeps what is the same in every
image, and a shuffle asks for what is of *this* image. For outliers the same is done to as many random other
patches of the same images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.engine import Capture, capture, progress_bar
from circuitvit.errors import (
    DataError,
    OptionError,
    UnsupportedModelError,
    check_number,
    check_whole,
    counted,
    unknown_name,
)
from circuitvit.export.style import COLOURS
from circuitvit.graph import RESIDUAL
from circuitvit.models import Model, knock_out
from circuitvit.models.families.family import Grid
from circuitvit.models.sites import LATENT, PATCH, stream_names
from circuitvit.tasks import TokenGroups
from circuitvit.tasks.classes import class_indices
from circuitvit.tasks.images import Images
from circuitvit.tasks.metrics import ClassSpec, divergence
from circuitvit.tasks.task import BATCH, batches_of
from circuitvit.verification.statistics import Estimate, mean_interval, share_interval
from circuitvit.views.attention import attention_places, attentions, weighted_pattern
from circuitvit.views.subjects import ImageSpec, images_of

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

WAYS = ("knock-out", "zero", "mean", "shuffled")
"""How tokens are taken out."""

QUERIES = ("cls", PATCH)
"""Who reads: the class token (of a pool: its latents), and patches that are not among the tokens in question."""

NEAR = 0.1
"""How near the threshold a norm is counted as near it."""

LISTED = 8
"""Heads and nodes in a table or a figure."""


@dataclass(frozen=True)
class Removal:
    """What the output is without some tokens.

    Attributes:
        tokens: "registers", "outliers" or "random patches".
        way: one of `WAYS`.
        cosine: between the outputs with and without.
        agreement: share of images whose top class stays; None for a model without classes.
        kl: of the prediction without from the one with, in nats; None likewise.
        accuracy: share of images whose top class is the label; None without labels.
    """

    tokens: str
    way: str
    cosine: Estimate
    agreement: Estimate | None
    kl: Estimate | None
    accuracy: Estimate | None


@dataclass(frozen=True, eq=False, repr=False)
class Registers:
    """Registers, or outlier patches, of a model on images. NaN where there is nothing to be averaged.

    Attributes:
        of: "registers" or "outliers": the tokens that heads, nodes and removals speak of.
        images: names.
        grid: rows and columns of patches; of clips with time first.
        kinds: of the tokens.
        positions: of the stream: "resid0" ... "residL".
        norms: of every token at every position, `(image, position, token)`, float32.
        thresholds: the norm above which a patch is an outlier, `(position,)`.
        at: the position at which the tokens are looked at: of registers the last.
        special: the tokens in question, `(image, token)`.
        heads: names.
        attention: share that is paid to them, `(head, query)`, queries as `QUERIES`.
        weighted: the same, weighted by the lengths of values; NaN where that is no sum over keys.
        chance: share of all tokens that they are: what a head would pay that looks everywhere alike.
        nodes: names of the nodes that write to the stream, with "input".
        written: mean length of what each writes at these tokens, and at ordinary patches, `(node, 2)`.
        pushes: share of these tokens' length at `at` that each wrote, `(node,)`; NaN for what comes after.
        removals: what breaks without them; empty where there are none.
        accuracy: with nothing removed, on the images that removals are of; None without labels.
    """

    of: str
    images: tuple[str, ...]
    grid: Grid
    kinds: tuple[str, ...]
    positions: tuple[str, ...]
    norms: Float[NDArray[np.float32], "image position token"]
    thresholds: Float[NDArray[np.float64], " position"]
    at: str
    special: Bool[NDArray[np.bool_], "image token"]
    heads: tuple[str, ...]
    attention: Float[NDArray[np.float64], "head query"]
    weighted: Float[NDArray[np.float64], "head query"]
    chance: float
    nodes: tuple[str, ...]
    written: Float[NDArray[np.float64], "node 2"]
    pushes: Float[NDArray[np.float64], " node"]
    removals: tuple[Removal, ...]
    accuracy: Estimate | None

    @cached_property
    def outliers(self) -> Bool[NDArray[np.bool_], "image position token"]:
        """Which patches are outliers, at each position of the stream."""
        return (self.norms > self.thresholds[:, None]) & (np.array(self.kinds) == PATCH)

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many outliers there are at each position, in all images, `(position,)`."""
        return self.outliers.sum(axis=(0, 2))

    @property
    def near(self) -> Float[NDArray[np.float64], " position"]:
        """Patches within 10 % of the threshold for each outlier; NaN where there are none."""
        patches = self.norms[:, :, np.array(self.kinds) == PATCH] / self.thresholds[:, None]
        close = (np.abs(patches - 1) < NEAR).sum(axis=(0, 2))
        return np.where(self.counts > 0, close / np.maximum(self.counts, 1), np.nan)

    @property
    def where(self) -> Float[NDArray[np.float64], "*grid"]:
        """Share of images in which each patch is an outlier at `at`."""
        found = self.outliers[:, self.positions.index(self.at)].mean(axis=0)
        return found[len(self.kinds) - prod(self.grid) :].reshape(self.grid)

    def readers(self, query: str = PATCH, *, weighted: bool = False) -> list[tuple[str, float]]:
        """Heads by the share of attention that they pay to these tokens, the largest first.

        Raises:
            NameNotFoundError: if `query` is neither "cls" nor "patch".
        """
        if query not in QUERIES:
            raise unknown_name("kind of query", query, QUERIES)
        shares = (self.weighted if weighted else self.attention)[:, QUERIES.index(query)]
        return _ranked(self.heads, shares)

    def writers(self) -> list[tuple[str, float]]:
        """Nodes by their push: what share of these tokens' length they wrote, the largest first."""
        return _ranked(self.nodes, self.pushes)

    @property
    def caveats(self) -> tuple[str, ...]:
        """What to keep in mind with these numbers."""
        place = self.positions.index(self.at)
        said = []
        if not self.special.any():
            said.append("no patch is an outlier, so nothing is read, written or removed")
        elif self.of == "outliers" and self.near[place] > 0.5:
            said.append(
                f"{self.near[place]:.1f} patches for each outlier are within {NEAR:.0%} of the threshold at "
                f"{self.at}: a tail, and no group of its own"
            )
        if self.removals:
            said.append("zero overstates: the model has never seen such tokens. Compare mean and shuffled")
        if self.removals and len(self.images) < 20:
            said.append(f"{counted(len(self.images), 'image')}: intervals are wide")
        return tuple(said)

    def table(self) -> str:
        """Who reads, who writes, and what breaks, as text."""
        count, of_images = int(self.special.sum()), int(self.special.any(axis=1).sum())
        lines = [f"{count} {self.of} at {self.at}, in {of_images} of {counted(len(self.images), 'image')}"]
        if count:
            lines.append(f"\nread by (share of attention; looking everywhere alike: {self.chance:.1%})")
            best = np.argsort(-np.nan_to_num(self.attention).max(axis=1), kind="stable")[:LISTED]
            for head in best:
                one, two = (_shares(values[head]) for values in (self.attention, self.weighted))
                lines.append(f"{self.heads[head]:<10} {one}; weighted by values {two}")
            lines.append("\nwritten by (share of their length)")
            lines += [f"{name:<10} {share:+.1%}" for name, share in self.writers()[:LISTED]]
            lines.append("\nwithout them")
            lines += [f"{each.tokens:<15} {each.way:<10} {_said(each)}" for each in self.removals]
        return "\n".join(lines)

    def figure(self) -> Picture:
        """Norms by layer with the threshold, outliers on the grid, readers, writers, and what breaks without.

        Norms are counted by the logarithm, darker where there are more patches; an orange line is the
        threshold. The map of the model is the share of attention that patches pay; bars of removals are the
        share of images whose top class changes, or 1 - cosine for features.
        """
        from circuitvit.views import canvas

        with canvas.styled():
            title = f"{self.of.capitalize()} at {self.at}, {counted(len(self.images), 'image')}"
            figure = canvas.blank(10.5, 5.6, title)
            histogram, grid, reads, writes, breaks = canvas.panels(figure, 5, 3)
            patches = np.log10(self.norms[:, :, np.array(self.kinds) == PATCH].clip(min=1e-9))
            edges = np.linspace(patches.min(), patches.max() + 1e-6, 61)
            counts = np.stack([np.histogram(patches[:, at], edges)[0] for at in range(len(self.positions))])
            look: dict[str, Any] = {"cmap": canvas.rising_colours(), "aspect": "auto", "origin": "lower"}
            extent = (edges[0], edges[-1], -0.5, len(counts) - 0.5)
            histogram.imshow(np.log1p(counts), extent=extent, interpolation="nearest", **look)
            lines = np.arange(len(counts))
            histogram.plot(np.log10(self.thresholds), lines, color=COLOURS["opposes"], linewidth=1)
            histogram.set_xlim(edges[0], edges[-1])
            histogram.set_yticks(lines[::2], self.positions[::2])
            histogram.set(title="norms of patches; line: threshold", xlabel="log10 of the norm")
            flat = self.where.reshape(-1, self.grid[-1])
            canvas.overlay(
                grid, flat, None, cmap=canvas.rising_colours(), norm=canvas.scale(np.append(0, flat))
            )
            grid.set(title="outliers on the grid", xlabel=f"at most in {flat.max():.0%} of images")
            self._draw_readers(reads, figure)
            for axes, rows, name in (
                (writes, self.writers()[:LISTED], "written by: share of their length"),
                (
                    breaks,
                    self._broken(),
                    f"without them: {'top class changes' if self._chooses else '1 - cosine'}",
                ),
            ):
                names, values = zip(*rows, strict=True) if rows else ((), ())
                axes.barh(range(len(names)), values, color=COLOURS["supports"], height=0.7)
                axes.set_yticks(range(len(names)), names, fontsize=6.5)
                axes.invert_yaxis()
                axes.set_title(name if rows else f"{name}\n(there are none)")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything but the norms as plain data, for JSON; None for NaN."""
        heads = [
            {"head": name, "attention": _plain(self.attention[at]), "weighted": _plain(self.weighted[at])}
            for at, name in enumerate(self.heads)
        ]
        nodes = [
            {"node": name, "written": _plain(self.written[at]), "push": _plain(self.pushes[at : at + 1])[0]}
            for at, name in enumerate(self.nodes)
        ]
        return {
            "of": self.of,
            "at": self.at,
            "images": list(self.images),
            "tokens": [np.flatnonzero(row).tolist() for row in self.special],
            "positions": list(self.positions),
            "outliers": self.counts.tolist(),
            "thresholds": self.thresholds.tolist(),
            "near": _plain(self.near),
            "queries": list(QUERIES),
            "heads": heads,
            "chance": _plain(np.array([self.chance]))[0],
            "nodes": nodes,
            "removals": [asdict(each) for each in self.removals],
            "accuracy": None if self.accuracy is None else asdict(self.accuracy),
            "caveats": list(self.caveats),
        }

    def __repr__(self) -> str:
        count = int(self.special.sum())
        return f"Registers({count} {self.of} at {self.at} in {counted(len(self.images), 'image')})"

    @property
    def _chooses(self) -> bool:
        return any(each.agreement is not None for each in self.removals)

    def _broken(self) -> list[tuple[str, float]]:
        several = len({each.tokens for each in self.removals}) > 1
        return [
            (
                f"{each.tokens}, {each.way}" if several else each.way,
                1 - (each.cosine if each.agreement is None else each.agreement).value,
            )
            for each in self.removals
        ]

    def _draw_readers(self, axes: Any, figure: Picture) -> None:
        from circuitvit.views import canvas

        blocks = list(dict.fromkeys(name.rpartition(".")[0] for name in self.heads))
        rows = [
            [at for at, name in enumerate(self.heads) if name.rpartition(".")[0] == one] for one in blocks
        ]
        table = np.full((len(blocks), max(map(len, rows), default=1)), np.nan)
        for line, mine in enumerate(rows):
            table[line, : len(mine)] = self.attention[mine, QUERIES.index(PATCH)]
        norm = canvas.scale(np.append(0.0, np.nan_to_num(table)))
        drawn = axes.imshow(table, origin="lower", aspect="auto", cmap=canvas.rising_colours(), norm=norm)
        axes.set_yticks(range(len(blocks)), blocks)
        axes.set_xticks(range(table.shape[1]), [f"h{head}" for head in range(table.shape[1])])
        axes.set_title("read by: share of patches' attention")
        figure.colorbar(drawn, ax=axes, shrink=0.8)


def registers(
    model: Model,
    images: ImageSpec,
    *,
    of: Literal["registers", "outliers"] | None = None,
    position: str | None = None,
    labels: Sequence[ClassSpec] | None = None,
    z: float = 6.0,
    times: float = 3.0,
    ways: Sequence[str] = WAYS,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Registers:
    """Who reads and writes a model's registers, or patches of outlying norm, and what breaks without them.

    Images are read batch by batch, and only norms, logits and means are kept.

    Args:
        model: from `load` or `wrap`, or edited.
        images: preprocessed `(image, channel, height, width)`, or paths.
        of: "registers" or "outliers"; by default registers where the model has any.
        position: of the stream at which outliers are looked for, such as "resid8"; by default the one with
            most. For registers: up to where writers are counted; by default the last.
        labels: the class, or classes, of each image: gives accuracy.
        z: robust standard deviations from the median that outliers exceed.
        times: multiples of the median that they exceed.
        ways: how to take them out, of `WAYS`; empty for not at all, which saves most of the time.
        seed: of shuffles and of the random patches to compare with.
        batch_size: images run at once.
        progress: whether to show a bar.

    Raises:
        OptionError: if the model has no registers and those are asked for, or for other settings.
        DataError: for images that cannot be used, or another number of labels.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> found = cv.registers(model, catdog_pairs(4, seed=0).clean, ways=(), progress=False)
        >>> found.of, found.norms.shape
        ('outliers', (4, 5, 37))
    """
    check_number("z", z)
    check_number("times", times)
    check_whole("a seed", seed, 0)
    for way in ways:
        if way not in WAYS:
            raise unknown_name("way to take tokens out", way, WAYS)
    found = images_of(model, images)
    grid, count = model.grid_at(*found.shape[-2:]), model.tokens_at(*found.shape[-2:])
    kinds = model.token_kinds(count)
    of = of or ("registers" if "reg" in kinds else "outliers")
    if of not in ("registers", "outliers"):
        raise unknown_name("kind of token", of, ("registers", "outliers"))
    if of == "registers" and "reg" not in kinds:
        raise OptionError(f"{model.name} has no registers: of='outliers' looks for patches that act as such")
    places = {
        name: place for place, name in stream_names(model).items() if name.removeprefix("resid").isdecimal()
    }
    if position is not None and position not in places:
        raise unknown_name("position of the stream", position, tuple(places))
    if labels is not None and len(labels) != len(found):
        raise DataError(
            f"{counted(len(labels), 'label')} for {counted(len(found), 'image')}: give one for each"
        )
    wanted = None if labels is None else [set(class_indices(model, label)) for label in labels]
    rng = np.random.default_rng(seed)
    total = len(found) * (2 + len(ways) * (1 + (of == "outliers")))
    with progress_bar(total, of, progress, unit=model.preprocessing.what) as bar, torch.no_grad():
        norms, logits = [], []
        for batch in batches_of(model, found, batch_size):
            run = capture(model, batch)
            lengths = [run.stream(place).norm(dim=-1) for place in places.values()]
            norms.append(torch.stack(lengths, dim=1).float().cpu().numpy())
            logits.append(run.logits.float().cpu())
            bar.update(len(batch))
        lengths_, base = np.concatenate(norms), torch.cat(logits)
        thresholds = _thresholds(lengths_[:, :, np.array(kinds) == PATCH], z, times)
        beyond = (lengths_ > thresholds[:, None]) & (np.array(kinds) == PATCH)
        if of == "outliers":
            at = position or list(places)[int(beyond.sum(axis=(0, 2)).argmax())]
            special = beyond[:, list(places).index(at)]
        else:
            at = position or list(places)[-1]
            special = np.tile(np.array(kinds) == "reg", (len(found), 1))
        work = _Work(model, found, kinds, places, at, special, batch_size or BATCH)
        heads, nodes, attention, weighted, written, pushes = work.looked(bar)
        removals = [
            _removal(name, way, base[work.rows], now, model, wanted and [wanted[row] for row in work.rows])
            for name, mask in (
                (of, special),
                *([("random patches", _others(special, kinds, rng))] if of == "outliers" else []),
            )
            for way, now in work.without(mask, ways, of == "registers", rng, bar)
        ]
    own = wanted and len(work.rows) and [int(base[row].argmax()) in wanted[row] for row in work.rows]
    return Registers(
        of=of,
        images=found.names,
        grid=grid,
        kinds=kinds,
        positions=tuple(places),
        norms=lengths_,
        thresholds=thresholds,
        at=at,
        special=special,
        heads=heads,
        attention=attention,
        weighted=weighted,
        chance=float(special[work.rows].mean()) if len(work.rows) else float("nan"),
        nodes=nodes,
        written=written,
        pushes=pushes,
        removals=tuple(removals),
        accuracy=share_interval(own) if own else None,
    )


# -- inside --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Work:
    """Runs on the images that have the tokens in question.

    Attributes:
        places: of the stages that read the stream at each position.
        size: images at once.
    """

    model: Model
    images: Images
    kinds: tuple[str, ...]
    places: dict[str, int]
    at: str
    special: NDArray[np.bool_]
    size: int

    @property
    def rows(self) -> NDArray[np.int64]:
        """The images that have any."""
        return np.flatnonzero(self.special.any(axis=1))

    def _batches(self) -> Iterator[NDArray[np.int64]]:
        return (self.rows[start : start + self.size] for start in range(0, len(self.rows), self.size))

    def _taken(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        taken = torch.cat([self.images.take(int(row), int(row) + 1) for row in rows])
        return taken.to(self.model.device, self.model.dtype)

    def looked(self, bar: Any) -> tuple[tuple[str, ...], tuple[str, ...], *tuple[NDArray[np.float64], ...]]:
        """Names of heads and nodes; attention, weighted attention, lengths written, and pushes."""
        model = self.model
        stops = [
            place for place in attention_places(model) if model.stages[place].nodes.reads_from == RESIDUAL
        ]
        writing = [
            place
            for place, stage in enumerate(model.stages)
            if not stage.is_readout and stage.nodes.writes_to == RESIDUAL and stage.nodes.senders
        ]
        heads = tuple(
            name for place in stops for part in attentions(model, place) for name in part.nodes.senders
        )
        nodes = tuple(name for place in writing for name in model.stages[place].nodes.senders)
        reading: list[Tensor] = []
        sums, counts = torch.zeros(len(nodes), 3, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for rows in self._batches():
            run = capture(model, self._taken(rows))
            mask = torch.as_tensor(self.special[rows], device=model.device)
            ordinary = torch.tensor([kind == PATCH for kind in self.kinds], device=model.device) & ~mask
            reading.append(torch.cat([self._read(run, place, mask, ordinary) for place in stops], dim=1))
            sums += torch.cat([self._wrote(run, place, mask, ordinary) for place in writing])
            counts += torch.tensor([float(mask.sum()), float(ordinary.sum())])
            bar.update(len(rows))
        shares = torch.cat(reading).nanmean(dim=0) if reading else torch.full((len(heads), 2, 2), torch.nan)
        means = (sums / counts[[0, 1, 0]]).numpy()
        later = [name for place in writing if place >= self.places[self.at] for name in self._nodes(place)]
        means[[name in later for name in nodes], 2] = np.nan
        found = shares.double().cpu().numpy()
        return heads, nodes, found[..., 0], found[..., 1], means[:, :2], means[:, 2]

    def _nodes(self, place: int) -> tuple[str, ...]:
        return tuple(self.model.stages[place].nodes.senders)

    def _read(
        self, run: Capture, place: int, mask: Tensor, ordinary: Tensor
    ) -> Float[Tensor, "image head 2 2"]:
        """What one stage's heads pay to the tokens, by image: by query, plain and weighted."""
        found = []
        for part in attentions(self.model, place):
            reads = part.read(run.stream(place))
            pattern = part.pattern(reads)
            try:
                weighted = weighted_pattern(part, reads)
            except UnsupportedModelError:
                weighted = torch.full_like(pattern, torch.nan)
            latents = part.nodes.writes_to != RESIDUAL
            first = torch.tensor([kind == "cls" for kind in self.kinds], device=mask.device).expand_as(mask)
            queries = [mask.new_ones(len(mask), pattern.shape[2]), None] if latents else [first, ordinary]
            found.append(
                torch.stack(
                    [
                        torch.stack([_paid(values, mask, query) for values in (pattern, weighted)], dim=-1)
                        for query in queries
                    ],
                    dim=-2,
                )
            )
        return torch.cat(found, dim=1)

    def _wrote(self, run: Capture, place: int, mask: Tensor, ordinary: Tensor) -> Float[Tensor, "node 3"]:
        """Summed over tokens: lengths of what was written at the special and at the ordinary ones, and pushes."""
        outputs = self.model.stages[place].expand(run.compacts[place])
        stream = run.stream(self.places[self.at])
        along = stream / stream.square().sum(dim=-1, keepdim=True)
        lengths, pushes = outputs.norm(dim=-1), (outputs * along).sum(dim=-1)
        parts = ((lengths, mask), (lengths, ordinary), (pushes, mask))
        return (
            torch.stack([(values * where).sum(dim=(1, 2)) for values, where in parts], dim=1).double().cpu()
        )

    def without(
        self, mask: NDArray[np.bool_], ways: Sequence[str], fixed: bool, rng: np.random.Generator, bar: Any
    ) -> Iterator[tuple[str, Tensor]]:
        """The logits without the tokens of a mask, one way after the other.

        Args:
            mask: `(image, token)`.
            ways: of `WAYS`.
            fixed: whether they are the same tokens in every image, each with a mean of its own.
            rng: for shuffles.
            bar: of progress.
        """
        rows = self.rows
        usable = [way for way in ways if len(rows) and not (way == "shuffled" and len(rows) < 2)]
        since = 0 if fixed else list(self.places).index(self.at)
        names = list(self.places)[since:]
        means = self._means(mask, names, fixed) if "mean" in usable else {}
        order = rng.permutation(rows)
        partner = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))
        for way in usable:
            found = []
            for batch in self._batches():
                chosen = torch.as_tensor(mask[batch])
                groups = TokenGroups(("rest", "special"), chosen.long())
                edits: dict[str, Any]
                if way == "knock-out":
                    edits = dict.fromkeys(self._looks(names[0]), knock_out())
                elif way == "zero":
                    edits = {f"{name}@special": 0.0 for name in names}
                elif way == "mean":
                    edits = {f"{name}@special": means[name].expand(len(batch), -1, -1) for name in names}
                else:
                    edits = self._from_others(mask, batch, [partner[int(row)] for row in batch], names)
                edited = self.model.edit(edits, groups=groups)
                found.append(edited(self._taken(batch)).float().cpu())
                bar.update(len(batch))
            yield way, torch.cat(found)

    def _looks(self, first: str) -> list[str]:
        """The edits' names for what all others pay to the tokens, from a position of the stream on."""
        sites = (self.model.bare or self.model).all_sites
        start = next(site.stage for site in sites if site.name == first)
        pools = {site.name for site in sites if site.kind == "pattern" and site.node.startswith("pool.")}
        return [
            f"{site.name}@special->{LATENT if site.name in pools else 'rest'}"
            for site in sites
            if site.kind == "pattern" and site.stage >= start
        ]

    def _means(self, mask: NDArray[np.bool_], names: Sequence[str], fixed: bool) -> dict[str, Tensor]:
        """The mean of the tokens of a mask at each position, `(token, d_model)`: each token's own, or of all."""
        sums: dict[str, Tensor] = {}
        for batch in self._batches():
            run = capture(self.model, self._taken(batch))
            chosen = torch.as_tensor(mask[batch], device=self.model.device)[..., None]
            for name in names:
                part = (run.stream(self.places[name]) * chosen).double().sum(dim=0)
                sums[name] = sums.get(name, torch.zeros_like(part)) + part
        count = torch.as_tensor(mask[self.rows].sum(axis=0), device=self.model.device)[:, None]
        means = {
            name: total / count.clamp(min=1) if fixed else (total.sum(dim=0) / count.sum()).expand_as(total)
            for name, total in sums.items()
        }
        return {name: mean.to(self.model.dtype) for name, mean in means.items()}

    def _from_others(
        self, mask: NDArray[np.bool_], batch: NDArray[np.int64], others: Sequence[int], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The tokens of other images in the places of those of a batch; where those have fewer, again."""
        run = capture(self.model, self._taken(others))
        edits = {}
        for name in names:
            stream = run.stream(self.places[name])
            placed = torch.zeros_like(stream)
            for at, (row, other) in enumerate(zip(batch, others, strict=True)):
                here, there = np.flatnonzero(mask[row]), np.flatnonzero(mask[other])
                placed[at, here] = stream[at, np.resize(there, len(here))]
            edits[f"{name}@special"] = placed
        return edits


def _thresholds(
    norms: Float[NDArray[np.float32], "image position patch"], z: float, times: float
) -> Float[NDArray[np.float64], " position"]:
    """The norm above which a patch is an outlier, at each position."""
    flat = norms.astype(np.float64).transpose(1, 0, 2).reshape(norms.shape[1], -1)
    median = np.median(flat, axis=1)
    spread = 1.4826 * np.median(np.abs(flat - median[:, None]), axis=1)
    return np.asarray(np.maximum(median + z * spread, times * median))


def _others(
    special: NDArray[np.bool_], kinds: Sequence[str], rng: np.random.Generator
) -> Bool[NDArray[np.bool_], "image token"]:
    """As many other patches of each image, drawn at random; all others where there are fewer."""
    found = np.zeros_like(special)
    for row, mine in enumerate(special):
        free = np.flatnonzero((np.array(kinds) == PATCH) & ~mine)
        found[row, rng.choice(free, min(len(free), int(mine.sum())), replace=False)] = True
    return found


def _paid(
    pattern: Float[Tensor, "image head query key"],
    keys: Bool[Tensor, "image key"],
    queries: Bool[Tensor, "image query"] | None,
) -> Float[Tensor, "image head"]:
    """Of what some queries pay, the share that goes to some keys; NaN where there are no such queries."""
    if queries is None:
        return pattern.new_full(pattern.shape[:2], torch.nan)
    shares = (pattern * keys[:, None, None]).sum(dim=-1) / pattern.sum(dim=-1)
    asked = queries[:, None].to(shares.dtype)
    return torch.where(queries[:, None], shares, 0.0).sum(dim=-1) / asked.sum(dim=-1)


def _removal(
    tokens: str, way: str, base: Tensor, now: Tensor, model: Model, labels: Sequence[set[int]] | None
) -> Removal:
    cosine = torch.nn.functional.cosine_similarity(base.double(), now.double(), dim=-1)
    tops = now.argmax(dim=-1)
    hits = None if labels is None else [int(top) in own for top, own in zip(tops, labels, strict=True)]
    return Removal(
        tokens,
        way,
        mean_interval(cosine.numpy()),
        share_interval((tops == base.argmax(dim=-1)).numpy()) if model.chooses else None,
        mean_interval(divergence(base.double(), now.double()).numpy()) if model.chooses else None,
        None if hits is None else share_interval(hits),
    )


def _ranked(names: Sequence[str], values: NDArray[np.float64]) -> list[tuple[str, float]]:
    known = [(name, float(value)) for name, value in zip(names, values, strict=True) if np.isfinite(value)]
    return sorted(known, key=lambda row: -row[1])


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _shares(values: NDArray[np.float64]) -> str:
    known = [f"{name} {value:.1%}" for name, value in zip(QUERIES, values, strict=True) if np.isfinite(value)]
    return ", ".join(known) or "unknown"


def _said(removal: Removal) -> str:
    parts = []
    if removal.agreement is not None and removal.kl is not None:
        parts += [f"same top class {removal.agreement.value:.1%}", f"KL {removal.kl.value:.3f} nats"]
    else:
        parts.append(f"cosine {removal.cosine.value:.3f}")
    if removal.accuracy is not None:
        parts.append(f"accuracy {removal.accuracy.value:.1%}")
    return ", ".join(parts)
