"""Text in pictures: made inert, measured without a font, cut or wrapped to fit.

Names and titles come from files and users, so they may hold anything. Markup characters are left to
the writer of each format to escape; here goes what no format can hold or show safely.
"""

from __future__ import annotations

import unicodedata

_NARROW = frozenset("fijlrtI.,:;!|'`()[]{}-/\\ ")
_WIDE = frozenset("mwMWOQGD%&+<>=_#~")


def clean(text: str) -> str:
    """`text` on one line, without characters that are illegal in XML or that reorder the text around them.

    Control characters and lone surrogates have no place in XML 1.0, and bidirectional overrides can make
    a label read as something it is not. White space of every kind becomes one space.

    Example:
        >>> clean("a\\n b\\x00\\u202ec")
        'a b c'
    """
    kept = []
    for letter in text:
        category = unicodedata.category(letter)
        if category in ("Cf", "Cn", "Co"):  # format characters (joiners, overrides), unassigned, private
            continue
        kept.append(" " if category in ("Cc", "Cs", "Zl", "Zp", "Zs") else letter)
    return " ".join("".join(kept).split())


def text_width(text: str, size: float) -> float:
    """About how wide `text` is at this font size, in pixels; rather too wide than too narrow.

    Which font a viewer has is not known, so this goes by classes of letters, with the figures of the
    widest font of the stack (DejaVu Sans).

    Example:
        >>> text_width("a3.h1", 10) < text_width("a11.h11", 10)
        True
    """
    return size * sum(_em(letter) for letter in text)


def _em(letter: str) -> float:
    if letter in _NARROW:
        return 0.42
    if letter in _WIDE:
        return 0.98
    if letter == "@":
        return 1.02
    if letter.isascii():
        return 0.76 if letter.isupper() else 0.64
    return 1.15  # wide scripts and emoji


def fit(text: str, size: float, room: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `room` pixels.

    Example:
        >>> fit("a very long name", 10, 60)
        'a very l…'
    """
    width, cut = 0.0, 0
    ending = text_width("…", size)
    for place, letter in enumerate(text):  # one pass, since a hostile title may be megabytes long
        if width + ending <= room:
            cut = place
        width += text_width(letter, size)
        if width > room:
            return text[:cut].rstrip() + "…"
    return text


def wrap(text: str, size: float, room: float, max_lines: int) -> list[str]:
    """`text` in at most `max_lines` lines of `room` pixels; what does not fit ends in an ellipsis.

    Example:
        >>> wrap("one two three four", 10, 60, max_lines=2)
        ['one two', 'three four']
    """
    lines: list[str] = []
    words = text.split()
    while words:
        if len(lines) == max_lines - 1:
            return [*lines, fit(" ".join(words), size, room)]
        taken = 1
        while taken < len(words) and text_width(" ".join(words[: taken + 1]), size) <= room:
            taken += 1
        lines.append(fit(" ".join(words[:taken]), size, room))
        words = words[taken:]
    return lines


def number(value: float, signed: bool = False) -> str:
    """A number in three significant digits, the same on every machine.

    Example:
        >>> number(0.01234), number(2.0, signed=True), number(123456.0)
        ('0.0123', '+2', '1.23e+05')
    """
    return f"{value:+.3g}" if signed else f"{value:.3g}"
