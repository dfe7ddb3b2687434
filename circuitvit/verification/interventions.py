"""Activation patching: which head, MLP, layer or attention pattern, at which tokens, moves the decision.

`patching_map` patches every component at every set of tokens; `flip_search` lists the single patches after
which the model sees another class.

Each cell of a map is one run: the component's activity at the tokens of its column is replaced by what it was
on the paired corrupt image, and the rest of the model goes on from there. (For a denoising task: clean
activity in the corrupt run.)

    >>> import circuitvit as cv
    >>> from circuitvit.datasets.catdog import catdog_pairs
    >>> model = cv.load("catdog-tiny")
    >>> task = cv.Task(*catdog_pairs(2), metric=cv.logit_diff("cat", "dog"))
    >>> found = patching_map(model, task, "mlps", tokens="kind", progress=False)
    >>> found.rows, found.columns, found.values.shape
    (('m0', 'm1', 'm2', 'm3'), ('all', 'cls', 'patch'), (4, 3, 2))

Heimersheim and Nanda 2024, "How to use and interpret activation patching", arXiv:2404.15255.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._keywords import running
from circuitvit.engine import (
    BatchRun,
    Capture,
    Site,
    batch_runs,
    capture,
    choose_batch_size,
    patch_pattern,
    patch_sender,
    patch_stream,
    progress_bar,
    token_parts,
)
from circuitvit.errors import DataError, FileError, OptionError, counted
from circuitvit.graph import RESIDUAL, is_residual, notebook
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.models.tokens import token_name
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.tasks.classes import class_label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SITES: tuple[Site, ...] = ("heads", "mlps", "stream", "patterns")

TokenSets = Literal["each", "kind", "all"] | Mapping[str, Sequence[int]]
"""Which tokens are patched together: each alone, all and each kind, all, or named sets of token numbers."""

MOST_LABELS = 40
"""More names than this cannot be read on one axis of a heat map; every so many are shown."""

IN_NOTEBOOK = 100
"""Dots per inch of the picture in a notebook."""

SHOWN = 5
"""Flips that are listed in a sentence, and narrowed down."""

Run = Callable[[BatchRun, Capture, Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class PatchingMap(Result):
    """The metric and the top class under every patch.

    Attributes:
        site: "heads", "mlps", "stream" or "patterns".
        rows: names of what is patched, such as `a3.h1`, `m2`, or `before a3` for the residual stream.
        columns: names of the token sets.
        tokens: the tokens of each column.
        values: the metric, `(row, column, pair)`.
        tops: index of the top class, `(row, column, pair)`; -1 throughout for a model without classes.
        base: the metric without a patch, `(pair,)`.
        base_tops: the top class without a patch, `(pair,)`.
        other: the metric of the run that activity comes from, `(pair,)`.
        other_tops: its top class, `(pair,)`.
        label: of the metric.
    """

    site: Site
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    values: Float[NDArray[np.float64], "row column pair"]
    tops: Int64[NDArray[np.int64], "row column pair"]
    base: Float[NDArray[np.float64], " pair"]
    base_tops: Int64[NDArray[np.int64], " pair"]
    other: Float[NDArray[np.float64], " pair"]
    other_tops: Int64[NDArray[np.int64], " pair"]
    label: str = ""

    along = "rows:row columns:column tokens:column"

    @property
    def effect(self) -> Float[NDArray[np.float64], "row column"]:
        """Mean change of the metric, in its units."""
        return np.asarray((self.values - self.base).mean(axis=-1))

    @property
    def share(self) -> Float[NDArray[np.float64], "row column"]:
        """Of the way to the other run, as a ratio of means: 0 for no change, 1 for all of it.

        Raises:
            DataError: if the two runs do not differ in the metric.
        """
        way = float((self.other - self.base).mean())
        if abs(way) <= 1e-6 * max(float(np.abs(self.base).max()), 1e-6):
            raise DataError("the two runs do not differ in the metric: there is no share of the way")
        return self.effect / way

    @property
    def flipped(self) -> Float[NDArray[np.float64], "row column"]:
        """Share of pairs whose top class is another one than without the patch."""
        return np.asarray((self.tops != self.base_tops).mean(axis=-1))

    def records(self) -> Iterator[Record]:
        """One row for each `component`, set of `tokens` and `pair` (its number): the `metric` with the
        patch, its `change`, and the `top_class` with the patch and `top_class_before`, as indices (-1: no
        classes)."""
        axes = {"component": self.rows, "tokens": self.columns, "pair": range(len(self.base))}
        before = np.broadcast_to(self.base_tops, self.tops.shape)
        change = self.values - self.base
        return cells(axes, metric=self.values, change=change, top_class=self.tops, top_class_before=before)

    def __repr__(self) -> str:
        row, column = np.unravel_index(int(np.abs(self.effect).argmax()), self.effect.shape)
        pairs = counted(len(self.base), "pair")
        size = f"{len(self.rows)} {self.site} at {len(self.columns)} sets of tokens, {pairs}"
        most = f"{self.rows[row]} at {self.columns[column]} {self.effect[row, column]:+.3g}"
        return f"PatchingMap({size}; the strongest {most} of {self.label})"

    def heat_map(self, path: str | Path) -> Path:
        """Draw the mean change of the metric by component and token set; the longer of both lies across.

        Purple is a fall and orange a rise; a dot marks a cell in which the top class changes for at least
        half of the pairs. The ending of the path chooses the format, such as `.png` or `.svg`.

        Raises:
            OptionError: if matplotlib is not installed, or the ending is no picture format.
            FileError: if the file cannot be written.
        """
        figure, path = self._drawn(), Path(path)
        undated = {"Date": None} if path.suffix == ".svg" else None
        try:
            with _any_glyph():
                figure.savefig(path, dpi=150, metadata=undated)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error
        except ValueError as error:
            raise OptionError(f"cannot draw {path.name}: {error}") from error
        return path

    def _drawn(self) -> Figure:
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise OptionError("heat maps need matplotlib: pip install 'circuitvit[plots]'") from error
        across = len(self.rows) > len(self.columns)
        effect, flipped = (each.T if across else each for each in (self.effect, self.flipped))
        down, along = (self.columns, self.rows) if across else (self.rows, self.columns)
        height, width = effect.shape
        figure = Figure(
            figsize=(min(16, max(6, 2.4 + 0.24 * width)), min(14, 2 + 0.24 * height)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        limit = float(np.abs(effect).max()) or 1.0
        image = axes.imshow(
            effect, cmap="PuOr_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        for row, column in np.argwhere(flipped >= 0.5):
            axes.plot(column, row, marker="o", color="black", markeredgecolor="white", markersize=5)
        for names, set_ticks in ((along, axes.set_xticks), (down, axes.set_yticks)):
            shown = range(0, len(names), max(1, -(-len(names) // MOST_LABELS)))
            set_ticks(list(shown), [names[at] for at in shown], fontsize=7)
        axes.tick_params(axis="x", rotation=90)
        axes.set_title(
            f"Patching {self.site}: change of {self.label} (dot: the top class changes)", fontsize=9
        )
        figure.colorbar(image, ax=axes).ax.tick_params(labelsize=7)
        return figure

    def _repr_html_(self) -> str:
        try:
            figure = self._drawn()
        except OptionError:  # without matplotlib a table will do
            return super()._repr_html_()
        file = io.BytesIO()
        with _any_glyph():
            figure.savefig(file, format="png", dpi=IN_NOTEBOOK)
        return notebook.card(repr(self), (), notebook.picture(file.getvalue(), repr(self)))


@running
def patching_map(
    model: Model,
    task: Task | PreparedTask,
    site: Site = "heads",
    tokens: TokenSets = "each",
    *,
    rows: Sequence[str] | None = None,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> PatchingMap:
    """Patch every component at every set of tokens, one at a time.

    Args:
        model: from `load` or `wrap`.
        task: with corrupt images; its ablation does not matter.
        site: "heads" or "mlps" (their outputs), "stream" (the residual stream before each stage), "patterns"
            (where a head looks: queries and keys of the other run, values its own).
        tokens: "each" token alone; "kind": all, and each kind; "all"; or named sets of token numbers.
        rows: only these rows.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        DataError: if the task has no corrupt images.
        OptionError: for an unknown site, token or row.
    """
    if site not in SITES:
        raise OptionError(f"what is patched is one of {', '.join(SITES)}, not {site!r}")
    prepared = prepare(model, task)
    if prepared.reference is None:
        raise DataError("activation patching takes what it patches from corrupt images: give corrupt=")
    runs = runs_of(model, site)
    if rows is not None:
        unknown = [row for row in rows if row not in runs]
        if unknown:
            raise OptionError(
                f"there is no {unknown[0]!r} among the {site}: {', '.join(list(runs)[:5])}, ..."
            )
        runs = {row: runs[row] for row in rows}
    sets = token_sets(model, prepared, tokens)
    size = batch_size or choose_batch_size(prepared, memory)
    found = patched(model, prepared, runs, sets, size, f"patching {site}", progress)
    shape = (len(runs), len(sets), len(prepared))
    return PatchingMap(
        site=site,
        rows=tuple(runs),
        columns=tuple(sets),
        tokens=tuple(tuple(np.flatnonzero(chosen.cpu().numpy()).tolist()) for chosen in sets.values()),
        values=found.metric[:-2].reshape(shape),
        tops=found.tops[:-2].reshape(shape),
        base=found.metric[-2],
        base_tops=found.tops[-2],
        other=found.metric[-1],
        other_tops=found.tops[-1],
        label=prepared.metric.label,
    )


class Patched(NamedTuple):
    """What runs with patches gave; the last two rows are the run without any, and the other run.

    Attributes:
        metric: `(run, pair)`; each run at all its token sets, then the next.
        tops: the top class, `(run, pair)`; -1 throughout for a model without classes.
    """

    metric: Float[NDArray[np.float64], "run pair"]
    tops: Int64[NDArray[np.int64], "run pair"]


def patched(
    model: Model,
    prepared: PreparedTask,
    runs: Mapping[str, Run],
    sets: Mapping[str, Tensor],
    batch_size: int,
    title: str,
    progress: bool,
) -> Patched:
    """Every run at every set of tokens, many pairs at once; both images of a pair are run whole once."""
    metrics, tops = [], []
    with progress_bar(len(runs) * len(sets) * len(prepared), title, progress) as bar:
        for batch in batch_runs(prepared, batch_size):
            assert batch.batch.reference is not None
            other = capture(model, batch.batch.reference)
            logits = []
            for run in runs.values():
                for chosen in sets.values():
                    logits.append(run(batch, other, chosen))
                    bar.update(len(batch.batch.rows))
            stacked = torch.stack([*logits, batch.base.logits, other.logits])
            metrics.append(batch.metric(stacked).double().cpu())
            top = stacked.argmax(dim=-1) if model.chooses else torch.full(stacked.shape[:-1], -1)
            tops.append(top.cpu())
    return Patched(torch.cat(metrics, dim=1).numpy(), torch.cat(tops, dim=1).numpy())


@dataclass(frozen=True)
class Flip:
    """One component whose patching changes the top class.

    Attributes:
        node: such as `a11.h1`.
        tokens: name of the token set that was patched.
        share: of pairs whose top class changes.
        becomes: the classes that they change to, most frequent first.
        value: mean metric with the patch.
        switched: share of pairs that become what the other image is seen as: the decision itself has moved.
        fewest: on a single pair, a small set of tokens that is enough, else empty.
    """

    node: str
    tokens: str
    share: float
    becomes: tuple[str, ...]
    value: float
    switched: float = 0.0
    fewest: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False, repr=False)
class FlipSearch(Result):
    """What the search found: every flip, or that there is none, and the map that it was read from.

    Attributes:
        flips: strongest first (most pairs flipped, then the largest change of the metric).
        map: all components at all token sets.
        n: how many pairs.
        start: the classes that the model sees without a patch, most frequent first.

    Example:
        >>> search = flip_search(model, task)  # doctest: +SKIP
        >>> print(search)  # doctest: +SKIP
        No single one of 36 heads flips the decision ...
    """

    flips: tuple[Flip, ...]
    map: PatchingMap
    n: int
    start: tuple[str, ...]

    def records(self) -> Iterator[Record]:
        """One row for each flip, the strongest first: `node` and `tokens`, the `share` of pairs that flip,
        what it most often `becomes`, the mean `metric`, the share `switched` to what the other image is seen
        as, and how many tokens are enough (`fewest_tokens`, None where that was not looked for)."""
        for flip in self.flips:
            yield {
                "node": flip.node,
                "tokens": flip.tokens,
                "share": flip.share,
                "becomes": flip.becomes[0] if flip.becomes else None,
                "metric": flip.value,
                "switched": flip.switched,
                "fewest_tokens": len(flip.fewest) or None,
            }

    def _check(self) -> None:
        if not self.start:
            raise OptionError("it has no class to start from")

    def __repr__(self) -> str:
        first = "".join(f", the strongest {each.node} at {each.tokens}" for each in self.flips[:1])
        flips = f"{counted(len(self.flips), 'flip')} on {counted(self.n, 'pair')}{first}"
        return f"FlipSearch({flips}; {self.map!r})"

    def heat_map(self, path: str | Path) -> Path:
        """Draw the map. See `PatchingMap.heat_map`."""
        return self.map.heat_map(path)

    def _repr_html_(self) -> str:
        return notebook.card(str(self), ()) + self.map._repr_html_()

    def __str__(self) -> str:
        site, effect = self.map.site, self.map.effect
        on = "the pair" if self.n == 1 else f"any of {self.n} pairs"
        if not self.flips:
            row, column = np.unravel_index(int(np.abs(effect).argmax()), effect.shape)
            base, other = float(self.map.base.mean()), float(self.map.other.mean())
            return (
                f"None of {len(self.map.rows)} {site}, patched alone, flips the decision ({self.start[0]}) "
                f"on {on}. The strongest is {self.map.rows[row]} at {self.map.columns[column]}: "
                f"{self.map.label} goes from {base:.3g} to {base + effect[row, column]:.3g} "
                f"(the other image: {other:.3g})."
            )
        said = [
            f"{each.node} at {each.tokens} ({each.share:.0%} of pairs, to {', '.join(each.becomes[:2])}"
            + (
                f"; {counted(len(each.fewest), 'token')} {'is' if len(each.fewest) == 1 else 'are'} enough"
                if each.fewest
                else ""
            )
            + ")"
            for each in self.flips[:SHOWN]
        ]
        more = f", and {len(self.flips) - SHOWN} more" if len(self.flips) > SHOWN else ""
        switching = [f"{each.node} at {each.tokens}" for each in self.flips if each.switched > 0]
        all_the_way = (
            f"To what the other image is seen as: {', '.join(switching)}."
            if switching
            else "None makes the model see what it sees in the other image."
        )
        return (
            f"{len(self.flips)} patches of {site} change the top class ({self.start[0]}) on {on}: "
            f"{'; '.join(said)}{more}. {all_the_way}"
        )


@running
def flip_search(
    model: Model,
    task: Task | PreparedTask,
    *,
    site: Site = "heads",
    tokens: TokenSets = "kind",
    least: float = 0.0,
    narrow: bool = True,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> FlipSearch:
    """Patch every head at every set of tokens and list those that change the top class.

    On a single pair each flip is then narrowed down: of the tokens in the order of their own effect the first
    1, 2, 4, ... are patched until that flips the decision: a small set that is enough, not the smallest.

    Args:
        model: from `load` or `wrap`.
        task: with corrupt images.
        site: "heads", or another of `patching_map`.
        tokens: as for `patching_map`; by default all, and each kind of token.
        least: share of pairs above which a flip is listed.
        narrow: whether to look for few tokens on a single pair: one more run for every token of each flip.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        DataError, OptionError: as `patching_map`; also for a model without classes, where nothing can flip.
    """
    if not 0 <= least < 1:
        raise OptionError(f"the share of pairs to be exceeded lies between 0 and 1, not {least!r}")
    if not model.chooses:
        raise OptionError(
            f"{model.name} has no classes, so no decision can flip: patching_map() shows how the metric moves"
        )
    prepared = prepare(model, task)
    found = patching_map(
        model, prepared, site, tokens, batch_size=batch_size, memory=memory, progress=progress
    )
    flips = [_flip(model, found, int(row), int(column)) for row, column in np.argwhere(found.flipped > least)]
    flips.sort(key=lambda flip: (-flip.share, -abs(flip.value - float(found.base.mean()))))
    if len(prepared) == 1 and narrow:
        flips = _all_narrowed(model, prepared, flips, found, progress)
    return FlipSearch(tuple(flips), found, len(prepared), _labels(model, found.base_tops))


# -- inside --------------------------------------------------------------------------------------


@contextmanager
def _any_glyph() -> Iterator[None]:
    """A sign that no font has is drawn as a box, without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s)Glyph .* missing from")
        yield


