"""From circuits to files: diagrams (SVG, DOT, PDF, PNG) and graphs for other programs (GraphML, JSON).

The way of a diagram: `picture` decides what is shown and how it looks, `grid` and `routes` where it stands
and which way it goes, `layout` gives coordinates, `svg` and `dot` write.
"""

from circuitvit.export.dot import dot_of
from circuitvit.export.drawing import FORMATS, draw
from circuitvit.export.graphml import graphml_of
from circuitvit.export.layout import Layout, lay_out
from circuitvit.export.picture import Picture, picture_of
from circuitvit.export.svg import svg_of

__all__ = ["FORMATS", "Layout", "Picture", "dot_of", "draw", "graphml_of", "lay_out", "picture_of", "svg_of"]
