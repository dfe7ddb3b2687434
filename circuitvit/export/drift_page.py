"""What changed in a model, as a page without scripts or other files: verdict, edges and diagrams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from circuitvit.errors import counted
from circuitvit.export.difference import difference_of
from circuitvit.export.plain_page import diagram_uri, rendered, write_page
from circuitvit.graph import CircuitLike
from circuitvit.graph.files import clean
from circuitvit.graph.results import Record
from circuitvit.verification.drift import VERDICTS, Drift, search_told, signed

LISTED = 20
"""How many edges the table shows."""

DRAWN = 60
"""How many edges a diagram shows of each side: with more, none can be followed."""

LEAST = 0.02
"""The effect from which on an edge is drawn, as a share of the old behaviour."""

WIDE, EDGE = 320, 8
"""Of a strip, and of the room at its ends."""


def draw_drift(found: Drift, path: str | Path) -> Path:
    """Write what `diff` found as a page: verdict, figures, the edges that changed most, and diagrams.

    Args:
        found: from `diff`.
        path: of the file, which ends in `.html`.

    Returns:
        The path of the file.

    Raises:
        OptionError: for another ending.
        FileError: if the file cannot be written.
    """
    return write_page(path, drift_page(found))


def drift_page(found: Drift) -> str:
    """The page."""
    edges = sorted(found.records(), key=lambda each: -abs(_number(each, "change")))[:LISTED]
    scale = _Scale(edges)
    names = (clean(each.model) or "a model" for each in (found.before, found.after))
    figures = [(name, str(each)) for name, each in found.figures()]
    if found.largest is not None:
        figures.append(("largest change of an edge", f"at most {found.largest:.3f}"))
    return rendered(
        "drift.html",
        title=f"What changed: {' to '.join(names)}",
        task=clean(found.before.task),
        weights=[clean(each.weights[:12]) or "unknown" for each in (found.before, found.after)],
        verdict=found.verdict,
        means=VERDICTS[found.verdict],
        reason=clean(found.reason),
        caveats=[clean(each) for each in found.caveats],
        pairs=counted(found.n, "pair"),
        figures=figures,
        measured=counted(len(found.edges), "edge"),
        gained=len(found.moved("gained")),
        lost=len(found.moved("lost")),
        rows=[_row(each, scale) for each in edges],
        ends=[f"{end:+.2f}" for end in (scale.low, scale.high)],
        zero=scale.at(0.0),
        diagrams=list(_diagrams(found)),
    )


# -- the edges -------------------------------------------------------------------------------------


class _Scale:
    """Places across a strip, the same in all rows; 0 is always on it."""

    def __init__(self, rows: Sequence[Record]) -> None:
        ends = [0.0]
        for each in rows:
            old, new = _number(each, "old"), _number(each, "new")
            ends += [old, new, old + _number(each, "low"), old + _number(each, "high")]
        self.low, self.high = min(ends), max(ends)

    def at(self, value: float) -> float:
        share = (value - self.low) / ((self.high - self.low) or 1.0)
        return round(EDGE + (WIDE - 2 * EDGE) * share, 1)


def _number(each: Record, name: str) -> float:
    value = each[name]
    assert isinstance(value, float)
    return value


def _row(each: Record, scale: _Scale) -> dict[str, Any]:
    old, new = _number(each, "old"), _number(each, "new")
    said = [str(each["moved"]), "in the circuit" if each["in_circuit"] else ""]
    return {
        "edge": clean(str(each["edge"])),
        **{name: signed(value) for name, value in {"old": old, "new": new, "change": new - old}.items()},
        "from": scale.at(old),
        "to": scale.at(new),
        "low": scale.at(old + _number(each, "low")),
        "high": scale.at(old + _number(each, "high")),
        "said": ", ".join(filter(None, said)),
    }


# -- the diagrams ----------------------------------------------------------------------------------


def _diagrams(found: Drift) -> Iterator[dict[str, str]]:
    """The strong edges of both models, and the stored circuit beside the one found anew."""
    if found.old is not None:
        before, after = found.effects(LEAST)
        if len(before) or len(after):
            about = (
                f"Edges whose effect is at least {LEAST:.0%} of the old behaviour, in the old weights, in "
                f"the new ones or in both; the {DRAWN} strongest of each."
            )
            yield _diagram("Strong edges, old and new", about, before, after, ("old weights", "new weights"))
    if found.found is not None:
        names = ("stored", "found anew")
        yield _diagram(
            "The stored circuit and a new one", search_told(found), found.circuit, found.found, names
        )


def _diagram(
    title: str, about: str, first: CircuitLike, second: CircuitLike, names: tuple[str, str]
) -> dict[str, str]:
    drawn = difference_of(first, second, names, title="", max_edges=DRAWN)
    return {"title": title, "about": about, "uri": diagram_uri(drawn)}
