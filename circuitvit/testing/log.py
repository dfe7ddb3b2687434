"""What assertions found, kept for the summary of the pytest plugin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One assertion's finding.

    Attributes:
        assertion: name of the function.
        found: one line.
        held: whether the assertion held.
        test: id of the test that made it, where pytest runs.
    """

    assertion: str
    found: str
    held: bool
    test: str = ""


_ENTRIES: list[Entry] = []
_TEST = [""]


def entries() -> tuple[Entry, ...]:
    """All findings of this process, in order."""
    return tuple(_ENTRIES)


def record(assertion: str, found: str, held: bool) -> None:
    """Keep a finding, and fail with it if it does not hold.

    Raises:
        AssertionError: if `held` is False.
    """
    __tracebackhide__ = True  # pytest shows the line of the test, not this one
    _ENTRIES.append(Entry(assertion, found, held, _TEST[0]))
    if not held:
        raise AssertionError(found)


def begin_test(name: str) -> None:
    """Findings from here on belong to this test."""
    _TEST[0] = name


def forget() -> None:
    """Drop all findings, at the start of a session."""
    _ENTRIES.clear()
