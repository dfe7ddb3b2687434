"""The drawing as TikZ, for papers: places, sizes and colours are those of the SVG, the font is the paper's.

Title and legend are left out: in a paper they are the caption's. (matplotlib writes PGF too, but only where a
TeX system is installed, which it asks how wide each text is.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from circuitvit.export import style
from circuitvit.export.figure import LABELS, ORIGIN, QUIET, Font, Panel, Pixels, put_drawing
from circuitvit.export.layout import Box, Point, lay_out
from circuitvit.export.picture import Picture
from circuitvit.export.style import EdgeLook
from circuitvit.graph.files import clean

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",  # the straight one needs a font encoding that not every paper has
    **{letter: f"\\{letter}" for letter in "{}$&#_%"},
}
_HEADER = """\
% {title}
% {counts}
% Needs \\usepackage{{tikz}}. Fit it to a column with \\resizebox{{\\columnwidth}}{{!}}{{\\input{{...}}}}.
{colours}
\\begin{{tikzpicture}}[x=0.75pt, y=-0.75pt,
  every node/.style={{inner sep=0pt, font=\\sffamily}}]
"""


def tikz_of(picture: Picture) -> str:
    """The picture as a `tikzpicture` environment to `\\input` in a document.

    Example:
        >>> from circuitvit.export.picture import picture_of
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> tikz_of(picture_of(circuit)).rstrip().endswith(r"\\end{tikzpicture}")
        True
    """
    layout, canvas = lay_out(picture), _Canvas()
    for block, (top, bottom) in layout.stripes.items():
        base = (top + bottom) / 2 + 0.36 * QUIET.size
        canvas.text((2 - LABELS, base), block, QUIET)
    put_drawing(canvas, Panel("", picture, layout), {})
    colours = "\n".join(f"\\definecolor{{cv{name}}}{{HTML}}{{{name}}}" for name in canvas.colours)
    header = _HEADER.format(title=tex(picture.title), counts=tex(picture.counts), colours=colours)
    return header + "\n".join([*canvas.lines, "\\end{tikzpicture}", ""])


def tex(text: str) -> str:
    r"""Text in which TeX finds no command.

    Example:
        >>> tex(r"\input{x} 50%")
        '\\textbackslash{}input\\{x\\} 50\\%'
    """
    return "".join(_SPECIAL.get(letter, letter) for letter in clean(text))


@dataclass(frozen=True)
class _Canvas:
    """Collects commands, and the colours that they use; see `figure.Canvas`."""

    lines: list[str] = field(default_factory=list)
    colours: dict[str, None] = field(default_factory=dict)

    def group(self, at: Point = ORIGIN, said: str = "", kind: str = "", fill: str = "") -> _Canvas:
        return self  # a single drawing stands at the origin

    def rect(self, box: Box, fill: str, stroke: str = "", radius: float = 0.0) -> None:
        look = f"draw={self._colour(stroke)}, fill={self._colour(fill)}, rounded corners={0.75 * radius}pt"
        corners = _point((box.left, box.top)), _point((box.right, box.bottom))
        self.lines.append(f"\\draw[{look}] {' rectangle '.join(corners)};")

    def dot(self, at: Point, radius: float, fill: str, said: str = "") -> None:
        place = f"{_point(at)} circle[radius={0.75 * radius:.2f}pt]"
        self.lines.append(f"\\fill[{self._colour(fill)}] {place};")

    def stroke(self, points: Sequence[Point], look: EdgeLook, said: str = "") -> None:
        options = f"{self._colour(look.colour)}, line width={0.75 * look.width:.2f}pt"
        options += f", opacity={look.opacity:.2f}"
        if look.dash:
            lengths = [f"{0.75 * float(length):.2f}pt" for length in look.dash.split()]
            pairs = zip(lengths[::2], lengths[1::2], strict=True)
            options += ", dash pattern=" + " ".join(f"on {on} off {off}" for on, off in pairs)
        way = _point(points[0])
        for at in range(1, len(points), 3):
            first, second, end = map(_point, points[at : at + 3])
            way += f" .. controls {first} and {second} .. {end}"
        self.lines.append(f"\\draw[{options}] {way};")

    def area(self, corners: Sequence[Point], fill: str) -> None:
        self.lines.append(f"\\fill[{self._colour(fill)}] {' -- '.join(map(_point, corners))} -- cycle;")

    def text(self, at: Point, words: str, font: Font, middle: bool = False) -> None:
        where = f"text={self._colour(font.colour)}, anchor={'base' if middle else 'base west'}"
        points = round(0.75 * font.size)
        bold = "\\bfseries" if font.weight >= 600 else ""
        size = f"\\fontsize{{{points}}}{{{points}}}\\selectfont{bold}"
        self.lines.append(f"\\node[{where}] at {_point(at)} {{{size} {tex(words)}}};")

    def image(self, box: Box, pixels: Pixels) -> None:
        raise AssertionError("TikZ figures hold no thumbnails")

    def _colour(self, code: str) -> str:
        if code == style.PAPER:
            return "white"
        self.colours.setdefault(code[1:])
        return f"cv{code[1:]}"


def _point(point: Point) -> str:
    return f"({point[0]:.1f},{point[1]:.1f})"
