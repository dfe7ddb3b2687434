"""Registers, and patches that act as such: which heads read them, who writes them, what breaks without.

A register is a token that stands for no part of the image, so that a model has somewhere to keep what it
works out. Models without any make their own: in middle layers a few patches of low information take on a norm
many times that of the others and hold what is true of the whole image (Darcet et al. 2024, "Vision
Transformers Need Registers", arXiv:2309.16588; Sun et al. 2024, "Massive Activations in Large Language
Models", arXiv:2402.17762).

**Outliers** are patches whose norm in the stream exceeds, at one position of the stream, both `times` its
median over all patches of all images and the median by `z` robust standard deviations (1.4826 times the
median absolute deviation). A threshold always finds the end of a tail, so it is also said how many patches
lie within 10 % of it for each outlier: 0 where outliers are a group of their own, 1 or more where they are
but a tail.

**Read**: the share of attention that the class token, and that ordinary patches, pay to these tokens; and the
same with each key's attention weighted by the length of what its value adds, as heads may rest where values
are short.

**Written**: the mean length of what a node writes at these tokens, beside ordinary patches; and its push, the
share of the tokens' length at the chosen position of the stream which lies in what the node wrote: with the
constants (biases of the attention outputs) the pushes sum to 1.

**Broken**: what `token_ablations` says of losing them at that position: nobody attends to them from there on,
or each is its mean over images, that of another image, or 0. For outliers the same is done to as many random
other patches of the same images. Means and shuffles are by place: where outliers stay in their places, as
corners, that keeps that they are outliers and loses what is of *this* image; where they move, it makes them
ordinary patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import Capture, capture, progress_bar
from circuitvit.errors import (
    DataError,
    ModelError,
    OptionError,
    UnsupportedModelError,
    check_number,
    counted,
    unknown_name,
)
from circuitvit.export.style import COLOURS
from circuitvit.graph import is_residual
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.models.families.family import Grid
from circuitvit.models.sites import stream_names
from circuitvit.models.tokens import PATCH
from circuitvit.tasks.images import Images
from circuitvit.tasks.sentences import refuse_sentences
from circuitvit.tasks.task import batches_of
from circuitvit.views.attention import attention_places, attentions, weighted_pattern
from circuitvit.views.outcomes import FIGURES, Figure, MetricSpec, told
from circuitvit.views.subjects import ImageSpec, images_of
from circuitvit.views.tokens import TokenAblations, Way, token_ablations

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

QUERIES = ("cls", PATCH)
"""Who reads: the class token (of a pool: its latents), and patches that are not themselves meant."""

NEAR = 0.1
"""How near the threshold a norm is counted as near it."""

LISTED = 8
"""Heads and nodes in a table or a figure."""


@dataclass(frozen=True, eq=False, repr=False)
class Registers(Result):
    """Registers, or outlier patches, of a model on images. NaN where there is nothing to be averaged.

    Attributes:
        of: "registers" or "outliers": the tokens that heads, nodes and removals speak of.
        images: names.
        grid: rows and columns of patches; of clips with time first.
        kinds: of the tokens.
        positions: of the stream: "resid0" ... "residL".
        norms: of every token at every position, `(image, position, token)`, float32.
        thresholds: the norm above which a patch is an outlier, `(position,)`.
        at: the position at which the tokens are looked at, and lost.
        special: the tokens in question, `(image, token)`.
        heads: names.
        attention: share that is paid to them, `(head, query)`, queries as `QUERIES`.
        weighted: the same, weighted by the lengths of values; NaN where that is no sum over keys.
        chance: share of all tokens that they are: what a head would pay that looks everywhere alike.
        nodes: names of the nodes that write to the stream, with "input".
        written: mean length of what each writes at these tokens, and at ordinary patches, `(node, 2)`.
        pushes: share of these tokens' length at `at` that each wrote, `(node,)`; NaN for what comes after.
        broken: what is lost without them, for sets of tokens called as `of`, and "random patches" beside
            outliers; None where there are none, or it was not asked for.
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
    attention: Float[NDArray[np.float64], "head 2"]
    weighted: Float[NDArray[np.float64], "head 2"]
    chance: float
    nodes: tuple[str, ...]
    written: Float[NDArray[np.float64], "node 2"]
    pushes: Float[NDArray[np.float64], " node"]
    broken: TokenAblations | None

    along = "images:image kinds:token positions:position heads:head nodes:node"
    may_be_nan = "thresholds attention weighted chance written pushes"

    def records(self) -> Iterator[Record]:
        """One row for each head and node: what it is (`kind`: "head" or "node"), its `name`, the share of
        the attention of the class token and of patches that goes to these tokens (`read_by_cls`,
        `read_by_patch`, of heads), and the mean length of what it writes there, at ordinary patches, and its
        share of these tokens' length (`written`, `written_elsewhere`, `push`, of nodes); None where it does
        not apply."""
        columns = ("read_by_cls", "read_by_patch", "written", "written_elsewhere", "push")
        for kind, names, figures in (
            ("head", self.heads, dict(zip(columns[:2], self.attention.T, strict=True))),
            ("node", self.nodes, dict(zip(columns[2:], (*self.written.T, self.pushes), strict=True))),
        ):
            for place, name in enumerate(names):
                found = {each: float(figures[each][place]) if each in figures else None for each in columns}
                yield {"kind": kind, "name": name, **found}

    def _check(self) -> None:
        if self.at not in self.positions or prod(self.grid) > len(self.kinds):
            raise OptionError(f"there is no position {self.at!r}, or there are fewer tokens than patches")

    @cached_property
    def outliers(self) -> Bool[NDArray[np.bool_], "image position token"]:
        """Which patches are outliers, at each position of the stream."""
        return np.asarray((self.norms > self.thresholds[:, None]) & (np.array(self.kinds) == PATCH))

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many outliers there are at each position, in all images, `(position,)`."""
        return np.asarray(self.outliers.sum(axis=(0, 2)))

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
        return np.asarray(found[len(self.kinds) - prod(self.grid) :].reshape(self.grid))

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
        return (*said, *(() if self.broken is None else self.broken.caveats))

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
        if self.broken is not None:
            lines.append(
                f"\nwithout them from {self.at} on: {', '.join(FIGURES[of] for of in _figures(self.broken))}"
            )
            for name, way in product(self.broken.tokens, self.broken.ways):
                found = (told(self.broken.estimate(name, way, of), of) for of in _figures(self.broken))
                lines.append(f"{name:<15} {way:<8} {'; '.join(found)}")
        return "\n".join(lines)

    def figure(self) -> Picture:
        """Norms by layer with the threshold, outliers on the grid, readers, writers, and what breaks without.

        Norms are counted by the logarithm, darker where there are more patches; an orange line is the
        threshold. The map of the model is the share of attention that patches pay. What breaks is the KL from
        the prediction as it is, or the change of the metric where there are no classes.
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
            histogram.set_xlim(edges[0], max(edges[-1], np.log10(self.thresholds).max() + 0.05))
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
                (breaks, *self._lost()),
            ):
                names, values = zip(*rows, strict=True) if rows else ((), ())
                axes.barh(range(len(names)), values, color=COLOURS["supports"], height=0.7)
                axes.set_yticks(range(len(names)), names, fontsize=6.5)
                axes.set_xlim(min(0.0, *values, 0.0), max(*values, 1.0 if axes is writes else 1e-3, 0.0))
                axes.invert_yaxis()
                axes.set_title(name if rows else f"{name}\n(there are none)")
                if not rows:
                    axes.set_xticks([])
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
            "broken": None if self.broken is None else _lost_of(self.broken),
            "caveats": list(self.caveats),
        }

    def __repr__(self) -> str:
        count = int(self.special.sum())
        return f"Registers({count} {self.of} at {self.at} in {counted(len(self.images), 'image')})"

    def _lost(self) -> tuple[list[tuple[str, float]], str]:
        """What breaks by set of tokens and way, and in what unit."""
        lost = self.broken
        if lost is None:
            return [], "without them"
        of: Literal["metric", "kl"] = "metric" if lost.outcomes.kl is None else "kl"
        rows = [
            (f"{name}: {way}", lost.estimate(name, way, of).value)
            for name, way in product(lost.tokens, lost.ways)
        ]
        return rows, f"without them: {'KL in nats' if of == 'kl' else 'change of the metric'}"

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
        if np.isfinite(table).any():
            figure.colorbar(drawn, ax=axes, shrink=0.8)
        else:
            axes.set_title("read by: share of patches' attention\n(there are none)")


