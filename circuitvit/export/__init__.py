"""From circuits to files: pictures, an interactive page, and graphs for other programs.

The way of a diagram: `picture` decides what is shown and how it looks, `routes` where nodes stand and which
way edges go, `layout` gives coordinates, `figure` puts drawings, title and legend on a canvas, and `svg`,
`print` (matplotlib: PNG and PDF) and `tikz` are the canvases. `graphs` writes DOT and GraphML. `maps` runs
the model to see what nodes do on an image, for thumbnails and for `page`, the interactive page.
"""

from circuitvit.export.audit_page import draw_audit
from circuitvit.export.difference import DIFFERENCE_FORMATS, difference_of, draw_difference
from circuitvit.export.drawing import FORMATS, draw
from circuitvit.export.drift_page import draw_drift
from circuitvit.export.graphs import dot_of, graphml_of
from circuitvit.export.picture import picture_of
from circuitvit.export.strip import draw_strip
from circuitvit.export.svg import svg_of
from circuitvit.export.tikz import tikz_of

__all__ = [
    "DIFFERENCE_FORMATS",
    "FORMATS",
    "difference_of",
    "dot_of",
    "draw",
    "draw_audit",
    "draw_difference",
    "draw_drift",
    "draw_strip",
    "graphml_of",
    "picture_of",
    "svg_of",
    "tikz_of",
]
