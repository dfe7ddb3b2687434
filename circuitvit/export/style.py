"""The small decisions that all formats share: colours, widths and dashes of edges, and texts that fit.

Blue and vermillion are the pair of the Okabe-Ito palette that stays apart in every common kind of
colour blindness. Width is proportional to the magnitude of the effect, so twice as wide means twice
as strong; only very weak edges are drawn wider than they deserve, to remain visible.

Names and titles come from files and users, so they may hold anything. Markup characters are left to the
writer of each format to escape; `clean` of `graph.files` takes out what no format can hold or show safely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sign = Literal["supports", "opposes", "unscored"]
"""What an edge does for the behaviour; "unscored" also where its effect is exactly 0."""

COLOURS: dict[Sign, str] = {"supports": "#0072B2", "opposes": "#D55E00", "unscored": "#5A5F66"}
INK = "#1F2328"  # text and outlines
MUTED = "#6B727B"  # secondary text; 4.9:1 on white, so it can still be read
FAINT = "#C9CED6"  # nodes outside the circuit
STRIPE = "#F5F6F8"  # every other layer
MLP_FILL = "#E9ECF1"
END_FILL = "#30363D"  # input and logits
PAPER = "#FFFFFF"
FONT = "Helvetica Neue, Helvetica, Arial, Liberation Sans, DejaVu Sans, sans-serif"

THINNEST = 0.18  # of the widest edge
UNSCORED_WIDTH = 1.3
FAINTEST = 0.5
_DASHES = ("", "6 2.5", "1.2 2.4", "8 2.5 1.2 2.5", "3 2", "10 3 3 3")


@dataclass(frozen=True)
class EdgeLook:
    """How one edge is drawn.

    Attributes:
        colour: of the stroke, as `#RRGGBB`.
        width: of the stroke, in pixels.
        opacity: of the stroke, 0 to 1; weak edges are fainter, so that strong ones stand out.
        dash: SVG dash pattern, "" for a solid line; it tells token groups apart.
    """

    colour: str
    width: float
    opacity: float
    dash: str = ""


def widest(n_edges: int) -> float:
    """Width in pixels of the strongest edge: finer in crowded pictures, where lines need room.

    Example:
        >>> widest(20), widest(300), widest(3000)
        (5.0, 3.2, 2.2)
    """
    if n_edges <= 40:
        return 5.0
    return 4.0 if n_edges <= 150 else 3.2 if n_edges <= 600 else 2.2


def edge_look(sign: Sign, share: float, max_width: float, group: int = 0) -> EdgeLook:
    """How to draw an edge.

    Args:
        sign: what the edge does for the behaviour.
        share: its magnitude over that of the strongest edge in the picture, 0 to 1.
        max_width: width of the strongest edge, see `widest`.
        group: place of its token group among the graph's groups.

    Example:
        >>> edge_look("supports", 0.5, max_width=4.0)
        EdgeLook(colour='#0072B2', width=2.0, opacity=0.725, dash='')
    """
    if sign == "unscored":
        return EdgeLook(COLOURS[sign], UNSCORED_WIDTH, 0.6, dash_of(group))
    opacity = FAINTEST + (0.95 - FAINTEST) * share
    return EdgeLook(COLOURS[sign], width_of(share, max_width), round(opacity, 3), dash_of(group))


def width_of(share: float, max_width: float) -> float:
    """Width in pixels of an edge of this share of the largest magnitude.

    Example:
        >>> width_of(0.5, max_width=4.0), width_of(0.0, max_width=4.0)
        (2.0, 0.72)
    """
    return max_width * max(THINNEST, share)


def dash_of(group: int) -> str:
    """The dash pattern of a token group; the first is solid. Those of many groups, such as the frames of a
    clip, are a dash and ever more dots, so that no two are alike.
    """
    return _DASHES[group] if group < len(_DASHES) else "10 2.5" + " 1.2 2.5" * (group + 2 - len(_DASHES))


# -- text: made inert, measured without a font, cut or wrapped to fit ------------------------------

_NARROW = frozenset("fijlrtI.,:;!|'`()[]{}-/\\ ")
_WIDE = frozenset("mwMWOQGD%&+<>=_#~")


def text_width(text: str, size: float) -> float:
    """About how wide `text` is at this font size, in pixels; rather too wide than too narrow.

    Which font a viewer has is not known, so this goes by classes of letters, with the figures of the
    widest font of the stack (DejaVu Sans).

    Example:
        >>> text_width("a3.h1", 10) < text_width("a11.h11", 10)
        True
    """
    return size * sum(_em(letter) for letter in text)


def _em(letter: str) -> float:
    if letter in _NARROW:
        return 0.42
    if letter in _WIDE:
        return 0.98
    if letter == "@":
        return 1.02
    if letter.isascii():
        return 0.76 if letter.isupper() else 0.64
    return 1.15  # wide scripts and emoji


def fit(text: str, size: float, room: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `room` pixels.

    Example:
        >>> fit("a very long name", 10, 60)
        'a very l…'
    """
    width, cut = 0.0, 0
    ending = text_width("…", size)
    for place, letter in enumerate(text):  # one pass, since a hostile title may be megabytes long
        if width + ending <= room:
            cut = place
        width += text_width(letter, size)
        if width > room:
            return text[:cut].rstrip() + "…"
    return text


def wrap(text: str, size: float, room: float, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `room` pixels; what does not fit ends in an ellipsis.

    Example:
        >>> wrap("one two three four", 10, 60, max_lines=2)
        ['one two', 'three four']
    """
    lines: list[str] = []
    words = text.split()
    while words:
        if len(lines) == max_lines - 1:
            return [*lines, fit(" ".join(words), size, room)]
        taken = 1
        while taken < len(words) and text_width(" ".join(words[: taken + 1]), size) <= room:
            taken += 1
        lines.append(fit(" ".join(words[:taken]), size, room))
        words = words[taken:]
    return lines


def number(value: float, signed: bool = False) -> str:
    """A number in three significant digits, the same on every machine.

    Example:
        >>> number(0.01234), number(2.0, signed=True), number(123456.0)
        ('0.0123', '+2', '1.23e+05')
    """
    return f"{value:+.3g}" if signed else f"{value:.3g}"
