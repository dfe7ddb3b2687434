"""What the page says of a verification: figures on each set of pairs, and their places on a line.

The words are in `page/report.html`. Here is what they need besides the report itself: places on the line, and
which pairs are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from circuitvit.verification import Report
    from circuitvit.verification.report import PairResult, Section

LISTED_PAIRS = 200
"""How many pairs of a section the page lists, those that are off the most; a CSV has all of them."""

BESIDE = 0.12  # how far beside 0 and 1 the line goes at least
FURTHEST = 2.0  # and at most: a random circuit may be anywhere


@dataclass(frozen=True)
class Findings:
    """One set of pairs, as it is shown.

    Attributes:
        section: of the report.
        line: faithfulness of this and of the random circuits.
        pairs: those listed, with how far the circuit alone is off, as a share of the mean behaviour.
    """

    section: Section
    line: Scale
    pairs: tuple[tuple[PairResult, float], ...]

    @property
    def unlisted(self) -> int:
        """How many pairs there is no room for."""
        return len(self.section.pairs) - len(self.pairs)


@dataclass(frozen=True)
class Scale:
    """Places on a line of a drawing.

    Attributes:
        low: figure at its left end.
        high: at its right end.
        width: in units of the drawing.
    """

    low: float
    high: float
    width: float = 600.0

    def at(self, value: float) -> float:
        """The place of a figure; what is outside is put at the end.

        Example:
            >>> Scale(0.0, 2.0).at(0.5), Scale(0.0, 2.0).at(7.0)
            (150.0, 600.0)
        """
        share = (value - self.low) / (self.high - self.low)
        return round(self.width * min(1.0, max(0.0, share)), 1)


def findings_of(report: Report) -> list[Findings]:
    """The sections of a report, those to quote first."""
    sections = [report.task] if report.held_out is None else [report.held_out, report.task]
    return [Findings(each, _line(each), tuple(_pairs(each))) for each in sections]


def _line(section: Section) -> Scale:
    figures = [*_ends(section), 0.0, 1.0]
    low, high = max(-FURTHEST, min(figures)), min(1 + FURTHEST, max(figures))
    return Scale(min(low, -BESIDE), max(high, 1 + BESIDE))


def _ends(section: Section) -> Iterator[float]:
    for value in (section.faithfulness.value, section.faithfulness.low, section.faithfulness.high):
        if value is not None:
            yield value
    if section.random is not None:
        yield from section.random.faithfulness


def _pairs(section: Section) -> Iterator[tuple[PairResult, float]]:
    """The pairs in the order of the task, but for those with the least to say where there are too many."""
    off = [pair.off(section.behaviour) for pair in section.pairs]
    worst = sorted(range(len(off)), key=lambda index: -abs(off[index]))[:LISTED_PAIRS]
    return ((section.pairs[index], off[index]) for index in sorted(worst))
