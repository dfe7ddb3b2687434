"""What an audit of a cue found: how much of a model's decisions rests on something that it should not rest
on.

A *cue* is what goes with the right answer without being it: the background, a word, a colour. The share of
the decision that it carries is measured on pairs of images in which it alone changes. Every verdict but
"cannot tell" is a claim that an interval of 95 % holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from circuitvit.errors import OptionError, check_number, counted
from circuitvit.graph import Circuit, Provenance
from circuitvit.graph.results import Record, ToldResult
from circuitvit.verification.certificates import Certificate
from circuitvit.verification.cross_effects import Specificity
from circuitvit.verification.group_accuracy import GroupAccuracy, worst
from circuitvit.verification.statistics import Estimate, estimated, percent, points
from circuitvit.verification.templates import row

if TYPE_CHECKING:
    from circuitvit.views.canvas import Picture

CARRIES = "carries"
HARDLY = "hardly any"
AGAINST = "against"
CANNOT_TELL = "cannot tell"

VERDICTS = {
    CARRIES: "the cue carries a part of the decision",
    HARDLY: "the cue carries hardly any of the decision",
    AGAINST: "changing the cue moves the decision the other way",
    CANNOT_TELL: "the pairs do not say",
}
"""What an audit may come to."""

LEAST = 0.1
"""The share of the decision below which a cue is said to carry hardly any."""


@dataclass(frozen=True)
class Lost:
    """What is lost of a behaviour when edges hold constants.

    Attributes:
        name: of the behaviour.
        n: pairs that it is measured on.
        share: of its effect, the difference between clean and corrupt images; below 0 where it grows.
    """

    name: str
    n: int
    share: Estimate


@dataclass(frozen=True)
class Used:
    """Images that an audit used.

    Attributes:
        what: they are.
        n: how many images or pairs.
        purpose: what for.
        hash: SHA-256 over the images as the model sees them.
    """

    what: str
    n: int
    purpose: str
    hash: str


@dataclass(frozen=True, repr=False)
class Audit(ToldResult):
    """How much of a decision a cue carries, where, and what the model is worth without.

    Attributes:
        verdict: one of `VERDICTS`.
        reason: it in a sentence or two, with the figures that decided.
        name: of the cue, such as "the background".
        provenance: the model, its weights' hash, the versions; of the search for the circuit, where there was
            one.
        task: what was measured: metric and classes.
        date: as it was given.
        least: the share below which the cue is said to carry hardly any of the decision.
        together: whether the behaviour's pairs change the cue as well.
        cue_effect: how far the metric moves when the cue alone changes, in its own units.
        behaviour_effect: how far it moves on the behaviour's pairs.
        share: of the decision that the cue carries; None where it is not defined.
        flips: the share of images whose top class changes when the cue alone does.
        n: pairs of the cue that this was measured on, and that no circuit was found on.
        n_behaviour: pairs of the behaviour, likewise.
        circuit: of the cue; None where none was looked for.
        other: the behaviour's circuit; None likewise.
        necessity: the share of the cue's effect that is lost without its circuit.
        faithfulness: the share that its circuit alone carries.
        specificity: of the two circuits; None where either behaviour is too weak to say.
        certificate: the votes for the edges of the cue's circuit, by scores; None where there is none.
        ablated: the edges that were ablated for the groups: of the cue's circuit, not of the behaviour's.
        groups: accuracy on every group and class before and after.
        elsewhere: the same on other images.
        lost: what is lost without these edges: of the cue's effect, of the behaviour and of other tasks.
        data: the images that were used.
        caveats: what to bear in mind.
    """

    verdict: str
    reason: str
    name: str
    provenance: Provenance
    task: str
    date: str
    least: float
    together: bool
    cue_effect: Estimate
    behaviour_effect: Estimate
    share: Estimate | None
    flips: Estimate
    n: int
    n_behaviour: int
    groups: tuple[GroupAccuracy, ...]
    circuit: Circuit | None = None
    other: Circuit | None = None
    necessity: Estimate | None = None
    faithfulness: Estimate | None = None
    specificity: Specificity | None = None
    certificate: Certificate | None = None
    ablated: Circuit | None = None
    elsewhere: tuple[GroupAccuracy, ...] = ()
    lost: tuple[Lost, ...] = ()
    data: tuple[Used, ...] = ()
    caveats: tuple[str, ...] = ()

    version: ClassVar[int] = 1

    def records(self) -> Iterator[Record]:
        """One row for each group of each class, and for the images `elsewhere`: its name, the number of
        images `n`, accuracy `before` and `after` and the `change`, each with the ends of its interval."""
        for elsewhere, rows in ((False, self.groups), (True, self.elsewhere)):
            for each in rows:
                yield {
                    "group": each.name,
                    "elsewhere": elsewhere,
                    "n": each.n,
                    **estimated("before", each.before),
                    **estimated("after", each.after),
                    **estimated("change", each.change),
                }

    @property
    def worst_before(self) -> tuple[str, Estimate]:
        """The group that the model is worst on, and the accuracy there; see `worst`."""
        return worst([(each.name, each.n, each.before) for each in self.groups])

    @property
    def worst_after(self) -> tuple[str, Estimate] | None:
        """The same without the ablated edges; None where nothing was ablated."""
        rows = [(each.name, each.n, each.after) for each in self.groups if each.after is not None]
        return worst(rows) if rows else None

    @property
    def certified(self) -> tuple[str, ...]:
        """The edges of the circuit that stay whichever pair is deleted."""
        if self.circuit is None or self.certificate is None:
            return ()
        return tuple(self.circuit & self.certificate.circuit)

    @property
    def confirmed(self) -> bool | None:
        """Whether more than half of the cue's effect is lost without its circuit; None: cannot be told."""
        found = self.necessity
        if found is None or found.low is None or found.high is None or found.low <= 0.5 <= found.high:
            return None
        return found.low > 0.5

    def figure(self) -> Picture:
        """Accuracy on each group, as the model is and without the cue's own edges, with intervals."""
        from circuitvit.views.certainty import groups_figure

        rows = [(each.name, each.before, each.after) for each in (*self.groups, *self.elsewhere)]
        return groups_figure(sentence(self.headline).rstrip("."), rows, len(self.groups))

    @property
    def headline(self) -> str:
        """The share of the decision in a few words."""
        if self.share is None:
            return f"how much of the decision {self.name} carries cannot be told"
        return f"{self.name} carries {percent(self.share)} of the decision"

    def __repr__(self) -> str:
        return f"Audit({self.verdict}: {self.headline})"

    def __str__(self) -> str:
        return self.reason

    def figures(self) -> Iterator[tuple[str, str]]:
        """The figures there are, each with what it is."""
        yield (
            f"share of the decision that {self.name} carries",
            "" if self.share is None else percent(self.share),
        )
        yield "answers that change when it alone is changed", percent(self.flips)
        yield "the metric moves when it alone is changed by", str(self.cue_effect)
        with_it = f"the behaviour and {self.name} are" if self.together else "the behaviour alone is"
        yield f"the metric moves when {with_it} changed by", str(self.behaviour_effect)
        if self.circuit is not None and self.necessity is not None and self.faithfulness is not None:
            edges = f"{len(self.circuit):,} of {self.circuit.graph.n_edges:,} edges"
            yield f"circuit of {self.name}", edges
            yield "share of its effect that is lost without the circuit", percent(self.necessity)
            yield "share of its effect that the circuit alone carries", percent(self.faithfulness)
        if self.certificate is not None and self.circuit is not None:
            yield (
                "edges of it that stay whichever pair is taken away",
                f"{len(self.certified):,} of {len(self.circuit):,}",
            )
        if self.ablated is not None:
            yield "edges of it that are its own", f"{len(self.ablated):,}"
        for each in self.lost:
            what = "its effect" if each.name == self.name else each.name
            yield f"share of {what} that is lost without these", percent(each.share)
        name, before = self.worst_before
        yield "worst group", f"{name}: {percent(before)}"
        if (after := self.worst_after) is not None:
            yield "worst group without the edges of its own", f"{after[0]}: {percent(after[1])}"

    def _lines(self) -> Iterator[str]:
        yield f"# Audit of {self.provenance.model}: {self.headline}"
        yield from ("", self.reason, "")
        yield from row("figure", f"on {counted(self.n, 'held-out pair')}", header=True)
        for what, text in self.figures():
            yield from row(what, text)
        for title, rows in (("Groups", self.groups), ("Elsewhere", self.elsewhere)):
            if rows:
                yield from ("", f"## {title}", "")
                yield from row("images", "n", "right", "without the edges", "change, points", header=True)
                for each in rows:
                    after = "" if each.after is None else percent(each.after)
                    change = "" if each.change is None else points(each.change)
                    yield from row(each.name, str(each.n), percent(each.before), after, change)
        if self.specificity is not None:
            yield from ("", "## Specificity", "", str(self.specificity))
        if self.caveats:
            yield from ("", "## Bear in mind", "", *(f"- {each}" for each in self.caveats))

    def _check(self) -> None:
        if self.verdict not in VERDICTS:
            raise OptionError(f"a verdict is one of {', '.join(VERDICTS)}, not {self.verdict!r}")
        check_number("the least share", self.least, above=0, below=1)
        if not self.groups or any(each.n < 1 for each in (*self.groups, *self.elsewhere)):
            raise OptionError("an audit has groups, each with images")


