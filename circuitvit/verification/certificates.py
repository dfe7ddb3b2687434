"""`certify`: which edges stay in the circuit, or out of it, whichever pairs are taken away.

Discovery is repeated on subsets of `k` of the `N` pairs. Of all `C(N, k)` subsets let `p` be the share whose
circuit has an edge. The edge is decided by majority: in if `p > 1/2`, out if `p < 1/2`.

**Theorem.** Let `q(r) = C(N - r, k) / C(N, k)`, the share of the subsets that hold none of `r` given pairs.

    deleted:   if p > 1 - q(r) / 2,   the majority is the same after any r of the pairs are deleted
    replaced:  if p > 3/2 - q(r),     it is the same after any r of them are replaced by whatever pairs

and likewise for edges that are out, with `1 - p`.

Proof. The subsets of the pairs that are left are those that hold none of the `r`. Were the edge in all of the
others, the share among them would be `p' = (p - (1 - q)) / q`, and it can be no less; `p' > 1/2` is what is
asked for. Of the pairs with `r` replaced, a share `q` of the subsets are old ones too, of which at least
`p - (1 - q)` have the edge, whatever the others do. Both are tight: some discovery attains them.

`p` is known exactly where all subsets are tried. Else `n` are drawn independently, each as likely as any
other, and Clopper and Pearson's lower end stands in for it, two-sided at the level `alpha / edges`
(Bonferroni): with probability at least `1 - alpha` over the draw everything that is certified, of all edges,
for all radii and all choices of pairs, is true. An edge whose interval holds 1/2 is abstained from.

Assumed: `k` stays what it is; what is found on a subset depends on its pairs alone (and on random numbers of
its own, if it draws any), not on other pairs. Nothing is assumed of the pairs: they may be alike, share
images or be chosen by an adversary. Certified is what discovery says of these pairs, not that it is right.

Anani, Lorenz, Schiele, Fritz and Fischer 2026, "Certified circuits", arXiv:2602.22968, by deleting each pair
with a fixed probability (Huang et al. 2023, "RS-Del"); the subsets of a fixed size here are those of Jia, Cao
and Gong 2021, "Intrinsic certified robustness of bagging against data poisoning attacks", arXiv:2008.04495.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from scipy import stats

from circuitvit._keywords import running
from circuitvit._progress import progress_bar
from circuitvit.attribution import provenance_of
from circuitvit.attribution.budget import Budget, seconds
from circuitvit.attribution.by_pair import scores_by_pair
from circuitvit.attribution.methods import DEFAULT, check_keywords, find_method
from circuitvit.attribution.scoring import Running, check_effects
from circuitvit.errors import DataError, OptionError, check_number, check_whole, unknown_name
from circuitvit.graph import Circuit, EdgeMask, EdgeScores, Graph, Provenance, as_circuit
from circuitvit.graph.results import Record, Result
from circuitvit.models import Model
from circuitvit.tasks import Constants, Mean, Patch, PreparedTask, Task, Zero, as_task, prepare, select_pairs
from circuitvit.verification.robustness import Discover
from circuitvit.verification.statistics import ROUNDING

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

Selection = Literal["top", "connected"]
Rows = Sequence[int]
Edges = Int64[np.ndarray, "sender receiver group"]

IN, OUT, ABSTAIN = "in", "out", "abstain"

ALONE = ("hybrid", "atp-star")
"""Methods that choose by all pairs what becomes of an edge, and here for each pair by that pair alone."""

MOST_PAIRS = 1_000_000


class Decisions(NamedTuple):
    """What is certified of each edge, all `(sender, receiver, group)`.

    Attributes:
        sign: 1 for in, -1 for out, 0 where it is abstained from.
        deleted: how many pairs may be deleted, whichever they are; 0 where nothing is certified.
        replaced: how many may be replaced by others, likewise.
    """

    sign: Edges
    deleted: Edges
    replaced: Edges


@dataclass(frozen=True, eq=False, repr=False)
class Certificate(Result):
    """How often each edge is found on subsets of the pairs, and what follows if pairs are deleted.

    Attributes:
        graph: whose edges are voted on.
        votes: on how many subsets each edge was found.
        subsets: how many there were.
        pairs: of the task.
        k: pairs in each subset.
        alpha: the probability that anything certified is false; 0 where all subsets were tried.
        method: how circuits were found.
        provenance: where the votes came from.

    Example:
        >>> certificate.circuit, certificate.radius("m0->logits")  # doctest: +SKIP
    """

    graph: Graph
    votes: Edges
    subsets: int
    pairs: int
    k: int
    alpha: float
    method: str = ""
    provenance: Provenance = field(default_factory=Provenance)

    @property
    def share(self) -> Float[NDArray[np.float64], "sender receiver group"]:
        """The share of the subsets on which each edge was found, 0 to 1."""
        return self.votes / self.subsets

    @cached_property
    def decisions(self) -> Decisions:
        """In, out or neither, and for how many deleted or replaced pairs that stays so."""
        votes, places = np.unique(self.votes, return_inverse=True)
        deleted, replaced = (
            [
                self._radii(side, levels)[places].reshape(self.votes.shape)
                for side in (votes, self.subsets - votes)
            ]
            for levels in (needed(self.pairs, self.k, self.subsets), needed_if_replaced(self))
        )
        is_in, is_out = (each >= 0 for each in deleted)
        sign = np.where(self.graph.edge_mask, is_in.astype(np.int64) - is_out, 0)
        return Decisions(
            sign, *(np.where(sign == 0, 0, np.maximum(*each).clip(min=0)) for each in (deleted, replaced))
        )

    @property
    def circuit(self) -> Circuit:
        """The edges that stay in the circuit whichever pair is deleted; see `at`."""
        return self.at(1)

    def at(self, radius: int) -> Circuit:
        """The edges that stay in the circuit whichever pairs are deleted, without dead ones.

        Its scores are the shares of the subsets.

        Args:
            radius: how many pairs are; 0 for the edges that are decided to be in.

        Raises:
            OptionError: if it is no whole number from 0 on.
        """
        check_whole("the number of deleted pairs (radius)", radius, 0)
        kept = (self.decisions.sign > 0) & (self.decisions.deleted >= radius)
        made = self.provenance.with_parameters(subsets=self.subsets, k=self.k, radius=int(radius))
        return Circuit(self.graph, kept, self.share, made.with_shares_of("the votes")).pruned()

    def decision(self, edge: str) -> str:
        """ "in", "out" or "abstain".

        Raises:
            NameNotFoundError: if there is no such edge.
        """
        return (ABSTAIN, IN, OUT)[int(self.decisions.sign[self.graph.edge_index(edge)])]

    def radius(self, edge: str) -> int:
        """How many pairs may be deleted, whichever they are, without the edge's decision changing.

        Raises:
            NameNotFoundError: if there is no such edge.
        """
        return int(self.decisions.deleted[self.graph.edge_index(edge)])

    def sizes(self) -> tuple[int, ...]:
        """How many edges stay in the circuit whichever 0, 1, 2, ... pairs are deleted, dead ones included."""
        radii = self.decisions.deleted[self.decisions.sign > 0]
        return tuple(int((radii >= radius).sum()) for radius in range(int(radii.max(initial=0)) + 1))

    def records(self) -> Iterator[Record]:
        """One row for each edge that was found on any subset: `edge`, the `share` of the subsets, the
        `decision`, and how many pairs may be `deleted`, or `replaced`, without it changing."""
        for name in self.graph.names_of(self.votes > 0):
            place = self.graph.edge_index(name)
            yield {
                "edge": name,
                "share": float(self.share[place]),
                "decision": self.decision(name),
                "deleted": int(self.decisions.deleted[place]),
                "replaced": int(self.decisions.replaced[place]),
            }

    def figure(self) -> Picture:
        """The votes of all edges that were ever found, and how many stay as pairs are deleted."""
        from circuitvit.views.certainty import votes_figure

        found = self.votes > 0
        title = f"{self.drawn}, {self.method}"
        return votes_figure(title, self.share[found], self.decisions.sign[found], self.sizes())

    def __repr__(self) -> str:
        return f"Certificate({self})"

    def __str__(self) -> str:
        (inside, *more), sign = self.sizes(), self.decisions.sign
        abstained = int((self.graph.edge_mask & (sign == 0)).sum())
        stays = f", {more[0]:,} of them whichever pair is deleted" if more else ", none of them for certain"
        stays += f" and {more[-1]:,} whichever {len(more)}" if len(more) > 1 else ""
        sure = "" if self.alpha == 0 else f" (all of this with a probability of {1 - self.alpha:.0%})"
        return (
            f"{self.drawn}: {inside:,} edges in the circuit{stays}; {abstained:,} abstained from, "
            f"{int((sign < 0).sum()):,} out{sure}."
        )

    @property
    def drawn(self) -> str:
        """Which subsets there were, in words."""
        count = f"all {self.subsets:,}" if self.alpha == 0 else f"{self.subsets:,} random"
        return f"{count} subsets of {self.k} of {self.pairs} pairs"

    def _radii(self, votes: NDArray[np.int64], levels: Sequence[Fraction]) -> NDArray[np.int64]:
        """How many pairs may go where so many subsets agree; -1 where not even the decision is certain."""
        if self.alpha == 0:
            low = [Fraction(int(each), self.subsets) for each in votes]
        else:
            level = self.alpha / self.graph.n_edges / 2
            low = [Fraction(each) for each in lower_end(votes, self.subsets, level).tolist()]
        return np.array([bisect_left(levels, each) - 1 for each in low], dtype=np.int64)

    def _check(self) -> None:
        check_whole("the number of subsets", self.subsets)
        check_whole("the number of pairs", self.pairs, 2)
        check_whole("the number of pairs in a subset", self.k)
        if not self.k < self.pairs <= MOST_PAIRS:
            raise OptionError(f"subsets of {self.k} of {self.pairs} pairs are none that can be certified on")
        if not 0 <= self.alpha < 1:
            raise OptionError(f"the level alpha lies between 0 and 1, not at {self.alpha!r}")
        if self.votes.shape != self.graph.shape:
            raise OptionError(f"votes of shape {self.votes.shape} on a graph of shape {self.graph.shape}")
        off = self.votes[~self.graph.edge_mask]
        if off.any() or self.votes.min() < 0 or self.votes.max() > self.subsets:
            raise OptionError("votes lie between 0 and the number of subsets, and are for edges alone")


# -- the theorem ---------------------------------------------------------------------------------


def needed(pairs: int, k: int, subsets: int) -> list[Fraction]:
    """The share of the subsets that has to be exceeded for a decision to stay if 0, 1, 2, ... pairs go.

    Args:
        pairs: how many there are.
        k: pairs in a subset.
        subsets: how many were tried; radii that no vote of so many can certify are left out.

    Example:
        >>> [str(each) for each in needed(4, 2, 6)]
        ['1/2', '3/4', '11/12']
    """
    return [1 - share / 2 for share in _untouched(pairs, k, subsets)]


def needed_if_replaced(found: Certificate) -> list[Fraction]:
    """The same if pairs are replaced by others."""
    return [Fraction(3, 2) - share for share in _untouched(found.pairs, found.k, found.subsets)]


def _untouched(pairs: int, k: int, subsets: int) -> Iterator[Fraction]:
    """`C(N - r, k) / C(N, k)` for r = 0, 1, ...: the share of the subsets that hold none of `r` pairs."""
    share = Fraction(1)
    for radius in range(pairs - k + 1):
        if share * subsets < 1:  # of all subsets there would be less than one
            return
        yield share
        share *= Fraction(pairs - k - radius, pairs - radius)


def lower_end(votes: NDArray[np.int64], n: int, level: float) -> NDArray[np.float64]:
    """The lower end of Clopper and Pearson's one-sided interval for a share, from `votes` of `n` draws.

    Clopper and Pearson 1934, "The use of confidence or fiducial limits", Biometrika 26.

    Example:
        >>> [round(float(end), 3) for end in lower_end(np.array([0, 100]), 100, 0.05)]
        [0.0, 0.97]
    """
    ends = stats.beta.ppf(level, np.maximum(votes, 1), n - votes + 1)
    return np.where(votes > 0, ends, 0.0)


# -- votes ---------------------------------------------------------------------------------------


@running
def certify(
    model: Model,
    task: Task | PreparedTask,
    method: str | Discover = DEFAULT,
    *,
    edges: int | None = None,
    selection: Selection = "top",
    n: int = 1000,
    k: int | None = None,
    alpha: float = 0.05,
    within: str | float | None = None,
    seed: int = 0,
    progress: bool = True,
    **keywords: Any,
) -> Certificate:
    """Find the circuit on many subsets of the pairs, and say which edges stay whichever pairs are deleted.

    The theorem, its proof and what it assumes stand at the top of `circuitvit.verification.certificates`.
    A method of scores is run once on each pair, whatever `n` is: scores of a subset are means.

    Args:
        model: from `load` or `wrap`.
        task: at least two pairs. Scores need an ablation that is of each pair alone: "patch", "zero",
            constants, or a mean over images of its own.
        method: of scores, each pair's by itself ("hybrid" chooses for each pair anew which effects are
            exact); or how a circuit is found, as for `stability`, such as
            `lambda model, task: cv.find(model, task, within="20s").circuit`.
        edges: how many edges of the best scores make a circuit; a tenth of the graph's by default.
        selection: "top", the best edges as they are, so that each is voted on for itself; or "connected",
            whole paths, which takes longer (see `EdgeScores.connected`).
        n: how many subsets are drawn; where there are no more than these in all, each is tried once.
        k: pairs in each; half of them by default. Fewer give larger radii and poorer circuits.
        alpha: the probability, over the draw, that anything that is certified is false.
        within: the time for all searches, such as "10m", after which no further one begins.
        seed: of the draw.
        progress: whether to show a bar.
        **keywords: the method's own, as for `attribute`.

    Raises:
        NameNotFoundError: for an unknown method.
        OptionError: if a method, ablation or budget looks at more than one pair, `n` is too small to certify
            anything, or a setting makes no sense.
        DataError: if the task has a single pair, or cannot be scored.

    Example:
        >>> import circuitvit as cv
        >>> from circuitvit.datasets.catdog import catdog_pairs
        >>> model = cv.load("catdog-tiny")
        >>> task = cv.Task(*catdog_pairs(8), metric=cv.logit_diff("cat", "dog"))
        >>> certify(model, task, "eap", edges=20, progress=False).subsets
        70
    """
    check_whole("the number of subsets (n)", n)
    check_number("the level alpha", alpha, above=0, below=1)
    deadline = None if within is None else seconds(within)
    prepared = prepare(model, task, progress)
    if len(prepared) < 2:
        raise DataError("a single pair has no subsets: a circuit is certified on several")
    k = len(prepared) // 2 if k is None else k
    check_whole("the number of pairs in a subset (k)", k)
    if k >= len(prepared):
        raise OptionError(f"subsets of {k} pairs need more than {k}: the task has {len(prepared)}")
    every = deadline is None and math.comb(len(prepared), k) <= n
    if not every:
        _check_enough(n, len(prepared), k, alpha / prepared.graph.n_edges / 2)
    voter, name, said = _voter(prepared, method, edges, selection, keywords, progress)
    drawn = _all(len(prepared), k) if every else _draws(len(prepared), k, n, seed)
    total = math.comb(len(prepared), k) if every else n
    votes, count, began = np.zeros(prepared.graph.shape, dtype=np.int64), 0, time.monotonic()
    with progress_bar(total, "circuits of subsets", progress) as bar:
        for rows in drawn:
            votes += voter(rows)
            count += 1
            bar.update()
            if deadline is not None and time.monotonic() - began > deadline:
                break
    made = provenance_of(prepared, "certify", seed).with_parameters(direction=prepared.direction, **said)
    return Certificate(
        prepared.graph, votes, count, len(prepared), k, 0.0 if every else float(alpha), name, made
    )


# -- inside --------------------------------------------------------------------------------------


def _all(pairs: int, k: int) -> Iterator[Rows]:
    return combinations(range(pairs), k)


def _draws(pairs: int, k: int, n: int, seed: int) -> Iterator[Rows]:
    """Subsets, each as likely as any other and independent of those before, in the order of the task."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        yield sorted(rng.choice(pairs, k, replace=False).tolist())