@running
def registers(
    model: Model,
    images: ImageSpec,
    *,
    of: Literal["registers", "outliers"] | None = None,
    position: str | None = None,
    metric: MetricSpec | None = None,
    z: float = 6.0,
    times: float = 3.0,
    ways: Sequence[Way] | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> Registers:
    """Who reads and writes a model's registers, or patches of outlying norm, and what breaks without them.

    Images are read batch by batch, and only norms and means are kept.

    Args:
        model: from `load` or `wrap`, or edited.
        images: preprocessed `(image, channel, height, width)`, or paths.
        of: "registers" or "outliers"; by default registers where the model has any.
        position: of the stream at which the tokens are looked at, such as "resid8"; by default that with most
            outliers, and for registers the one in the middle.
        metric: that is to be lost, as for `token_ablations`: the logit of the predicted class by default;
            `cv.accuracy(PerPair(labels))` for accuracy.
        z: robust standard deviations from the median that outliers exceed.
        times: multiples of the median that they exceed.
        ways: how they are lost, as for `token_ablations`; `()` for not at all, which saves most of the time.
        seed: of shuffles and of the random patches to compare with.
        batch_size: images at once; 32 by default.
        progress: whether to show a bar.

    Raises:
        OptionError: if the model has no registers and those are asked for, or for other settings.
        DataError: for images that cannot be used, or a single one where others are asked for.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> found = cv.registers(model, catdog_pairs(4, seed=0).clean, progress=False)
        >>> found.of, found.norms.shape
        ('outliers', (4, 5, 37))
    """
    check_number("z", z)
    check_number("times", times)
    refuse_sentences(model.preprocessing, "registers are told by norms of patches")
    found = images_of(model, images)
    kinds = model.token_kinds(model.tokens_at(*found.shape[-2:]))
    grid, is_patch = model.grid_at(*found.shape[-2:]), np.array(kinds) == PATCH
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
    for way in ways or ():
        if way not in get_args(Way):
            raise unknown_name("way of losing tokens", way, get_args(Way))
    if len(found) < 2 and (ways is None or {"mean", "shuffle"} & set(ways)):
        raise DataError("a single image has no others to take tokens from: give at least 2, or ways=()")
    norms = _norms(model, found, places.values(), batch_size, progress)
    thresholds = _thresholds(norms[:, :, is_patch], z, times)
    beyond = (norms > thresholds[:, None]) & is_patch
    at = (
        position
        or list(places)[int(beyond.sum(axis=(0, 2)).argmax()) if of == "outliers" else len(places) // 2]
    )
    special = beyond[:, list(places).index(at)]
    if of == "registers":
        special = np.tile(np.array(kinds) == "reg", (len(found), 1))
    look = _Look(model, found, kinds, places[at], special)
    attention, (written, pushes) = look.means(batch_size, progress)
    broken = None
    if special.any() and (ways is None or len(ways)):
        sets: dict[str, Tensor | float] = {of: torch.from_numpy(special)}
        if of == "outliers":
            others = _others(special, is_patch, np.random.default_rng(seed))
            sets["random patches"] = torch.from_numpy(others)
        broken = token_ablations(
            model, found, sets, ways=ways, site=at, metric=metric, batch_size=batch_size, seed=seed,
            progress=progress,
        )  # fmt: skip
    return Registers(
        of=of,
        images=found.names,
        grid=grid,
        kinds=kinds,
        positions=tuple(places),
        norms=norms,
        thresholds=thresholds,
        at=at,
        special=special,
        heads=look.heads,
        attention=attention[..., 0],
        weighted=attention[..., 1],
        chance=float(special[special.any(axis=1)].mean()) if special.any() else float("nan"),
        nodes=look.nodes,
        written=written,
        pushes=pushes,
        broken=broken,
    )


# -- inside --------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Look:
    """What heads pay to some tokens, and what nodes write there, averaged over the images that have any.

    Attributes:
        place: of the stage that reads the stream at which the tokens are looked at.
        special: the tokens, `(image, token)`.
    """

    model: Model
    images: Images
    kinds: tuple[str, ...]
    place: int
    special: NDArray[np.bool_]

    @cached_property
    def reading(self) -> list[int]:
        """The attention stages whose keys are tokens."""
        stages = self.model.stages
        return [
            place for place in attention_places(self.model) if is_residual(stages[place].nodes.reads_from)
        ]

    @cached_property
    def writing(self) -> list[int]:
        """The stages whose nodes write to the tokens."""
        return [
            place
            for place, stage in enumerate(self.model.stages)
            if stage.nodes.senders and is_residual(stage.nodes.writes_to)
        ]

    @property
    def heads(self) -> tuple[str, ...]:
        parts = [part for place in self.reading for part in attentions(self.model, place)]
        return tuple(name for part in parts for name in part.nodes.senders)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(name for place in self.writing for name in self.model.stages[place].nodes.senders)

    @torch.no_grad()
    def means(
        self, batch_size: int | None, progress: bool
    ) -> tuple[NDArray[np.float64], tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Attention `(head, query, 2)`, plain and weighted; lengths `(node, 2)`, and pushes `(node,)`."""
        model, rows = self.model, 0
        is_patch = torch.tensor([kind == PATCH for kind in self.kinds], device=model.device)
        paid: list[Tensor] = [torch.zeros(0, len(self.heads), len(QUERIES), 2)]
        sums, counts = torch.zeros(len(self.nodes), 3, dtype=torch.float64), torch.zeros(2).double()
        with progress_bar(len(self.images), "readers and writers", progress) as bar:
            for batch in batches_of(model, self.images, batch_size):
                mask = torch.from_numpy(self.special[rows : rows + len(batch)]).to(model.device)
                rows += len(batch)
                bar.update(len(batch))
                if not mask.any():
                    continue
                some = mask.any(dim=1)
                run, mask = capture(model, batch[some]), mask[some]
                ordinary = is_patch & ~mask
                paid.append(torch.cat([self._read(run, place, mask, ordinary) for place in self.reading], 1))
                sums += torch.cat([self._wrote(run, place, mask, ordinary) for place in self.writing])
                counts += torch.stack([mask.sum(), ordinary.sum()]).cpu()
        later = [place >= self.place for place in self.writing for _ in model.stages[place].nodes.senders]
        written = (sums / torch.where(counts == 0, torch.nan, counts)[[0, 1, 0]]).numpy()
        written[later, 2] = np.nan
        return torch.cat(paid).nanmean(dim=0).double().numpy(), (written[:, :2], written[:, 2])

    def _read(
        self, run: Capture, place: int, mask: Tensor, ordinary: Tensor
    ) -> Float[Tensor, "image head query 2"]:
        """What the heads of a stage pay to the tokens."""
        found = []
        first = torch.tensor([kind == "cls" for kind in self.kinds], device=mask.device).expand_as(mask)
        for part in attentions(self.model, place):
            reads = part.read(run.stream(place))
            looks = [part.pattern(reads)]
            try:
                looks.append(weighted_pattern(part, reads))
            except UnsupportedModelError:
                looks.append(torch.full_like(looks[0], torch.nan))
            queries = [first, ordinary]
            if not is_residual(
                part.nodes.writes_to
            ):  # latents, which stand for the image as a class token does
                latents = mask.new_ones(len(mask), looks[0].shape[2])
                queries = [latents, ~latents]
            by_query = [torch.stack([_paid(look, mask, each) for look in looks], -1) for each in queries]
            found.append(torch.stack(by_query, dim=-2))
        return torch.cat(found, dim=1).float().cpu()

    def _wrote(self, run: Capture, place: int, mask: Tensor, ordinary: Tensor) -> Float[Tensor, "node 3"]:
        """Sums over tokens: lengths of what was written at the special and the ordinary ones, and pushes."""
        outputs = self.model.stages[place].expand(run.compacts[place])
        stream = run.stream(self.place)
        along = stream / stream.square().sum(dim=-1, keepdim=True)
        lengths, pushes = outputs.norm(dim=-1), (outputs * along).sum(dim=-1)
        parts = ((lengths, mask), (lengths, ordinary), (pushes, mask))
        return (
            torch.stack([(values * where).sum(dim=(1, 2)) for values, where in parts], dim=1).double().cpu()
        )


@torch.no_grad()
def _norms(
    model: Model, images: Images, places: Iterable[int], batch_size: int | None, progress: bool
) -> Float[NDArray[np.float32], "image position token"]:
    """The norm of every token in the streams that some stages read."""
    found = []
    with progress_bar(len(images), "norms of tokens", progress) as bar:
        for batch in batches_of(model, images, batch_size):
            run = capture(model, batch)
            found.append(torch.stack([run.stream(place).norm(dim=-1) for place in places], 1).float().cpu())
            bar.update(len(batch))
    norms = torch.cat(found)
    if bool((bad := ~norms.isfinite().all(dim=-1).all(dim=-1)).any()):
        name = images.names[int(bad.nonzero()[0])]
        raise ModelError(f"the stream is NaN or infinite on {name}: check the model's weights and the image")
    return norms.numpy()


def _thresholds(
    norms: Float[NDArray[np.float32], "image position patch"], z: float, times: float
) -> Float[NDArray[np.float64], " position"]:
    """The norm above which a patch is an outlier, at each position."""
    flat = norms.astype(np.float64).transpose(1, 0, 2).reshape(norms.shape[1], -1)
    median = np.median(flat, axis=1)
    spread = 1.4826 * np.median(np.abs(flat - median[:, None]), axis=1)
    return np.asarray(np.maximum(median + z * spread, times * median))


def _others(
    special: NDArray[np.bool_], is_patch: NDArray[np.bool_], rng: np.random.Generator
) -> Bool[NDArray[np.bool_], "image token"]:
    """As many other patches of each image, drawn at random; all others where there are fewer."""
    found = np.zeros_like(special)
    for row, mine in enumerate(special):
        free = np.flatnonzero(is_patch & ~mine)
        found[row, rng.choice(free, min(len(free), int(mine.sum())), replace=False)] = True
    return found


def _paid(
    pattern: Float[Tensor, "image head query key"],
    keys: Bool[Tensor, "image key"],
    queries: Bool[Tensor, "image query"],
) -> Float[Tensor, "image head"]:
    """Of what some queries pay, the share that goes to some keys; NaN where there are no such queries."""
    shares = (pattern * keys[:, None, None]).sum(dim=-1) / pattern.sum(dim=-1)
    return torch.where(queries[:, None], shares, torch.nan).nanmean(dim=-1)


def _ranked(names: Sequence[str], values: NDArray[np.float64]) -> list[tuple[str, float]]:
    known = [(name, float(value)) for name, value in zip(names, values, strict=True) if np.isfinite(value)]
    return sorted(known, key=lambda row: -row[1])


def _plain(values: NDArray[np.float64]) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]


def _shares(values: NDArray[np.float64]) -> str:
    known = [f"{name} {value:.1%}" for name, value in zip(QUERIES, values, strict=True) if np.isfinite(value)]
    return ", ".join(known) or "unknown"


def _figures(lost: TokenAblations) -> list[Figure]:
    return ["metric"] if lost.outcomes.kl is None else ["flips", "kl", "metric"]


def _lost_of(lost: TokenAblations) -> dict[str, Any]:
    rows = [
        {"tokens": name, "way": way, **{of: asdict(lost.estimate(name, way, of)) for of in _figures(lost)}}
        for name, way in product(lost.tokens, lost.ways)
    ]
    return {"metric": lost.outcomes.metric, "before": float(lost.outcomes.before.mean()), "lost": rows}
