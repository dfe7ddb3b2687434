"""How edges look: one place for colours, widths and dashes, so that SVG and DOT pictures agree.

Blue and vermillion are the pair of the Okabe-Ito palette that stays apart in every common kind of
colour blindness. Width is proportional to the magnitude of the effect, so twice as wide means twice
as strong; only very weak edges are drawn wider than they deserve, to remain visible.
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
    """The dash pattern of a token group; the first is solid, and the patterns repeat after six."""
    return _DASHES[group % len(_DASHES)]
