"""Pages without scripts or other files: made from templates, most of them from one frame, and written."""

from __future__ import annotations

import base64
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2

from circuitvit.errors import OptionError
from circuitvit.export.figure import figure_of
from circuitvit.export.picture import Picture
from circuitvit.export.svg import svg_of_figure
from circuitvit.graph.files import write_bytes

ROOMS = ("export", "views")
"""Where templates stand. `plain.html` is the frame that they extend: colours, letters, tables, a verdict."""


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    loader = jinja2.ChoiceLoader([jinja2.PackageLoader(f"circuitvit.{room}", "") for room in ROOMS])
    return jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)


def rendered(template: str, **values: Any) -> str:
    """A page from a template; values are escaped."""
    return _environment().get_template(template).render(**values)


def write_page(path: str | Path, content: str) -> Path:
    """Write a page.

    Raises:
        OptionError: for another ending than `.html`.
        FileError: if the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".html":
        raise OptionError(f"a page is written as .html, not as {path.name!r}")
    return write_bytes(path, content.encode())


def diagram_uri(picture: Picture) -> str:
    """A diagram as the source of an image."""
    svg = svg_of_figure(figure_of(picture))
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