def runs_of(model: Model, site: Site) -> dict[str, Run]:
    """How to patch each component of a site, by name."""
    found: dict[str, Run] = {}
    patch = patch_pattern if site == "patterns" else patch_sender
    for place, stage in enumerate(model.stages):
        if stage.is_source:
            continue
        if site == "stream":
            found[f"before {stage.nodes.name}"] = _patching(patch_stream, place)
        wanted = {"heads": "attention", "patterns": "attention", "mlps": "mlp"}.get(site)
        for sender, name in enumerate(stage.nodes.senders):
            if stage.nodes.kind_of(name) == wanted:
                found[name] = _patching(patch, place, sender)
    return found


def _patching(patch: Callable[..., Tensor], *where: int) -> Run:
    return lambda run, other, tokens: patch(run.sources.model, run.base, other, *where, tokens)


def token_sets(model: Model, prepared: PreparedTask, tokens: TokenSets) -> dict[str, Tensor]:
    """The sets of tokens by name, as masks `(token,)`."""
    bare = model.bare or model  # whose tokens are the same, whatever number of images edits are for
    parts = token_parts(bare, capture(bare, prepared.base.take(0, 1).to(model.device, model.dtype)))
    others = {part: mine for part, mine in parts.items() if not is_residual(part)}
    kinds = (*model.token_kinds(len(parts[RESIDUAL])), *(part for part, mine in others.items() for _ in mine))
    n = len(kinds)
    if tokens == "each":
        chosen: Mapping[str, Sequence[int]] = {token_name(kinds, token): [token] for token in range(n)}
    elif tokens in ("kind", "all"):
        chosen = {"all": range(n)}
        if tokens == "kind":
            chosen = {
                **chosen,
                **{kind: [at for at in range(n) if kinds[at] == kind] for kind in dict.fromkeys(kinds)},
            }
    elif isinstance(tokens, Mapping):
        chosen = tokens
    else:
        raise OptionError(f"tokens is 'each', 'kind', 'all' or named sets of token numbers, not {tokens!r}")
    return {name: _mask(name, members, n).to(model.device) for name, members in chosen.items()}


