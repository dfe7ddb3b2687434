"""Rows and escaping of Markdown."""

from __future__ import annotations

from collections.abc import Iterator


def row(*cells: str, header: bool = False) -> Iterator[str]:
    yield "| " + " | ".join(plain(cell) for cell in cells) + " |"
    if header:
        yield "|" + " --- |" * len(cells)


def plain(text: str) -> str:
    """File and class names must not break out of their cell, nor become markup."""
    flat = " ".join(text.split())
    for sign in "\\|*`<[":  # not the underscore: inside words, where names have it, it is no markup
        flat = flat.replace(sign, "\\" + sign)
    return flat
