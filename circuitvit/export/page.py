"""The interactive page: one HTML file that holds everything it needs and may ask for nothing else.

The template, the styles and the scripts are files of their own in `page/`. They are put into the document
here, and a content security policy names their hashes: the browser runs these scripts and no others, and is
forbidden every connection, whatever a name or a title may hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

SCRIPTS = (
    "wiring.js",
    "maps.js",
    "diagram.js",
    "state.js",
    "details.js",
    "figure.js",
    "search.js",
    "main.js",
)

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def page_of(data: Mapping[str, Any]) -> str:
    """The page as HTML; the same data gives the same text, byte for byte.

    Args:
        data: from `page_data`.
    """
    script = "\n".join(_resource(name) for name in SCRIPTS)
    style = _resource("page.css")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        _resource("page.html")
    )
    return template.render(
        title=data["title"] or "Circuit",
        counts=data["counts"],
        origin=data["origin"],
        policy=_policy(script, style),
        style=Markup(style),  # our own files, whose hashes must not change
        script=Markup(script),
        data=Markup(safe_json(data)),
    )


def safe_json(data: Mapping[str, Any]) -> str:
    """JSON that may stand inside a script element: no character in it can end the element.

    Example:
        >>> safe_json({"title": "</script>"})
        '{"title":"\\\\u003c/script\\\\u003e"}'
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for letter, escape in _ESCAPES.items():
        text = text.replace(letter, escape)
    return text


def _policy(script: str, style: str) -> str:
    """The content security policy: nothing is allowed but our script, our style and images in the file."""
    script_hash, style_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, style)
    )
    return (
        f"default-src 'none'; script-src 'sha256-{script_hash}'; style-src 'sha256-{style_hash}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


@lru_cache
def _resource(name: str) -> str:
    return (files("circuitvit.export") / "page" / name).read_text(encoding="utf-8")