def _check_enough(n: int, pairs: int, k: int, level: float) -> None:
    """Refuse so few subsets that not even all of them together could certify an edge."""
    share = float(needed(pairs, k, max(n, pairs))[1])
    least = math.floor(math.log(level) / math.log(share)) + 1
    if n < least:
        raise OptionError(
            f"n={n} subsets of {k} of {pairs} pairs certify nothing, were they all to agree: it takes {least}"
        )


def _voter(
    prepared: PreparedTask,
    method: str | Discover,
    edges: int | None,
    selection: Selection,
    keywords: dict[str, Any],
    progress: bool,
) -> tuple[Callable[[Rows], EdgeMask], str, dict[str, Any]]:
    """What gives the circuit of a subset; its name, and its settings."""
    graph, model = prepared.graph, prepared.model
    if callable(method):
        if edges is not None or keywords:
            given = ", ".join(["edges"] * (edges is not None) + list(keywords))
            raise OptionError(f"{given} is for a method of scores: here it is said inside of the function")

        def found(rows: Rows) -> EdgeMask:
            return as_circuit(method(model, as_task(select_pairs(prepared, rows))), graph).kept

        return found, "search", {}
    if selection not in get_args(Selection):
        raise unknown_name("selection", selection, get_args(Selection))
    size = max(1, graph.n_edges // 10) if edges is None else edges
    check_whole("the number of edges", size)
    if size > graph.n_edges:
        raise OptionError(f"asked for {size} edges of a graph that has {graph.n_edges}")
    scores = _by_pair(prepared, method, keywords, progress)

    def best(rows: Rows) -> EdgeMask:
        values = np.zeros(graph.shape)
        values[graph.edge_mask] = scores[list(rows)].mean(axis=0)
        ranked = EdgeScores(graph, values)
        chosen = ranked.connected(size) if selection == "connected" else ranked.top(size, prune=False)
        # what is scored 0 but for rounding would be chosen, or not, by the kind of the processor
        told_apart: EdgeMask = np.abs(values) > ROUNDING * np.abs(values).max()
        return chosen.kept & told_apart

    return best, method, {"scores": method, "edges": size, "voted": selection}


def _by_pair(
    prepared: PreparedTask, method: str, keywords: dict[str, Any], progress: bool
) -> Float[NDArray[np.float64], "pair edge"]:
    """The scores of each pair by itself."""
    chosen, ablation = find_method(method), prepared.ablation
    check_keywords(method, keywords)
    other = f"give a function instead: lambda model, task: cv.attribute(model, task, {method!r}).top(200)"
    if not chosen.by_pair and method not in ALONE:
        raise OptionError(f"{method} looks at all pairs before it scores one; {other}, and a smaller n")
    if (budget := keywords.get("budget")) is not None and Budget.parse(budget).seconds:
        raise OptionError(
            f"budget={budget!r} is shared by all pairs, also by deleted ones: give forward-equivalents for "
            "each pair, such as budget=60"
        )
    alone = isinstance(ablation, (Patch, Zero, Constants))
    if not (alone or (isinstance(ablation, Mean) and ablation.images is not None)):
        raise OptionError(
            f"under {ablation.name!r} ablation a pair's scores depend on other pairs, also on deleted ones; "
            f"{other}, and a smaller n; or a mean over images of its own: Mean(images=...)"
        )
    if keywords.get("state") is not None:
        raise OptionError(f"{method} with a state is of all pairs together: leave out state=")
    how, every = Running(1, progress), prepared.graph.edge_mask
    if chosen.by_pair:
        scores = scores_by_pair(prepared, method, every, how, **keywords)
    else:
        single = [select_pairs(prepared, [row]) for row in range(len(prepared))]
        with progress_bar(len(single), "scores by pair", progress, unit="pair") as bar:
            rows = []
            for pair in single:
                rows.append(scores_by_pair(pair, method, every, replace(how, progress=False), **keywords)[0])
                bar.update()
        scores = np.stack(rows)
    check_effects(prepared, np.abs(scores).sum(axis=0))
    return scores