def _mask(name: str, members: Sequence[int], n: int) -> Tensor:
    if not len(members) or not all(0 <= token < n for token in members):
        raise OptionError(f"the token set {name!r} must hold numbers from 0 to {n - 1}, and at least one")
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(members)] = True
    return mask


def _flip(model: Model, found: PatchingMap, row: int, column: int) -> Flip:
    changed = found.tops[row, column] != found.base_tops
    return Flip(
        node=found.rows[row],
        tokens=found.columns[column],
        share=float(changed.mean()),
        becomes=_labels(model, found.tops[row, column][changed]),
        value=float(found.values[row, column].mean()),
        switched=float((changed & (found.tops[row, column] == found.other_tops)).mean()),
    )


def _all_narrowed(
    model: Model, prepared: PreparedTask, flips: list[Flip], found: PatchingMap, progress: bool
) -> list[Flip]:
    """The strongest flips narrowed down; of a component's token sets only the smallest, to save runs."""
    size = {name: len(tokens) for name, tokens in zip(found.columns, found.tokens, strict=True)}
    smallest = {flip.node: flip for flip in sorted(flips, key=lambda flip: -size[flip.tokens])}
    chosen = [flip for flip in flips if smallest[flip.node] is flip][:SHOWN]
    return [_narrowed(model, prepared, flip, found, progress) if flip in chosen else flip for flip in flips]


