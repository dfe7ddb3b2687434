"""What became of a circuit when the weights changed: the finding, and the rule by which it gets its verdict.

All figures are shares of the behaviour that there was in the old weights, so that one tolerance serves all of
them. Every verdict but "cannot tell" is a claim that an interval of 95 % over pairs holds, the claim that
nothing changed, too: that each figure lies within the tolerance of what it was (two one-sided tests,
Schuirmann 1987, "A comparison of the two one-sided tests procedure", J. Pharmacokin. Biopharm. 15; as all of
them must hold, their number needs no correction: Berger 1982, "Multiparameter hypothesis testing and
acceptance sampling", Technometrics 24).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from circuitvit.errors import OptionError, check_number, counted
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.results import Record, ToldResult
from circuitvit.verification.statistics import Estimate
from circuitvit.verification.templates import row

UNCHANGED = "unchanged"
SHIFTED = "shifted"
WEAKER = "weaker"
REROUTED = "rerouted"
GONE = "gone"
CANNOT_TELL = "cannot tell"

VERDICTS = {
    UNCHANGED: "the stored circuit carries the same behaviour as before",
    SHIFTED: "the stored circuit still carries the behaviour, in other parts than before or more strongly",
    WEAKER: "the stored circuit still carries the behaviour, but less of it",
    REROUTED: "the behaviour is there, and the stored circuit no longer carries it",
    GONE: "the behaviour is not there",
    CANNOT_TELL: "the pairs do not say",
}
"""What may have become of a circuit."""

LEFT = 0.2
"""A behaviour is gone when less than this share of it is left."""

CARRIED = 0.5
"""A circuit carries a behaviour when its faithfulness is no farther than this from 1."""

TOLERANCE = 0.1
"""The change that does not count, as a share of the old behaviour."""

LISTED = 12

Edges = Float[np.ndarray, " edge"]


@dataclass(frozen=True, repr=False)
class Drift(ToldResult):
    """A stored circuit in new weights.

    Shares are of the mean effect of the behaviour in the old weights: the metric with every edge, less the
    metric with none. Edges that support the behaviour have positive shares.

    Attributes:
        verdict: one of `VERDICTS`.
        reason: it in a sentence or two, with the figures that decided.
        n: how many pairs it rests on; 0 where the weights are the same and nothing was run.
        tolerance: the change that does not count.
        behaviour: the new effect as a share of the old one; None where there are too few pairs for an
            interval, as is every other figure that could not be had.
        faithfulness_old: of the stored circuit in the old weights.
        faithfulness_new: of the same circuit in the new weights, of the behaviour that is there.
        faithfulness_change: the latter less the former, pair by pair.
        own_left: what the circuit carries beyond the same circuit with like nodes (the heads of a layer) in
            one another's places, as a share of what it carried beyond them in the old weights. None where
            the old weights do not tell them apart.
        edges: that were measured, by exact effects on every pair.
        old: the effect of each edge in the old weights.
        new: in the new ones.
        low: lower end of the 95 % interval of the change of each edge, for all edges of the graph at once.
        high: upper end.
        largest: no edge measured has changed by more than this (95 %); None where none was measured.
        circuit: the stored one.
        found: what a new search found in the new weights; None where none was asked for.
        faithfulness_found: of it in the new weights, on pairs that it was not found on.
        faithfulness_back: of it in the old weights.
        caveats: what to bear in mind.
        before: model and weights of old.
        after: of new.
    """

    verdict: str
    reason: str
    n: int
    tolerance: float
    circuit: Circuit
    before: Provenance
    after: Provenance
    behaviour: Estimate | None = None
    faithfulness_old: Estimate | None = None
    faithfulness_new: Estimate | None = None
    faithfulness_change: Estimate | None = None
    own_left: Estimate | None = None
    edges: tuple[str, ...] = ()
    old: Edges | None = None
    new: Edges | None = None
    low: Edges | None = None
    high: Edges | None = None
    largest: float | None = None
    found: Circuit | None = None
    faithfulness_found: Estimate | None = None
    faithfulness_back: Estimate | None = None
    caveats: tuple[str, ...] = ()

    along: ClassVar[str] = "old:edges new:edges low:edges high:edges"

    def records(self) -> Iterator[Record]:
        """One row for each edge measured: its name, whether it is `in_circuit`, its effect in the `old` and
        the `new` weights, the `change` with the ends of its interval, `low` and `high`, and in `moved`
        whether it "gained" or "lost" effect or neither ("")."""
        if self.old is None or self.new is None or self.low is None or self.high is None:
            return
        for name, old, new, low, high in zip(
            self.edges,
            self.old.tolist(),
            self.new.tolist(),
            self.low.tolist(),
            self.high.tolist(),
            strict=True,
        ):
            yield {
                "edge": name,
                "in_circuit": name in self.circuit,
                "old": old,
                "new": new,
                "change": new - old,
                "low": low,
                "high": high,
                "moved": "gained" if low > 0 else "lost" if high < 0 else "",
            }

    def moved(self, way: str) -> list[Record]:
        """The rows of the edges that surely "gained" or "lost" effect, the largest change first.

        Raises:
            OptionError: for another word.
        """
        if way not in ("gained", "lost"):
            raise OptionError(f"edges have 'gained' or 'lost' effect, not {way!r}")
        found = [each for each in self.records() if each["moved"] == way]
        return sorted(found, key=lambda each: -abs(float(each["change"] or 0)))

    def effects(self, at_least: float) -> tuple[Circuit, Circuit]:
        """The edges measured whose effect is at least this share of the old behaviour, in old and in new.

        Raises:
            OptionError: if the share is not above 0, or no edge was measured.
        """
        check_number("the least effect", at_least)
        if self.old is None or self.new is None:
            raise OptionError("no edge was measured, so there is nothing to draw")
        graph, kept = self.circuit.graph, []
        for values, origin in ((self.old, self.before), (self.new, self.after)):
            scores = graph.array_of(dict(zip(self.edges, values.tolist(), strict=True)))
            kept.append(Circuit(graph, np.abs(scores) >= at_least, scores, origin))
        return kept[0], kept[1]

    def __repr__(self) -> str:
        return f"Drift({self})"

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"

    def figures(self) -> Iterator[tuple[str, Estimate]]:
        """The figures there are, each with what it is."""
        named = {
            "behaviour left, as a share of the old": self.behaviour,
            "faithfulness of the stored circuit, old weights": self.faithfulness_old,
            "faithfulness of the stored circuit, new weights": self.faithfulness_new,
            "change of its faithfulness": self.faithfulness_change,
            "left of what its own nodes carry": self.own_left,
            "faithfulness of the circuit found anew, new weights": self.faithfulness_found,
            "faithfulness of the circuit found anew, old weights": self.faithfulness_back,
        }
        yield from ((name, each) for name, each in named.items() if each is not None)

    def _lines(self) -> Iterator[str]:
        yield f"# What changed: {self.verdict}"
        yield from ("", self.reason)
        if self.n:
            yield ""
            yield from row("figure", f"on {counted(self.n, 'pair')}", header=True)
            for name, each in self.figures():
                yield from row(name, str(each))
            if self.largest is not None:
                yield from row("largest change of an edge", f"at most {self.largest:.3f}")
        for way in ("gained", "lost"):
            edges = self.moved(way)
            if edges:
                yield from ("", f"## {counted(len(edges), 'edge')} {way} effect", "")
                yield from row("edge", "old", "new", "change, with its interval", "", header=True)
                yield from (line for each in edges[:LISTED] for line in row(*_cells(each)))
        if self.found is not None:
            yield from ("", "## A new search", "", search_told(self))
        if self.caveats:
            yield from ("", "## Bear in mind", "", *(f"- {each}" for each in self.caveats))

    def _check(self) -> None:
        if self.verdict not in VERDICTS:
            raise OptionError(f"a verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}")
        check_number("the tolerance", self.tolerance, above=0, below=1)
        measured = [each is not None for each in (self.old, self.new, self.low, self.high, self.largest)]
        if any(measured) != all(measured):
            raise OptionError("the figures of edges are given together or not at all")
        for name in self.edges:
            self.circuit.graph.edge_index(name)


def signed(value: float) -> str:
    """Three decimals with a sign; what rounds to zero has a plus.

    Example:
        >>> signed(0.25), signed(-0.0001)
        ('+0.250', '+0.000')
    """
    return f"{round(value, 3) + 0.0:+.3f}"


def _cells(each: Record) -> tuple[str, ...]:
    numbers = [signed(float(each[name] or 0)) for name in ("old", "new", "change", "low", "high")]
    inside = "in the circuit" if each["in_circuit"] else ""
    return str(each["edge"]), *numbers[:2], f"{numbers[2]} ({numbers[3]} to {numbers[4]})", inside


def search_told(drift: Drift) -> str:
    """What a new search found, in sentences.

    Raises:
        OptionError: if there was none.
    """
    found, stored = drift.found, drift.circuit
    if found is None:
        raise OptionError("no new search was made: give search=True")
    return (
        f"A search in the new weights found {counted(len(found), 'edge')}; the stored circuit has "
        f"{len(stored):,}, and {len(found & stored):,} are in both (Jaccard index "
        f"{found.jaccard(stored):.3f}). On pairs that it was not found on its faithfulness is "
        f"{drift.faithfulness_found} in the new weights and {drift.faithfulness_back} in the old ones. "
        "Two searches in one model differ as well: where it carries the behaviour in both, another circuit "
        "is another choice and no change."
    )


# -- the rule --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """What the verdict is read from; figures that there is no sense in are None.

    Attributes:
        behaviour: new effect over old effect.
        old: faithfulness of the stored circuit in the old weights.
        new: in the new ones; None where there is no behaviour that it could be a share of.
        change: the latter less the former.
        own: what it carries beyond circuits with like nodes in one another's places, new over old.
        largest: the largest change of an edge, at most (95 % for each).
        least: the largest change of an edge, at least (95 % for all at once).
    """

    behaviour: Estimate
    old: Estimate
    new: Estimate | None = None
    change: Estimate | None = None
    own: Estimate | None = None
    largest: float | None = None
    least: float | None = None


def judge(found: Measures, tolerance: float) -> tuple[str, str]:
    """The verdict and its reason.

    Example:
        >>> same = Estimate(1.0, 0.97, 1.04)
        >>> judge(Measures(same, same, same, Estimate(0.0, -0.02, 0.03), None, 0.04, 0.0), 0.1)[0]
        'unchanged'
        >>> judge(Measures(Estimate(0.02, -0.1, 0.12), same), 0.1)[0]
        'gone'
        >>> half = Estimate(0.45, 0.3, 0.6), Estimate(-0.55, -0.7, -0.4)
        >>> judge(Measures(same, same, *half), 0.1)[1].split(": ")[1]
        'that has surely changed, and it may carry it or not. Give more pairs.'
    """
    share, old, new, change = found.behaviour, found.old, found.new, found.change
    if share.low is None or share.high is None:
        return CANNOT_TELL, "There are too few pairs for intervals: give 5 or more."
    left = f"{share} of the old behaviour is left"
    if share.high < LEFT:
        reverse = " The metric now goes the other way." if share.high < -LEFT else ""
        return GONE, f"Only {left}, surely less than {LEFT:g}.{reverse}"
    if share.low <= LEFT or new is None or change is None:
        return CANNOT_TELL, f"{left}: it may be there, and it may be gone. Give more pairs."
    if not _within(old, 1, CARRIED):
        return CANNOT_TELL, (
            f"The stored circuit is not shown to carry the behaviour in the old weights either: its "
            f"faithfulness is {old} there. Give more pairs, or a circuit that does."
        )
    carries = f"the stored circuit's faithfulness is {new}, and was {old}"
    if _beyond(new, 1, CARRIED):
        return REROUTED, f"{left}, but {carries}."
    if found.own is not None and found.own.high is not None and found.own.high < CARRIED:
        return REROUTED, (
            f"{left}, but {carries}, and that is the work of its shape: of what it carried beyond the same "
            f"circuit with the heads of each layer in one another's places, {found.own} is left, surely less "
            f"than {CARRIED:g}."
        )
    if not _within(new, 1, CARRIED):
        surely = "that has surely changed, and " if _beyond(change, 0, tolerance) else ""
        return CANNOT_TELL, f"{left}; {carries}: {surely}it may carry it or not. Give more pairs."
    return _carried(found, share, change, tolerance, f"{left}; {carries}")


def _carried(
    found: Measures, share: Estimate, change: Estimate, tolerance: float, said: str
) -> tuple[str, str]:
    """The verdict where the circuit still carries what there is."""
    edges = ""
    if found.largest is not None and found.least is not None:
        moved = f"some edge has changed by at least {found.least:.3f}" if found.least > tolerance else ""
        edges = f"; {moved or f'no edge has changed by more than {found.largest:.3f}'}"
    same = found.largest is None or found.largest <= tolerance
    if _within(share, 1, tolerance) and _within(change, 0, tolerance) and same:
        return UNCHANGED, f"{said}{edges}: all within {tolerance:g}."
    if (share.high or 0) < 1 - tolerance or (change.high or 0) < -tolerance:
        return WEAKER, f"{said}{edges}."
    if _beyond(share, 1, tolerance) or _beyond(change, 0, tolerance) or (found.least or 0) > tolerance:
        return SHIFTED, f"{said}{edges}."
    return CANNOT_TELL, (
        f"{said}{edges}: neither surely within {tolerance:g} nor surely beyond it. Give more pairs, or a "
        "larger tolerance."
    )


def _within(found: Estimate, middle: float, margin: float) -> bool:
    """Whether all of an interval is."""
    if found.low is None or found.high is None:
        return False
    return middle - margin <= found.low and found.high <= middle + margin


def _beyond(found: Estimate, middle: float, margin: float) -> bool:
    """Whether none of an interval is within."""
    if found.low is None or found.high is None:
        return False
    return found.high < middle - margin or found.low > middle + margin
