"""`draw`: from a circuit to a file; the file's ending chooses the format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from circuitvit.errors import FileError, OptionError
from circuitvit.export import maps as node_maps
from circuitvit.export.examples import HasExamples, gallery
from circuitvit.export.figure import Figure, figure_of
from circuitvit.export.graphs import dot_of, graphml_of
from circuitvit.export.page import Curve, Intervals, by_strength, page_data, page_of
from circuitvit.export.picture import THUMB, Picture, picture_of, thumb_size
from circuitvit.export.svg import svg_of_figure
from circuitvit.export.tikz import tikz_of
from circuitvit.graph import Circuit, CircuitLike, Direction, as_circuit
from circuitvit.graph.files import write_bytes
from circuitvit.models import Model
from circuitvit.models.refined import unit_labels
from circuitvit.tasks import PreparedTask, Task

if TYPE_CHECKING:
    from circuitvit.verification import Report

FIGURES = ("svg", "pdf", "png")
"""Pictures that can hold several drawings, and thumbnails."""

SOURCES: Mapping[str, Callable[[Picture], str]] = {
    "dot": lambda picture: dot_of(picture).source,
    "tex": tikz_of,
}
"""How to write the formats that are to be finished by hand."""

_OTHER_NAMES = {"gv": "dot", "htm": "html", "tikz": "tex"}
_DATA = ("graphml", "json")

FORMATS = ("html", *FIGURES, *SOURCES, *_OTHER_NAMES, *_DATA)
"""The formats that `draw` writes, which are also the file endings that it knows."""


def draw(
    circuit: CircuitLike,
    path: str | Path,
    *,
    format: str | None = None,
    title: str | None = None,
    max_edges: int | None = None,
    direction: Direction | None = None,
    model: Model | None = None,
    task: Task | PreparedTask | None = None,
    pair: int = 0,
    thumbnails: bool | None = None,
    image: str = "clean",
    curve: Curve | None = None,
    intervals: Intervals | None = None,
    report: Report | None = None,
    labels: Mapping[str, str] | None = None,
    examples: HasExamples | None = None,
) -> Path:
    """Draw a circuit, or write it as a graph for other programs.

    | ending | what it holds |
    | --- | --- |
    | `.html` | the interactive page: one file that works offline, with images, attention and report |
    | `.svg` | the diagram: rows by layer, columns by head, hover texts |
    | `.pdf`, `.png` | the same diagram; needs matplotlib (`pip install 'circuitvit[plots]'`) |
    | `.tex`, `.tikz` | the drawing as TikZ, without title and legend |
    | `.dot`, `.gv` | the diagram as Graphviz source |
    | `.graphml` | nodes and edges for Gephi, Cytoscape, networkx |
    | `.json` | the circuit itself, as `Circuit.save` writes it |

    Args:
        circuit: to draw, or what a search found, or a file's path; edges have a width and a sign where it
            carries scores.
        path: of the file; it is written whole or not at all.
        format: one of `FORMATS`, when the ending of `path` does not say it.
        title: above the diagram; by default it names the model.
        max_edges: draw only this many edges, the strongest, and say so in the legend.
        direction: whether scores are those of ablating ("noising") or restoring ("denoising") an edge; by
            default what the circuit's provenance says, else "noising".
        model: the circuit's, for images of what its nodes do; needs `task`.
        task: whose images are shown.
        pair: which of its pairs.
        thumbnails: whether nodes carry small images of what they do; by default in the page, when `model`
            and `task` are given, and not in `.svg`, `.pdf` and `.png`. Other formats hold none. Of clips they
            are strips of frames.
        image: whose thumbnails the static figures show, "clean" or "corrupt"; the page has both.
        curve: for the page, faithfulness at several sizes: `(edges, faithfulness)`.
        intervals: for the page, the ends of the confidence interval of edges' effects, by name.
        report: for the page, the verification of this circuit, written under the diagram.
        labels: of pictures and the page, by the names of nodes what is said of them, in their boxes: such as
            what `text_span` found that heads say. With `model`, features bear those of their dictionary.
        examples: for the page, what `top_images` found of nodes, such as neurons and features of a refined
            model. Each of these shows its top images, lit where it is active.

    Returns:
        The path of the file.

    Raises:
        OptionError: if the format is unknown, an option makes no sense, the report is of another circuit, or
            examples are of other nodes.
        NameNotFoundError: if a label is for a node that is not there.
        FileError: if the file cannot be written, or matplotlib is needed and missing.

    Example:
        >>> import tempfile
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(1, 2), ["input->m0", "m0->logits"])
        >>> draw(circuit, Path(tempfile.mkdtemp()) / "circuit.html", title="Two edges").name
        'circuit.html'
    """
    path, circuit = Path(path), as_circuit(circuit)
    kind = format_of(path, format, FORMATS)
    if report is not None:
        _check_report(report, circuit, kind)
    if examples is not None and kind != "html":
        raise OptionError(f"top images are shown on the page: draw an .html file, not a .{kind}")
    if kind in _DATA:
        if labels:
            raise OptionError(f"a .{kind} file holds no labels: they are of pictures and the page")
        return _write_data(circuit, path, kind, title, max_edges)
    wanted = thumbnails if thumbnails is not None else kind == "html" and model is not None
    maps = _maps(circuit, model, task, pair) if wanted and kind in ("html", *FIGURES) else None
    if model is not None:
        labels = {**unit_labels(model), **(labels or {})}
    room = ((), (THUMB, THUMB)) if maps is None else (maps.nodes, thumb_size(maps.grid))
    picture = picture_of(circuit, title, max_edges, direction, *room, labels)
    if kind == "html":
        shown = [] if examples is None else gallery(examples, picture, by_strength(picture))
        content = page_of(page_data(circuit, picture, maps, curve, intervals), report, shown).encode()
    elif kind in SOURCES:
        content = SOURCES[kind](picture).encode()
    else:
        small = None if maps is None else node_maps.thumbnails(maps, image)
        content = figure_bytes(figure_of(picture, small), kind)
    return write_bytes(path, content)


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as the bytes of an "svg", "pdf" or "png" file.

    Raises:
        FileError: if matplotlib is needed and not installed.
    """
    if kind == "svg":
        return svg_of_figure(figure).encode()
    try:
        from circuitvit.export.print import printed  # matplotlib is optional
    except ImportError as error:
        raise FileError(
            f"drawing a .{kind} file needs matplotlib, which is not installed: "
            "pip install 'circuitvit[plots]', or draw a .svg file, which needs nothing"
        ) from error
    return printed(figure, kind)


