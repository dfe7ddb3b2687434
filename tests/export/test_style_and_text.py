"""The small decisions that all formats share: colours, widths, and texts that fit."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from circuitvit.export.style import (
    COLOURS,
    EdgeLook,
    dash_of,
    edge_look,
    fit,
    number,
    text_width,
    widest,
    width_of,
    wrap,
)
from circuitvit.graph.files import clean
from tests.export.geometry import true_width


def luminance(colour: str) -> float:
    """Relative luminance after WCAG 2.1, 0 (black) to 1 (white)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def seen_by_a_deuteranope(colour: str) -> tuple[float, float, float]:
    """The colour without the green cones (Machado, Oliveira and Fernandes 2009, severity 1)."""
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return (
        0.367322 * red + 0.860646 * green - 0.227968 * blue,
        0.280085 * red + 0.672501 * green + 0.047413 * blue,
        -0.011820 * red + 0.042940 * green + 0.968881 * blue,
    )


def test_signs_can_be_told_apart_without_green_cones() -> None:
    for one, other in combinations(COLOURS.values(), 2):
        seen = zip(seen_by_a_deuteranope(one), seen_by_a_deuteranope(other), strict=True)
        assert max(abs(first - second) for first, second in seen) > 50


@pytest.mark.parametrize("colour", COLOURS.values())
def test_edges_stand_out_from_white_paper(colour: str) -> None:
    assert 1.05 / (luminance(colour) + 0.05) > 3  # what WCAG asks of graphics


@given(st.floats(0, 1), st.floats(0, 1), st.floats(1, 5))
def test_a_stronger_edge_is_never_thinner_or_fainter(one: float, other: float, max_width: float) -> None:
    weak, strong = (edge_look("supports", share, max_width) for share in sorted((one, other)))
    assert weak.width <= strong.width <= max_width
    assert weak.opacity <= strong.opacity <= 1
    assert weak.width >= 0.18 * max_width


@given(st.floats(0.18, 1), st.floats(1, 5))
def test_width_is_proportional_to_magnitude(share: float, max_width: float) -> None:
    assert width_of(share, max_width) == pytest.approx(share * max_width)


@given(st.integers(0, 5000), st.integers(0, 5000))
def test_crowded_pictures_have_finer_lines(one: int, other: int) -> None:
    assert widest(min(one, other)) >= widest(max(one, other))


def test_token_groups_have_different_dashes() -> None:
    assert len({dash_of(group) for group in range(16)}) == 16
    assert isinstance(edge_look("opposes", 1.0, 3.0, group=7), EdgeLook)


@given(st.text(st.characters(codec=None)))
def test_clean_text_is_one_line_of_visible_characters(text: str) -> None:
    cleaned = clean(text)
    assert cleaned.replace(" ", "").isprintable()
    assert "  " not in cleaned
    assert cleaned == cleaned.strip()
    assert clean(cleaned) == cleaned
    cleaned.encode()  # no lone surrogates


@given(
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=30), st.sampled_from([10.0, 15.0])
)
def test_text_is_measured_rather_too_wide_than_too_narrow(text: str, size: float) -> None:
    assert text_width(text, size) >= 0.999 * true_width(text, size)


@given(st.text(), st.floats(20, 200))
def test_text_is_cut_to_fit(text: str, room: float) -> None:
    cut = fit(text, 10, room)
    assert text_width(cut, 10) <= room
    assert cut == text or cut.endswith("…")


@given(st.text(), st.floats(20, 200), st.integers(1, 4))
def test_text_is_wrapped_to_fit(text: str, room: float, max_lines: int) -> None:
    lines = wrap(text, 10, room, max_lines)
    assert len(lines) <= max_lines
    assert all(text_width(line, 10) <= room for line in lines)
    if not any("…" in line for line in lines):
        assert " ".join(lines).split() == text.split()


def test_numbers_have_three_digits() -> None:
    assert [number(value, signed=True) for value in (0.0, -1.23456, 1e-9)] == ["+0", "-1.23", "+1e-09"]
