"""The decider head, in general: which heads and MLPs flip the answer of how many pairs, and whether the one
that decides the first photograph decides the others.

`flip_search` says of one pair which single patch makes the model see another class. That a head did so once
is an anecdote: with 36 heads tried, some head flips something. `deciders` patches every candidate in many
pairs and asks three questions.

**How often?** The share of pairs that each candidate flips, with the exact interval of Clopper and Pearson.
Intervals are of each candidate alone. Of many candidates the best looks better than it is, so each also has a
p-value for the whole family: candidates change names within each pair at random, which keeps how many flip
each pair and forgets which, and the p-value is how often the best of them then does as well (the maximum
statistic of Westfall and Young 1993, "Resampling-Based Multiple Testing").

**Does it carry over?** The *decider* of a pair is, of the candidates that flip it, the one that moves the
metric farthest towards the other image. `transfer` is the share of the other pairs that it flips, averaged
over pairs; `chance` is that of a candidate drawn at random.

**Do pairs agree?** Spearman's correlation of what the candidates do to one pair with the mean of what they do
to all others.

What is patched is what the candidate wrote in the paired run, at the same tokens, so nothing is said of pairs
that are told apart by many heads together: no single one flips them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from scipy import stats

from circuitvit._keywords import running
from circuitvit.engine import Site, choose_batch_size
from circuitvit.errors import DataError, OptionError, counted, unknown_name
from circuitvit.graph.results import Record, Result, cells
from circuitvit.models import Model
from circuitvit.tasks import PreparedTask, Task, prepare
from circuitvit.verification.interventions import Run, TokenSets, patched, runs_of, token_sets
from circuitvit.verification.statistics import Bootstrap, Estimate, mean_interval, rank_p, share_interval

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

FlipBy = Literal["sign", "top"]

PATCHED: tuple[Site, ...] = ("heads", "mlps", "patterns")
"""What can be a candidate; the stream before a stage is no component."""

DRAWS = 1000
"""Random namings of the candidates that p-values are read from."""

LISTED = 10
"""Candidates in a table."""


@dataclass(frozen=True, eq=False, repr=False)
class DeciderHeads(Result):
    """Which patch flips which pair.

    Only pairs that the model gets right without a patch are here: on the others there is no answer to flip.

    Attributes:
        names: of the candidates: `a11.h0`, `m3`, `a5.h2.pattern`; at a set of tokens `a11.h0@cls`.
        places: layer and head of each for a map, such as (11, 0); head -1 for an MLP.
        tokens: the token set that each is patched at.
        pairs: names of the pairs.
        left_out: names of the pairs that the model does not tell apart without a patch.
        flips: whether the answer changes, `(candidate, pair)`.
        changes: of the metric, `(candidate, pair)`, in its units.
        base: the metric without a patch, `(pair,)`.
        other: that of the run which activity comes from, `(pair,)`.
        by: "sign" where the metric's sign is the answer, "top" where the top class is.
        label: of the metric.
        seed: of intervals and of random namings.
    """

    names: tuple[str, ...]
    places: tuple[tuple[int | str, int], ...]
    tokens: tuple[str, ...]
    pairs: tuple[str, ...]
    left_out: tuple[str, ...]
    flips: Bool[NDArray[np.bool_], "candidate pair"]
    changes: Float[NDArray[np.float64], "candidate pair"]
    base: Float[NDArray[np.float64], " pair"]
    other: Float[NDArray[np.float64], " pair"]
    by: FlipBy
    label: str
    seed: int = 0

    along = "names:candidate places:candidate tokens:candidate pairs:pair"

    def records(self) -> Iterator[Record]:
        """One row for each `candidate` and `pair`: whether it `flips` the answer, the `change` of the
        metric, and the metric without a patch (`before`) and in the other run (`other`)."""
        each = {"before": self.base, "other": self.other}
        wide = {name: np.broadcast_to(values, self.flips.shape) for name, values in each.items()}
        axes = {"candidate": self.names, "pair": self.pairs}
        return cells(axes, flips=self.flips, change=self.changes, **wide)

    @property
    def toward(self) -> Float[NDArray[np.float64], "candidate pair"]:
        """The change of the metric towards the other run: positive where a patch speaks for its image."""
        return self.changes * np.sign(self.other - self.base)

    @cached_property
    def rates(self) -> tuple[Estimate, ...]:
        """The share of pairs that each candidate flips, with its interval; none with fewer than 5 pairs."""
        return tuple(share_interval(row) for row in self.flips)

    @cached_property
    def p_values(self) -> Float[NDArray[np.float64], " candidate"]:
        """Of each rate, for all candidates together: how often the best of random ones does as well."""
        return np.array([rank_p(rate, self._drawn[0]) for rate in self.flips.mean(axis=1)])

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Candidates by how many pairs they flip, then by how far they move the metric towards the other."""
        return tuple(np.lexsort((-self.toward.mean(axis=1), -self.flips.mean(axis=1))).tolist())

    @cached_property
    def deciders(self) -> Int64[NDArray[np.int64], " pair"]:
        """The candidate that decides each pair, as a place among `names`; -1 where none flips it."""
        return _deciders(self.flips, self.toward)

    def decider(self, pair: int = 0) -> str | None:
        """The name of the candidate that decides a pair; None where none flips it.

        Raises:
            OptionError: if there is no such pair.
        """
        found = int(self.deciders[self._pair(pair)])
        return None if found < 0 else self.names[found]

    def transfer_of(self, pair: int = 0) -> Estimate:
        """Of the other pairs the share that is flipped by the candidate which decides this one.

        Raises:
            DataError: if none decides it, or there is no other pair.
        """
        place = self._pair(pair)
        if self.deciders[place] < 0:
            raise DataError(f"no single candidate flips {self.pairs[place]}, so none decides it")
        if len(self.pairs) < 2:
            raise DataError("there is no other pair to carry over to")
        return share_interval(np.delete(self.flips[self.deciders[place]], place))

    @property
    def transfer(self) -> float:
        """The mean of that over all pairs that are decided by one candidate; NaN where there are none."""
        return _transfer(self.flips, self.deciders)

    @property
    def transfer_p(self) -> float:
        """How often deciders carry over as well when candidates are named at random within each pair."""
        return rank_p(self.transfer, self._drawn[1]) if np.isfinite(self.transfer) else 1.0

    @property
    def chance(self) -> float:
        """The share of pairs that a candidate drawn at random flips."""
        return float(self.flips.mean())

    @property
    def best_of_others(self) -> Estimate:
        """The share of pairs flipped by the candidate that flips most of the *other* pairs."""
        rest = self.flips.sum(axis=1, keepdims=True) - self.flips
        moved = self.toward.sum(axis=1, keepdims=True) - self.toward
        best = [np.lexsort((-moved[:, pair], -rest[:, pair]))[0] for pair in range(len(self.pairs))]
        return share_interval(self.flips[best, np.arange(len(self.pairs))])

    @cached_property
    def agreement(self) -> Estimate:
        """Spearman's correlation of the candidates' changes of one pair with their mean over the others.

        1 where candidates rank alike in every pair, 0 where pairs have nothing in common. The correlations
        share the pairs that they are means of, so their interval is somewhat too narrow.

        Raises:
            DataError: if there are fewer than two pairs or three candidates.
        """
        if len(self.pairs) < 2 or len(self.names) < 3:
            raise DataError("ranks are compared between at least 2 pairs, of at least 3 candidates")
        rest = self.toward.sum(axis=1, keepdims=True) - self.toward
        found = [
            float(stats.spearmanr(self.toward[:, pair], rest[:, pair]).statistic)
            if np.ptp(self.toward[:, pair]) > 0 < np.ptp(rest[:, pair])
            else 0.0
            for pair in range(len(self.pairs))
        ]
        return mean_interval(found, Bootstrap(seed=self.seed))

    @property
    def caveats(self) -> tuple[str, ...]:
        """What to keep in mind with these numbers."""
        n, undecided = len(self.pairs), int((self.deciders < 0).sum())
        said = [
            f"{counted(len(self.names), 'candidate')} were tried: an interval is of one candidate alone, and "
            "of the best it is too high; p is for all of them together"
        ]
        if self.left_out:
            said.append(
                f"{counted(len(self.left_out), 'pair')} left out, which the model does not tell apart"
            )
        if undecided:
            said.append(f"{undecided} of {counted(n, 'pair')} are flipped by no candidate alone")
        if n < 20:
            said.append(f"{counted(n, 'pair')} give wide intervals: 20 or more are better")
        return tuple(said)

    def table(self, most: int = LISTED) -> str:
        """The candidates that flip most, a line each."""
        lines = [f"{'candidate':<16} {'flips':>7}  {'95 % interval':<14} {'p':>6}  towards the other"]
        for place in self.order[:most]:
            rate, toward = self.rates[place], float(self.toward[place].mean())
            between = "" if rate.low is None or rate.high is None else f"{rate.low:.0%} to {rate.high:.0%}"
            p = self.p_values[place]
            lines.append(
                f"{self.names[place]:<16} {rate.value:>7.0%}  {between:<14} {p:>6.3f}  {toward:+.3f}"
            )
        return "\n".join(lines)

    def figure(self, *, most: int = 20) -> Picture:
        """Left: the share of pairs that each head and MLP flips, by layer; at the token set that flips most.
        Right: the candidates that flip most, by pair: how far they move the metric, a dot where they flip.

        Args:
            most: candidates on the right.
        """
        from circuitvit.views import canvas

        rates = self.flips.mean(axis=1)
        shown = list(self.order[:most])
        layers = list(dict.fromkeys(layer for layer, _ in self.places))
        n_heads = 1 + max((head for _, head in self.places), default=-1)
        where = self.tokens[shown[0]]
        table = np.full((len(layers), n_heads + 1), np.nan)
        for place, (layer, head) in enumerate(self.places):
            if self.tokens[place] == where:
                cell = layers.index(layer), head if head >= 0 else n_heads
                table[cell] = np.nanmax([table[cell], rates[place]])
        with canvas.styled():
            title = f"Which patch flips the answer? {self.label}, {counted(len(self.pairs), 'pair')}"
            high = max(2.6, 0.17 * max(len(shown), len(layers)) + 1.3)
            figure = canvas.blank(4.2 + 0.3 * n_heads + min(7.0, 0.09 * len(self.pairs) + 1.5), high, title)
            widths = [0.32 * (n_heads + 1) + 1, min(7.0, 0.09 * len(self.pairs) + 2)]
            left, right = figure.subplots(1, 2, width_ratios=widths)
            norm = canvas.scale(np.append(0.0, rates))
            heads = [f"h{head}" for head in range(n_heads)]
            drawn = canvas.model_map(left, table, layers, heads, cmap=canvas.rising_colours(), norm=norm)
            left.set_title(f"patched at {where} tokens")
            figure.colorbar(drawn, ax=left, shrink=0.8, label="share of pairs flipped")
            toward = self.toward[shown]
            look: dict[str, Any] = {"cmap": canvas.signed_colours(), "norm": canvas.even_norm(toward, 0.99)}
            image = right.imshow(toward, aspect="auto", interpolation="nearest", **look)
            row, column = np.nonzero(self.flips[shown])
            right.plot(column, row, "o", color="black", markersize=1.8)
            right.set_yticks(range(len(shown)), [self.names[place] for place in shown], fontsize=6.5)
            right.set_xlabel("pair")
            right.xaxis.get_major_locator().set_params(integer=True)
            right.xaxis.get_major_locator().set_params(integer=True)
            right.set_title("change towards the other image; dot: the answer flips")
            figure.colorbar(image, ax=right, shrink=0.8, label="units of the metric")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for JSON."""
        candidates = [
            {
                "name": name,
                "tokens": self.tokens[place],
                "rate": asdict(self.rates[place]),
                "p": float(self.p_values[place]),
                "toward": float(self.toward[place].mean()),
                "flips": self.flips[place].tolist(),
                "changes": self.changes[place].tolist(),
            }
            for place, name in enumerate(self.names)
        ]
        several = len(self.pairs) > 1
        transfer = float(self.transfer)
        return {
            "metric": self.label,
            "by": self.by,
            "pairs": list(self.pairs),
            "left_out": list(self.left_out),
            "base": self.base.tolist(),
            "other": self.other.tolist(),
            "candidates": candidates,
            "deciders": [self.decider(pair) for pair in range(len(self.pairs))],
            "transfer": transfer if np.isfinite(transfer) else None,
            "transfer_p": self.transfer_p,
            "chance": self.chance,
            "best_of_others": asdict(self.best_of_others) if several else None,
            "agreement": asdict(self.agreement) if several and len(self.names) > 2 else None,
            "caveats": list(self.caveats),
        }

    def __repr__(self) -> str:
        best = self.order[0]
        return (
            f"DeciderHeads({len(self.names)} candidates, {counted(len(self.pairs), 'pair')}: "
            f"{self.names[best]} flips {self.rates[best].value:.0%})"
        )

    def _pair(self, pair: int) -> int:
        if not -len(self.pairs) <= pair < len(self.pairs):
            raise OptionError(f"there is no pair {pair}: there are {len(self.pairs)}, counted from 0")
        return pair % len(self.pairs)

    @cached_property
    def _drawn(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The best rate, and the transfer, of each random naming of the candidates within pairs."""
        rng, toward = np.random.default_rng(self.seed), self.toward
        best, carried = np.empty(DRAWS), np.empty(DRAWS)
        for draw in range(DRAWS):
            named = rng.permuted(np.tile(np.arange(len(toward))[:, None], toward.shape[1]), axis=0)
            flips = np.take_along_axis(self.flips, named, axis=0)
            best[draw] = flips.mean(axis=1).max()
            carried[draw] = _transfer(flips, _deciders(flips, np.take_along_axis(toward, named, axis=0)))
        return best, carried