def _narrowed(model: Model, prepared: PreparedTask, flip: Flip, found: PatchingMap, progress: bool) -> Flip:
    """The flip with a small set of tokens that is enough for it."""
    members = found.tokens[found.columns.index(flip.tokens)]
    if len(members) == 1:
        return replace(flip, fewest=(flip.tokens,))
    site = found.site
    row = [flip.node]
    single = patching_map(model, prepared, site, "each", rows=row, progress=progress)
    toward = np.sign(flip.value - float(found.base.mean())) * single.effect[0]
    order = [token for token in np.argsort(-toward, kind="stable").tolist() if token in members]
    counts = sorted({*(2**power for power in range(len(order).bit_length())), len(order)})
    grown = {str(count): order[:count] for count in counts}
    steps = patching_map(model, prepared, site, grown, rows=row, progress=progress)
    first = np.flatnonzero(steps.flipped[0] > 0)
    if not len(first):
        return flip
    return replace(flip, fewest=tuple(single.columns[token] for token in order[: counts[int(first[0])]]))


def _labels(model: Model, tops: np.ndarray) -> tuple[str, ...]:
    classes, counts = np.unique(tops, return_counts=True)
    order: Sequence[int] = np.argsort(-counts, kind="stable").tolist()
    return tuple(class_label(model, int(classes[place])) for place in order)
