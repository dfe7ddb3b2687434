"""The legend under a picture: what colours, widths, dashes and ports mean, and what is shown."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass

from circuitvit.export import style
from circuitvit.export.picture import Picture
from circuitvit.export.style import COLOURS, EdgeLook, Sign
from circuitvit.export.text import clean, fit, number, text_width, wrap

SIZE = 10.5
LINE = 19.0
SAMPLE = 26.0  # length of a sample line
_GAP = 22.0

PORT_NAMES = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class _Item:
    """A sample of `sample` pixels, drawn by `draw(parent, x, y)`, and the words beside it."""

    words: str
    sample: float
    draw: Callable[[ET.Element, float, float], None]

    @property
    def width(self) -> float:
        return self.sample + 6 + text_width(self.words, SIZE)


def add_legend(parent: ET.Element, picture: Picture, left: float, top: float, room: float) -> float:
    """Draw the legend into `parent`, at most `room` pixels wide.

    Returns:
        y of its lower end.
    """
    x, y = left, top + LINE / 2
    for item in _items(picture):
        if x > left and x + item.width > left + room:
            x, y = left, y + LINE
        item.draw(parent, x, y)
        start = x + item.sample + 6
        if item.words:
            _words(parent, start, y, fit(item.words, SIZE, left + room - start), style.INK)
        x += item.width + _GAP
    y += LINE
    _words(parent, left, y, fit(_counts(picture), SIZE, room), style.INK)
    for line in wrap(picture.origin, SIZE, room, max_lines=3):
        y += LINE - 4
        _words(parent, left, y, line, style.MUTED)
    return y + LINE / 2


def _counts(picture: Picture) -> str:
    return f"{picture.counts} · edges run upwards" if picture.edges else picture.counts


def _items(picture: Picture) -> list[_Item]:
    items = [_key_item(words, look) for words, look in picture.key]
    if not picture.key:
        items = [_sign_item(picture, sign) for sign in picture.signs]
    if picture.strongest is not None:
        items.append(_width_item(picture, picture.strongest))
    ports = dict.fromkeys(
        port for node in picture.nodes if node.kind == "head" and node.present for port in node.ports
    )
    if ports:
        items.append(_port_item(list(ports)))
    if len(picture.groups) > 1:
        items += [_group_item(name, index) for index, name in enumerate(picture.groups)]
    if any(not node.present for node in picture.nodes):
        items.append(_Item("node outside the circuit", 6.0, _draw_dot))
    return items


def _sign_item(picture: Picture, sign: Sign) -> _Item:
    def draw(parent: ET.Element, x: float, y: float) -> None:
        _stroke(parent, x, y, SAMPLE, COLOURS[sign], 3.0)

    return _Item(picture.meaning(sign), SAMPLE, draw)


def _key_item(words: str, look: EdgeLook) -> _Item:
    def draw(parent: ET.Element, x: float, y: float) -> None:
        _stroke(parent, x, y, SAMPLE + 8, look.colour, look.width, look.dash)

    return _Item(words, SAMPLE + 8, draw)


def _width_item(picture: Picture, strongest: float) -> _Item:
    """Three widths with the effects that they stand for, side by side so that they are compared."""
    shares = (1.0, 0.5, 0.2)
    words = [number(strongest * share) for share in shares]
    steps = [SAMPLE + 12 + text_width(word, SIZE) for word in words]
    lead = text_width("effect", SIZE) + 6

    def draw(parent: ET.Element, x: float, y: float) -> None:
        _words(parent, x, y, "effect", style.INK)
        at = x + lead
        for share, word, step in zip(shares, words, steps, strict=True):
            _stroke(parent, at, y, SAMPLE, style.MUTED, style.width_of(share, picture.max_width))
            _words(parent, at + SAMPLE + 4, y, word, style.INK)
            at += step

    return _Item("", lead + sum(steps), draw)


def _group_item(name: str, index: int) -> _Item:
    def draw(parent: ET.Element, x: float, y: float) -> None:
        _stroke(parent, x, y, SAMPLE + 8, style.MUTED, 1.8, style.dash_of(index))

    return _Item(fit(f"tokens: {name}", SIZE, 200), SAMPLE + 8, draw)


def _port_item(ports: list[str]) -> _Item:
    letters = fit(clean("  ".join(ports)), SIZE, 120)

    def draw(parent: ET.Element, x: float, y: float) -> None:
        _words(parent, x, y, letters, style.INK).set("font-weight", "700")

    names = ", ".join(PORT_NAMES.get(port, clean(port)) for port in ports)
    return _Item(f"inputs of a head: {names} (dark: used)", text_width(letters, SIZE), draw)


def _draw_dot(parent: ET.Element, x: float, y: float) -> None:
    ET.SubElement(parent, "circle", cx=_n(x + 3), cy=_n(y), r="2", fill=style.FAINT)


def _stroke(
    parent: ET.Element, x: float, y: float, length: float, colour: str, width: float, dash: str = ""
) -> None:
    line = ET.SubElement(parent, "path", d=f"M{_n(x)} {_n(y)}h{_n(length)}", stroke=colour, fill="none")
    line.set("stroke-width", _n(width))
    if dash:
        line.set("stroke-dasharray", dash)


def _words(parent: ET.Element, x: float, y: float, words: str, colour: str) -> ET.Element:
    text = ET.SubElement(parent, "text", x=_n(x), y=_n(y + 0.36 * SIZE), fill=colour)
    text.set("font-size", _n(SIZE))
    text.text = words
    return text


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")
