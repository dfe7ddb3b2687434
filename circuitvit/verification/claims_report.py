"""Verdicts on hypotheses as JSON (`circuitvit.verdicts/1`) and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from circuitvit.errors import OptionError
from circuitvit.graph.files import write_json
from circuitvit.verification.hypothesis import Verdict
from circuitvit.verification.markup import plain, row
from circuitvit.verification.records import to_json
from circuitvit.verification.report import write_text

VERDICTS_SCHEMA = "circuitvit.verdicts/1"


def save_verdicts(verdicts: Sequence[Verdict], path: str | Path) -> Path:
    """Write verdicts; the ending chooses JSON (`.json`) or Markdown (`.md`).

    Raises:
        OptionError: for another ending.
        FileError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix == ".json":
        return write_json(path, {"schema": VERDICTS_SCHEMA, "verdicts": to_json(tuple(verdicts))})
    if path.suffix == ".md":
        return write_text(path, "\n".join(["# Hypotheses", "", *verdicts_to_markdown(verdicts)]) + "\n")
    raise OptionError(f"verdicts are saved as .json or .md, not as {path.name!r}")


def verdicts_to_markdown(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Sentences first, then a table."""
    for each in verdicts:
        yield f"- **{each.verdict.capitalize()}**: {plain(each.claim)}. {plain(each.reason)}"
    yield ""
    yield from row(
        "claim", "expected", "done", "figure", "value", "p", "pairs", "about", "verdict", header=True
    )
    for each in verdicts:
        p_value = "" if each.p_value is None else f"{each.p_value:.2g}"
        yield from row(
            each.claim, each.expectation, each.intervention, each.statistic, str(each.effect), p_value,
            str(each.n), each.scope, each.verdict,
        )  # fmt: skip
