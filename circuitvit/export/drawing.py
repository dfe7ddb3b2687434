"""`draw`: from a circuit to a file; the file's ending chooses the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from circuitvit.errors import OptionError
from circuitvit.export.dot import dot_of, rendered
from circuitvit.export.graphml import graphml_of
from circuitvit.export.picture import Picture, picture_of
from circuitvit.export.svg import svg_of
from circuitvit.graph import Circuit, Direction
from circuitvit.graph.files import write_bytes

__all__ = ["FORMATS", "draw"]

Writer = Callable[[Picture], bytes]

_PICTURES: Mapping[str, Writer] = {
    "svg": lambda picture: svg_of(picture).encode(),
    "dot": lambda picture: dot_of(picture).source.encode(),
    "pdf": lambda picture: rendered(picture, "pdf"),
    "png": lambda picture: rendered(picture, "png"),
}
_OTHER_NAMES = {"gv": "dot"}
_DATA = ("graphml", "json")

FORMATS = (*_PICTURES, *_OTHER_NAMES, *_DATA)
"""The formats that `draw` writes, which are also the file endings that it knows."""


def draw(
    circuit: Circuit,
    path: str | Path,
    *,
    format: str | None = None,
    title: str | None = None,
    max_edges: int | None = None,
    direction: Direction | None = None,
) -> Path:
    """Draw a circuit, or write it as a graph for other programs.

    | ending | what it holds | needs |
    | --- | --- | --- |
    | `.svg` | the diagram: rows by layer, columns by head, hover texts | nothing |
    | `.dot`, `.gv` | the diagram as Graphviz source | nothing |
    | `.pdf`, `.png` | the diagram laid out by Graphviz | the program `dot` |
    | `.graphml` | nodes and edges for Gephi, Cytoscape, networkx | nothing |
    | `.json` | the circuit itself, as `Circuit.save` writes it | nothing |

    Args:
        circuit: to draw; edges have a width and a sign where it carries scores.
        path: of the file; it is written whole or not at all.
        format: one of `FORMATS`, when the ending of `path` does not say it.
        title: above the diagram; by default it names the model.
        max_edges: draw only this many edges, the strongest, and say so in the legend.
        direction: whether scores are those of ablating ("noising") or restoring ("denoising") an edge; by
            default what the circuit's provenance says, else "noising".

    Returns:
        The path of the file.

    Raises:
        OptionError: if the format is unknown or an option makes no sense.
        FileError: if the file cannot be written, or the program `dot` is needed and missing.

    Example:
        >>> import tempfile
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> draw(circuit, Path(tempfile.mkdtemp()) / "circuit.svg", title="Two edges").name
        'circuit.svg'
    """
    path = Path(path)
    kind = _format_of(path, format)
    if kind in _PICTURES:
        picture = picture_of(circuit, title, max_edges, direction)
        return write_bytes(path, _PICTURES[kind](picture))
    if max_edges is not None:
        raise OptionError(f"max_edges thins out pictures; a .{kind} file always holds the whole circuit")
    if kind == "json":
        return circuit.save(path)
    return write_bytes(path, graphml_of(circuit, title).encode())


def _format_of(path: Path, asked: str | None) -> str:
    said = (path.suffix if asked is None else asked).lower().lstrip(".")
    known = ", ".join(f".{name}" for name in FORMATS)
    if not said:
        raise OptionError(f"{path} has no ending to tell the format by: choose from {known}")
    if said not in FORMATS:
        raise OptionError(f"cannot draw a .{said} file: choose from {known}")
    return _OTHER_NAMES.get(said, said)