@running
def deciders(
    model: Model,
    task: Task | PreparedTask,
    *,
    sites: Site | Sequence[Site] = ("heads", "mlps"),
    tokens: TokenSets = "all",
    by: FlipBy = "sign",
    seed: int = 0,
    batch_size: int | None = None,
    memory: int | str | None = None,
    progress: bool = True,
) -> DeciderHeads:
    """Patch every candidate in every pair, and count what flips.

    Both images of a pair are run once; then each candidate is patched in a batch of pairs at once, and only
    the part of the model after it is run: for `C` candidates about `C / 2` forwards a pair and token set.

    Args:
        model: from `load` or `wrap`.
        task: pairs; at least 2, better 20 or more, of images that are independent of one another.
        sites: "heads", "mlps", "patterns", or several of them.
        tokens: where they are patched: "all", "kind" (all, and each kind alone), "each", or named sets.
        by: "sign": the answer is the sign of the metric, a logit difference, so that tabby and tiger cat are
            one answer where both are targets; "top": it is the top class of all.
        seed: of intervals and p-values.
        batch_size: pairs at once; by default what `memory` allows.
        memory: bytes that a batch, and what is kept between runs, may take.
        progress: whether to show a bar.

    Raises:
        DataError: if the task has no corrupt images, or the model tells no pair apart without a patch.
        OptionError: for an unknown site or token set, a metric without a foil where the sign is asked for, or
            a model without classes.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(6, seed=0), metric=cv.logit_diff("cat", "dog"))
        >>> found = deciders(model, task, progress=False)
        >>> found.flips.shape, found.decider(0) in (None, *found.names)
        ((20, 6), True)
    """
    wanted: tuple[Site, ...] = (sites,) if isinstance(sites, str) else tuple(sites)
    for site in wanted or ("",):
        if site not in PATCHED:
            raise unknown_name("kind of candidate", site, PATCHED)
    if by not in get_args(FlipBy):
        raise unknown_name("kind of answer", by, get_args(FlipBy))
    if not model.chooses:
        raise OptionError(f"{model.name} has no classes, so no decision can flip: see patching_map()")
    prepared = prepare(model, task)
    if prepared.reference is None:
        raise DataError("a patch comes from corrupt images: give corrupt=")
    if by == "sign" and not prepared.metric.metric.uses_foil:
        raise OptionError(
            f"the sign of {prepared.metric.label} is no answer: use cv.logit_diff(target, foil), or by='top'"
        )
    runs = {_run_name(site, name): run for site in wanted for name, run in runs_of(model, site).items()}
    if not runs:
        raise OptionError(f"{model.name} has no {' or '.join(wanted)}")
    sets = token_sets(model, prepared, tokens)
    size = batch_size or choose_batch_size(prepared, memory)
    found = patched(model, prepared, runs, sets, size, "looking for deciders", progress)
    base, other, base_tops, other_tops = *found.metric[-2:], *found.tops[-2:]
    if by == "sign":
        told = (base < 0) & (other > 0) if prepared.denoising else (base > 0) & (other < 0)
        flips = (found.metric[:-2] > 0) != (base > 0)
    else:
        told, flips = base_tops != other_tops, found.tops[:-2] != base_tops
    if not told.any():
        sides = (other, base) if prepared.denoising else (base, other)
        raise DataError(
            f"the model tells none of {counted(len(told), 'pair')} apart without a patch "
            f"({prepared.metric.label}): "
            + (prepared.metric.swapped(*sides) or "name the classes, or give images that it gets right")
        )
    names = [f"{one} | {two}" for one, two in zip(prepared.base.names, prepared.reference.names, strict=True)]
    return DeciderHeads(
        names=tuple(name if chosen == "all" else f"{name}@{chosen}" for name in runs for chosen in sets),
        places=tuple(place for place in _places(model, runs) for _ in sets),
        tokens=tuple(sets) * len(runs),
        pairs=tuple(name for name, kept in zip(names, told, strict=True) if kept),
        left_out=tuple(name for name, kept in zip(names, told, strict=True) if not kept),
        flips=flips[:, told],
        changes=(found.metric[:-2] - base)[:, told],
        base=base[told],
        other=other[told],
        by=by,
        label=prepared.metric.label,
        seed=seed,
    )