def format_of(path: Path, asked: str | None, formats: tuple[str, ...]) -> str:
    """The format that is asked for, or that the ending says, under its first name.

    Raises:
        OptionError: if it is none of `formats`.
    """
    said = (path.suffix if asked is None else asked).lower().lstrip(".")
    known = ", ".join(f".{name}" for name in formats)
    if not said:
        raise OptionError(f"{path} has no ending to tell the format by: choose from {known}")
    if said not in formats:
        raise OptionError(f"cannot draw a .{said} file: choose from {known}")
    return _OTHER_NAMES.get(said, said)


def _check_report(report: Report, circuit: Circuit, kind: str) -> None:
    if kind != "html":
        raise OptionError(
            f"a report is written on the page: draw an .html file, or save it beside the .{kind}"
        )
    size, edges = report.size, len(circuit.pruned())
    if (size.edges, size.graph_edges) != (edges, circuit.graph.n_edges):
        raise OptionError(
            f"the report is of a circuit of {size.edges:,} of {size.graph_edges:,} edges, and this one has "
            f"{edges:,} of {circuit.graph.n_edges:,}: verify this circuit"
        )


def _write_data(circuit: Circuit, path: Path, kind: str, title: str | None, max_edges: int | None) -> Path:
    if max_edges is not None:
        raise OptionError(f"max_edges thins out pictures; a .{kind} file always holds the whole circuit")
    if kind == "json":
        return circuit.save(path)
    return write_bytes(path, graphml_of(circuit, title).encode())


def _maps(
    circuit: Circuit, model: Model | None, task: Task | PreparedTask | None, pair: int
) -> node_maps.Maps:
    if model is None or task is None:
        raise OptionError("thumbnails show what the nodes do on an image: give both model= and task=")
    model.graph.with_groups(circuit.graph.groups).check_same(circuit.graph, "the circuit")
    return node_maps.maps_of(model, task, pair, circuit.nodes)
