"""The parts of a Markdown report that go beyond the figures: tests, robustness, hypotheses, stability."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from circuitvit.verification.bootstrap import Estimate
from circuitvit.verification.claims_report import verdicts_to_markdown
from circuitvit.verification.markup import plain, row
from circuitvit.verification.outcome import FAILED, PASSED, Outcome
from circuitvit.verification.robustness import RobustnessRow

if TYPE_CHECKING:
    from circuitvit.verification.report import Report

EDGES_SHOWN = 50


def conclusion_sentences(report: Report) -> Iterator[str]:
    """What the tests say together, first of all; nothing where none was made."""
    if not report.tests:
        return
    said = {
        PASSED: "The circuit **passes**.",
        FAILED: "The circuit **fails**.",
    }.get(report.conclusion, "There is **not enough evidence** to say whether the circuit holds.")
    yield f"{said} {plain(report.reasons)}"
    ideals = [each for each in report.tests if not each.decisive and each.verdict == FAILED]
    if ideals:
        yield ""
        yield f"It falls short of {'an ideal' if len(ideals) == 1 else 'ideals'} that few circuits meet:"
        yield ""
        for each in ideals:
            yield f"- {plain(each.name)}: {plain(each.reason)}"
    yield ""


def further_findings(report: Report) -> list[str]:
    """The sections of everything that was asked for beyond the figures."""
    lines: list[str] = []
    if report.tests:
        lines += ["## Tests", "", *_tests(report.tests), ""]
    if report.robustness is not None:
        lines += ["## Robustness", "", plain(str(report.robustness)), "", *_table(report.robustness.rows), ""]
    if report.hypotheses:
        lines += ["## Hypotheses", "", *verdicts_to_markdown(report.hypotheses), ""]
    if report.edge_stability:
        lines += ["## Stability under other images", "", *_stability(report), ""]
    return lines


def _tests(tests: tuple[Outcome, ...]) -> Iterator[str]:
    for each in tests:
        yield f"- {plain(each.question)} **{each.verdict.capitalize()}**: {plain(each.reason)}"
    yield ""
    yield from row("test", "verdict", "figure", "value", "p", "level", "power", "pairs", header=True)
    for each in tests:
        yield from row(
            each.name, each.verdict, each.statistic, str(each.effect), _number(each.p_value),
            f"{each.alpha:g}", _number(each.power), str(each.n),
        )  # fmt: skip
    yield ""
    yield "What each p-value means, and what it takes for granted:"
    yield ""
    for each in tests:
        said = f"{each.name}: null hypothesis: {each.null}. {each.assumes} ({each.source})"
        yield f"- {plain(said)}"


def _table(rows: tuple[RobustnessRow, ...]) -> Iterator[str]:
    yield from row(
        "what changes", "condition", "faithfulness", "necessity", "enough", "needed", "conclusion", "note",
        header=True,
    )  # fmt: skip
    for each in rows:
        figures = [_estimate(each.faithfulness), _estimate(each.necessity)]
        flips = "flips" if each.flips else ""
        yield from row(each.kind, each.condition, *figures, each.enough, each.needed, flips, each.note)


def _stability(report: Report) -> Iterator[str]:
    found = sorted(report.edge_stability.items(), key=lambda item: item[1])
    often = sum(share >= 0.5 for _, share in found)
    yield (
        f"{often} of the circuit's {len(found)} edges are found again on at least half of the resampled sets "
        "of pairs. The least stable come first."
    )
    yield ""
    yield from row("edge", "found again", header=True)
    for name, share in found[:EDGES_SHOWN]:
        yield from row(name, f"{share:.0%}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _estimate(value: Estimate | None) -> str:
    return "" if value is None else str(value)