# -- inside --------------------------------------------------------------------------------------


def _run_name(site: Site, node: str) -> str:
    return f"{node}.pattern" if site == "patterns" else node


def _places(model: Model, runs: Iterable[str] | dict[str, Run]) -> list[tuple[int | str, int]]:
    """Layer and head of each run's node, for a map; heads of one layer are numbered through."""
    heads: dict[int | str, int] = {}
    found: dict[str, tuple[int | str, int]] = {}
    for stage in model.stages:
        for node in stage.nodes.senders:
            layer: int | str = "pool" if node.startswith("pool.") else stage.nodes.layer
            if stage.nodes.kind_of(node) == "attention":
                found[node] = layer, heads.setdefault(layer, 0)
                heads[layer] += 1
            else:
                found[node] = layer, -1
    return [found[name.removesuffix(".pattern")] for name in runs]


def _deciders(
    flips: Bool[NDArray[np.bool_], "candidate pair"], toward: Float[NDArray[np.float64], "candidate pair"]
) -> Int64[NDArray[np.int64], " pair"]:
    """The candidate that flips each pair and moves it farthest; -1 where none flips it."""
    strongest = np.where(flips, toward, -np.inf).argmax(axis=0)
    return np.where(flips.any(axis=0), strongest, -1).astype(np.int64)


def _transfer(
    flips: Bool[NDArray[np.bool_], "candidate pair"], deciders: Int64[NDArray[np.int64], " pair"]
) -> float:
    """The mean share of other pairs that the decider of a pair flips."""
    decided = deciders[deciders >= 0]
    if not len(decided) or flips.shape[1] < 2:
        return float("nan")
    return float(((flips[decided].sum(axis=1) - 1) / (flips.shape[1] - 1)).mean())
