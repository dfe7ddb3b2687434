"""The picture as TikZ, for papers: places and colours are those of the SVG, fonts those of the paper."""

from __future__ import annotations

from circuitvit.export import style
from circuitvit.export.axes import Box
from circuitvit.export.curves import Line
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.picture import DrawnNode, Picture
from circuitvit.export.text import clean

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
  every node/.style={{inner sep=0pt, font=\\sffamily\\scriptsize}}]"""


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
    layout = lay_out(picture)
    lines = [
        _HEADER.format(
            title=tex(picture.title), counts=tex(picture.counts), colours="\n".join(_colours(picture))
        )
    ]
    for layer, (top, bottom) in sorted(layout.stripes.items()):
        lines.append(
            f"\\node[text=cvmuted, anchor=west] at (-52,{_n((top + bottom) / 2)}) {{layer {layer}}};"
        )
    lines += [_edge(line) for line in layout.lines]
    for node in picture.nodes:
        if node.present:
            lines += _node(node, layout.boxes[node.name], layout)
        else:
            x, y = layout.dots[node.name]
            lines.append(f"\\fill[cvfaint] ({_n(x)},{_n(y)}) circle[radius=1.3pt];")
    return "\n".join([*lines, "\\end{tikzpicture}", ""])


def tex(text: str) -> str:
    r"""Text in which TeX finds no command.

    Example:
        >>> tex(r"\input{x} 50%")
        '\\textbackslash{}input\\{x\\} 50\\%'
    """
    return "".join(_SPECIAL.get(letter, letter) for letter in clean(text))


def _colours(picture: Picture) -> list[str]:
    named = {"ink": style.INK, "muted": style.MUTED, "faint": style.FAINT, "mlp": style.MLP_FILL}
    named |= {"end": style.END_FILL} | {edge.look.colour[1:]: edge.look.colour for edge in picture.edges}
    return [f"\\definecolor{{cv{name}}}{{HTML}}{{{colour[1:]}}}" for name, colour in named.items()]


def _edge(line: Line) -> str:
    look = line.edge.look
    options = [
        f"cv{look.colour[1:]}", f"line width={look.width * 0.75:.2f}pt", f"opacity={look.opacity:.2f}"
    ]  # fmt: skip
    if look.dash:
        lengths = [f"{float(length) * 0.75:.2f}pt" for length in look.dash.split()]
        pairs = zip(lengths[::2], lengths[1::2], strict=True)
        options.append("dash pattern=" + " ".join(f"on {on} off {off}" for on, off in pairs))
    way = f"({_n(line.start[0])},{_n(line.start[1])})"
    for first, second, end in line.pieces:
        points = [f"({_n(x)},{_n(y)})" for x, y in (first, second, end)]
        way += f" .. controls {points[0]} and {points[1]} .. {points[2]}"
    return f"\\draw[{', '.join(options)}] {way};"


def _node(node: DrawnNode, box: Box, layout: Layout) -> list[str]:
    fill, ink = {"head": ("white", "cvink"), "mlp": ("cvmlp", "cvink")}.get(node.kind, ("cvend", "white"))
    corner = 7.5 if node.kind == "mlp" else 3.0
    shape = f"draw=cvink, fill={fill}, rounded corners={corner}pt"
    y = box.top + (11.5 if node.kind == "head" else box.height / 2)
    lines = [
        f"\\draw[{shape}] ({_n(box.left)},{_n(box.top)}) rectangle ({_n(box.right)},{_n(box.bottom)});",
        f"\\node[text={ink}] at ({_n(box.middle)},{_n(y)}) {{\\bfseries {tex(node.name)}}};",
    ]
    for port, x in layout.ports[node.name].items():
        if node.kind == "head":
            colour = "cvink" if port in node.used else "cvfaint"
            place = f"({_n(x)},{_n(box.bottom - 7)})"
            lines.append(f"\\node[text={colour}] at {place} {{\\tiny {tex(port)}}};")
        if port in node.used:
            corners = ((x - 3.6, box.bottom + 4.5), (x, box.bottom), (x + 3.6, box.bottom + 4.5))
            lines.append(
                "\\fill[cvink] " + " -- ".join(f"({_n(a)},{_n(b)})" for a, b in corners) + " -- cycle;"
            )
    return lines


def _n(value: float) -> str:
    return f"{value:.1f}"
