"""Reports as Markdown: jinja2 templates beside this file, and how figures and names are written in them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import jinja2

from circuitvit.graph import Provenance
from circuitvit.graph.files import clean, write_bytes


def markdown(template: str, **values: object) -> str:
    """A template of this folder filled with values."""
    return _environment().get_template(template).render(**values)


def plain(text: object) -> str:
    """Text that neither breaks out of its cell nor becomes markup: file and class names may hold anything."""
    flat = clean(str(text))
    for sign in "\\|*`<[":  # not the underscore: inside words, where names have it, it is no markup
        flat = flat.replace(sign, "\\" + sign)
    return flat


def row(*cells: str, header: bool = False) -> Iterator[str]:
    """A row of a table, and the line under it where it is the header."""
    yield "| " + " | ".join(plain(cell) for cell in cells) + " |"
    if header:
        yield "|" + " --- |" * len(cells)


def write_text(path: Path, text: str) -> Path:
    """Write a text file whole or not at all, like `write_json`."""
    return write_bytes(path, text.encode("utf-8", "backslashreplace"))  # names of files may be no Unicode


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML: `finalize` escapes what Markdown would take for markup
        finalize=_written,
    )
    environment.filters.update(number=_number, origin=_origin, code=_code)
    return environment


def _written(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, _Verbatim) else plain(value)


def _number(value: float | None, form: str = ".2g") -> str:
    return "" if value is None else format(value, form)


class _Verbatim(str):
    """Text of a block of code, where nothing is markup."""


def _code(text: str) -> _Verbatim:
    """A line for a block of code: one line, and no fence in it."""
    return _Verbatim(clean(text).replace("```", "` ` `"))


def _origin(provenance: Provenance) -> str:
    parts = [
        f"model {provenance.model}" if provenance.model else "",
        f"weights {provenance.weights[:12]}" if provenance.weights else "",
        f"method {provenance.method}" if provenance.method else "",
        *(f"{key} {value}" for key, value in provenance.parameters.items() if key != "pairing"),
        f"seed {provenance.seed}" if provenance.seed is not None else "",
        f"circuitvit {provenance.library}",
        *(f"{name} {version}" for name, version in provenance.libraries.items()),
    ]
    return ", ".join(part for part in parts if part)
