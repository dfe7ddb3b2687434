"""The page of an audit, for whoever signs off a model: verdict, groups, circuit, what is lost, how it was
measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from circuitvit.errors import counted
from circuitvit.export.difference import difference_of
from circuitvit.export.picture import picture_of
from circuitvit.export.plain_page import diagram_uri, rendered, write_page
from circuitvit.graph.files import clean
from circuitvit.verification.certificates import ABSTAIN, IN, Certificate
from circuitvit.verification.cue import VERDICTS, Audit, sentence
from circuitvit.verification.group_accuracy import GroupAccuracy
from circuitvit.verification.statistics import Estimate, percent, points

DRAWN = 80
"""How many edges a diagram shows of either circuit: with more, none can be followed."""

LISTED = 30
"""How many edges the table shows."""

VOTED = {1: "whichever pair is taken away", 0: "with these pairs", -1: "undecided", -2: "not voted in"}
"""What the vote says of an edge, by how sure it is."""

WIDE, EDGE = 320, 6
"""Of a strip, and of the room at its ends."""


def draw_audit(audit: Audit, path: str | Path) -> Path:
    """Write an audit as a page that needs no other file, for whoever signs off the model.

    Args:
        audit: from `audit_cue`.
        path: of the file, which ends in `.html`.

    Returns:
        The path of the file.

    Raises:
        OptionError: for another ending.
        FileError: if the file cannot be written.
    """
    return write_page(path, audit_page(audit))


def audit_page(audit: Audit) -> str:
    """The page."""
    origin, headline = audit.provenance, sentence(clean(audit.headline))
    return rendered(
        "audit.html",
        title=f"Audit of {clean(origin.model) or 'a model'}: {clean(audit.name)}",
        name=clean(audit.name),
        date=clean(audit.date),
        verdict=audit.verdict,
        means=VERDICTS[audit.verdict].replace("the cue", clean(audit.name)),
        headline=headline,
        reason=clean(audit.reason).removeprefix(headline).strip(),
        tiles=list(_tiles(audit)),
        groups=[_group(each) for each in sorted(audit.groups, key=lambda each: each.before.value)],
        elsewhere=[_group(each) for each in audit.elsewhere],
        ablated=None if audit.ablated is None else counted(len(audit.ablated), "edge"),
        lost=[(clean(each.name), f"{each.n:,}", percent(each.share)) for each in audit.lost],
        figures=[(clean(what), clean(text)) for what, text in audit.figures()],
        diagram=_diagram(audit),
        edges=list(_edges(audit)),
        more=max(0, len(audit.circuit or ()) - LISTED),
        certificate=None if audit.certificate is None else clean(str(audit.certificate)),
        specificity=_specificity(audit),
        facts=list(_facts(audit)),
        data=[(each.what, f"{each.n:,}", each.purpose, each.hash[:12]) for each in audit.data],
        together=audit.together,
        least=f"{audit.least:.0%}",
        task=clean(audit.task),
        n=counted(audit.n, "pair"),
        n_behaviour=counted(audit.n_behaviour, "pair"),
        caveats=[clean(each) for each in audit.caveats],
    )


# -- figures -----------------------------------------------------------------------------------------


def _tiles(audit: Audit) -> Iterator[tuple[str, str, str]]:
    """What is read first: value, interval, and what it is."""
    if audit.share is not None:
        yield *_apart(audit.share), f"of the decision is carried by {clean(audit.name)}"
    name, before = audit.worst_before
    yield *_apart(before), f"right in the worst group ({clean(name)})"
    if (after := audit.worst_after) is not None:
        yield *_apart(after[1]), f"right in the worst group ({clean(after[0])}) without the cue's own edges"


def _apart(found: Estimate) -> tuple[str, str]:
    value, _, interval = percent(found).partition(" (")
    return value, interval.rstrip(")")


def _at(share: float) -> float:
    return round(EDGE + (WIDE - 2 * EDGE) * share, 1)


def _group(each: GroupAccuracy) -> dict[str, Any]:
    """A row of the table, with places across the strip."""
    shown = {
        "name": clean(each.name),
        "n": f"{each.n:,}",
        "before": percent(each.before),
        "at": _at(each.before.value),
    }
    shown |= {"low": _at(_low(each.before)), "high": _at(_high(each.before))}
    if each.after is not None and each.change is not None:
        after = each.after
        shown |= {"after": percent(after), "to": _at(after.value), "change": points(each.change)}
        shown |= {"to_low": _at(_low(after)), "to_high": _at(_high(after))}
    return shown


def _low(found: Estimate) -> float:
    return found.value if found.low is None else found.low


def _high(found: Estimate) -> float:
    return found.value if found.high is None else found.high


def _specificity(audit: Audit) -> dict[str, Any] | None:
    """The matrix of circuits and behaviours."""
    found = audit.specificity
    if found is None:
        return None
    rows = [
        (clean(name), [_cell(found.effect(name, other).necessity) for other in found.names])
        for name in found.names
    ]
    return {"names": [clean(name) for name in found.names], "rows": rows, "said": clean(str(found))}


def _cell(found: Estimate) -> tuple[str, int]:
    """A share, and how dark its cell is, in per cent."""
    return percent(found), round(100 * min(max(found.value, 0.0), 1.0))


# -- the circuit -------------------------------------------------------------------------------------


def _diagram(audit: Audit) -> dict[str, str] | None:
    """The cue's circuit, beside the behaviour's where there is one."""
    if audit.circuit is None:
        return None
    name = clean(audit.name)
    if audit.other is None:
        drawn = picture_of(audit.circuit, title="", max_edges=DRAWN)
        about = f"The circuit of {name}: {counted(len(audit.circuit), 'edge')}."
    else:
        names = (name, "the behaviour")
        drawn = difference_of(audit.circuit, audit.other, names, title="", max_edges=DRAWN)
        shared = len(audit.circuit & audit.other)
        about = (
            f"The circuit of {name} has {counted(len(audit.circuit), 'edge')}, that of the behaviour "
            f"{len(audit.other):,}; {counted(shared, 'edge')} {'is' if shared == 1 else 'are'} in both."
        )
    return {"about": about, "uri": diagram_uri(drawn)}


def _edges(audit: Audit) -> Iterator[tuple[str, str, str]]:
    """The edges of the cue's circuit, the surest first: name, whose they are, and what the vote says."""
    votes = audit.certificate
    for edge in sorted(audit.circuit or (), key=lambda edge: -_sure(votes, edge))[:LISTED]:
        owner = "the behaviour's too" if audit.other is not None and edge in audit.other else "its own"
        sure = _sure(votes, edge)
        stays = f"whichever {counted(sure, 'pair')} are taken away" if sure > 1 else VOTED[sure]
        yield clean(edge), owner, stays


def _sure(votes: Certificate | None, edge: str) -> int:
    """For how many pairs taken away an edge surely stays; 0 if it is merely voted in, less if it is not."""
    if votes is None:
        return -2
    decision = votes.decision(edge)
    return votes.radius(edge) if decision == IN else -1 if decision == ABSTAIN else -2


def _facts(audit: Audit) -> Iterator[tuple[str, str]]:
    origin = audit.provenance
    yield "model", clean(origin.model)
    yield "weights (SHA-256)", clean(origin.weights)
    yield "measured", clean(audit.task)
    if origin.about():
        yield "prompts", clean(origin.about())
    versions = [
        f"circuitvit {origin.library}",
        *(f"{name} {which}" for name, which in origin.libraries.items()),
    ]
    yield "versions", clean(", ".join(versions))
    yield "seed", "" if origin.seed is None else str(origin.seed)
    yield "date", clean(audit.date) or "none was given"
