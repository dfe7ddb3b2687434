"""From circuits to files: pictures, an interactive page, and graphs for other programs.

The way of a diagram: `picture` decides what is shown and how it looks, `grid` and `routes` where it stands
and which way it goes, `layout` gives coordinates, and `svg`, `dot`, `tikz` and `mermaid` write. `paint` turns
our SVG into PNG and PDF. `maps` runs the model to see what nodes do on an image; `heat` makes thumbnails of
that, and `packing`, `page_data` and `page` the interactive page.
"""

from circuitvit.export.difference import DIFFERENCE_FORMATS, difference_of, draw_difference
from circuitvit.export.dot import dot_of
from circuitvit.export.drawing import FORMATS, draw
from circuitvit.export.graphml import graphml_of
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.maps import Maps, maps_of
from circuitvit.export.mermaid import mermaid_of
from circuitvit.export.picture import Picture, picture_of
from circuitvit.export.svg import svg_of
from circuitvit.export.tikz import tikz_of

__all__ = [
    "DIFFERENCE_FORMATS",
    "FORMATS",
    "Layout",
    "Maps",
    "Picture",
    "difference_of",
    "dot_of",
    "draw",
    "draw_difference",
    "graphml_of",
    "lay_out",
    "maps_of",
    "mermaid_of",
    "picture_of",
    "svg_of",
    "tikz_of",
]
