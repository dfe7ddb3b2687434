"""What somebody may have meant by the name of a model: people write "vit-b16" or "dinov2"."""

from __future__ import annotations

import re
from collections.abc import Sequence

from circuitvit.errors import NameNotFoundError, unknown_name

SIZES = {
    "ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"
}  # fmt: skip
"""Papers' letters for sizes, and timm's words."""

SHOWN = 3


def unknown_model(name: str, known: Sequence[str]) -> NameNotFoundError:
    """The error for a name that is none of the known ones: with those that have all of its words, if any has.

    Example:
        >>> print(unknown_model("ViT-B/16", ["vit_small_patch16_224", "vit_base_patch16_224"]))
        unknown model 'ViT-B/16': did you mean 'vit_base_patch16_224'?
    """
    near = _with_all(_words(name), known) or _with_all(_words(name.rpartition("/")[2]), known)
    if not near:
        return unknown_name("model", name, known)
    return NameNotFoundError(f"unknown model {name!r}: did you mean {' or '.join(map(repr, near[:SHOWN]))}?")


def _words(name: str) -> list[str]:
    """The parts of a name, in timm's words: "ViT-B/16" is vit, base, patch16."""
    found: list[str] = []
    for part in filter(None, re.split(r"[^a-z0-9]+", name.lower())):
        letter, digits = match.groups() if (match := re.fullmatch(r"([a-z]+?)(\d*)", part)) else (part, "")
        if letter in SIZES or part in SIZES:
            found.append(SIZES[letter])
            found += [f"patch{digits}"] if digits else []
        elif part.isdecimal() and len(part) < 3:
            found.append(f"patch{part}")
        else:
            found.append(part)
    return found


def _with_all(words: Sequence[str], known: Sequence[str]) -> list[str]:
    """The names that have all words, or begin with them; plain ones for small images first."""

    def fits(parts: Sequence[str]) -> bool:
        return all(any(part.startswith(word) for part in parts) for word in words)

    def rank(name: str) -> tuple[bool, int, bool, int]:
        parts = _parts(name)
        size = next((place for place, each in enumerate(SIZES.values()) if each in parts), len(SIZES))
        return not parts[0].startswith(words[0]), len(parts), "224" not in parts, size

    return sorted((each for each in known if words and fits(_parts(each))), key=rank)


def _parts(name: str) -> list[str]:
    return re.split(r"[^a-z0-9]+", name.lower())
