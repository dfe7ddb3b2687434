"""A film strip: circuits of one graph side by side, every node in the same place in each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from circuitvit.errors import OptionError, check_whole, counted
from circuitvit.export.difference import panel_of
from circuitvit.export.drawing import FIGURES, figure_bytes, format_of
from circuitvit.export.figure import Figure
from circuitvit.export.layout import lay_out
from circuitvit.export.picture import DrawnEdge, Picture, picture_of, shown
from circuitvit.export.style import COLOURS, EdgeLook, widest
from circuitvit.graph import Circuit, CircuitLike, as_circuit
from circuitvit.graph.files import clean, write_bytes


def draw_strip(
    circuits: Mapping[str, CircuitLike], path: str | Path, *, title: str | None = None, columns: int = 3
) -> Path:
    """Draw circuits of one graph side by side; an edge is as wide as its effect there, on one scale for all.

    Args:
        circuits: by what is written above each, from left to right; with scores.
        path: of the file, `.svg`, `.pdf` or `.png`.
        title: above all of them.
        columns: how many stand in a row.

    Returns:
        The path of the file.

    Raises:
        OptionError: if there are none, they belong to different graphs or have no scores, or for another
            ending.
        FileError: if the file cannot be written, or matplotlib is needed and missing.

    Example:
        >>> import tempfile
        >>> from circuitvit.graph import EdgeScores
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> graph = transformer_graph(1, 2)
        >>> first, last = (
        ...     EdgeScores(graph, graph.array_of(scores)).threshold(0.1)
        ...     for scores in ({"input->logits": -0.5}, {"input->m0": -1.0, "m0->logits": -1.0})
        ... )
        >>> path = Path(tempfile.mkdtemp()) / "strip.svg"
        >>> draw_strip({"step 0": first, "step 100": last}, path).name
        'strip.svg'
    """
    check_whole("the number of columns", columns)
    path = Path(path)
    kind = format_of(path, None, FIGURES)
    if not circuits:
        raise OptionError("a strip shows one circuit or more")
    first, *others = circuits.values()
    frames = [as_circuit(first)]
    frames += [as_circuit(each, frames[0].graph) for each in others]
    for caption, frame in zip(circuits, frames, strict=True):
        if frame.values is None:
            raise OptionError(f"{caption!r} has no scores: a strip shows how effects change")
    every = _union(frames)
    picture = picture_of(every, "Circuits side by side" if title is None else title)
    looks = [_looks(picture, frame) for frame in frames]
    signs = {edge.sign for edges in looks for edge in edges.values()}
    picture = replace(
        picture,
        counts=f"{counted(len(every), 'edge')} in one frame or another, of {every.graph.n_edges:,}",
        origin="",
        key=tuple(
            (picture.meaning(sign), EdgeLook(COLOURS[sign], 3.0, 1.0)) for sign in COLOURS if sign in signs
        ),
    )
    layout = lay_out(picture)
    panels = [
        panel_of(picture, layout, edges, clean(caption))
        for caption, edges in zip(circuits, looks, strict=True)
    ]
    return write_bytes(path, figure_bytes(Figure(picture, tuple(panels), columns=columns), kind))


def _union(frames: list[Circuit]) -> Circuit:
    """The edges of all, each with the strongest of its effects."""
    kept = np.logical_or.reduce([each.kept for each in frames])
    values = np.stack([each.values for each in frames if each.values is not None]) * [
        each.kept for each in frames
    ]
    strongest = np.abs(values).argmax(axis=0)
    largest = np.take_along_axis(values, strongest[None], axis=0)[0]
    return Circuit(frames[0].graph, kept, largest, frames[-1].provenance)


def _looks(picture: Picture, frame: Circuit) -> dict[str, DrawnEdge]:
    """The edges of one frame, as wide as their effect in it, on the scale of the whole strip."""
    found, most = {}, widest(len(picture.edges))
    for edge in picture.edges:
        if edge.name in frame:
            score = frame.score_of(edge.name) or 0.0
            sign, look = shown(
                score, picture.strongest or 0.0, picture.direction, picture.shares_of,
                max_width=most, group=edge.group,
            )  # fmt: skip
            found[edge.name] = replace(edge, score=score, sign=sign, look=look)
    return found