def judge(share: Estimate | None, least: float) -> str:
    """The verdict: hardly any, if all of the interval is within the least of 0; some, if it leaves out 0.

    Example:
        >>> [judge(Estimate(value, value - 0.08, value + 0.08), 0.1) for value in (0.7, 0.0, 0.05, -0.6)]
        ['carries', 'hardly any', 'cannot tell', 'against']
    """
    if share is None or share.low is None or share.high is None:
        return CANNOT_TELL
    if -least < share.low and share.high < least:
        return HARDLY
    return CARRIES if share.low > 0 else AGAINST if share.high < 0 else CANNOT_TELL


def told(audit: Audit) -> str:
    """The verdict in a sentence or two, with the figures that decided."""
    name, said = audit.name, []
    if audit.verdict == CARRIES and audit.share is not None:
        said.append(f"{name} carries {percent(audit.share)} of the decision")
    elif audit.verdict == HARDLY and audit.share is not None:
        least = percent(Estimate(audit.least))
        said.append(f"{name} carries less than {least} of the decision: {percent(audit.share)}")
    elif audit.verdict == AGAINST and audit.share is not None:
        said.append(
            f"changing {name} moves the decision the other way, {percent(audit.share)}: are the pairs the "
            "wrong way round?"
        )
    elif audit.share is None:
        said.append(f"it cannot be told how much of the decision {name} carries")
    else:
        few = "" if audit.share.low is None else f"; give more than {counted(audit.n, 'pair')}"
        said.append(
            f"it cannot be told whether {name} carries any of the decision: "
            f"{percent(audit.share)}{few or '; intervals take 5 pairs of both or more'}"
        )
    said.append(f"changing it alone turns {percent(audit.flips)} of the answers")
    if audit.circuit is not None and audit.necessity is not None:
        confirmed = {True: ", which confirms it", False: ", so most of it goes another way", None: ""}
        said.append(
            f"its circuit has {len(audit.circuit):,} of {counted(audit.circuit.graph.n_edges, 'edge')}; "
            f"without them {percent(audit.necessity)} of its effect is lost{confirmed[audit.confirmed]}"
        )
    name, before = audit.worst_before
    group = f"the worst group ({name}) is right {percent(before)} of the time"
    if (after := audit.worst_after) is not None and audit.ablated is not None:
        edges = counted(len(audit.ablated), "edge")
        group += f"; without the {edges} of its own the worst ({after[0]}) is right {percent(after[1])}"
    return " ".join(map(sentence, [*said, group]))


def sentence(said: str) -> str:
    """With a capital letter and a full stop."""
    return f"{said[:1].upper()}{said[1:]}{'' if said.endswith('?') else '.'}"
