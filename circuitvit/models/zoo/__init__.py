"""The bundled toy ViTs: small enough to ship and to take apart completely, real enough to be wrong.

Each is two files in this folder, `NAME.safetensors` and `NAME.json` (its :class:`Card`), written by
`circuitvit train`; README.md tells their story.

Example:
    >>> zoo_names()
    ('catdog-shortcut', 'catdog-tiny', 'clip-tiny', 'digits-tiny')
    >>> zoo_card("catdog-tiny").classes
    ('cat', 'dog', 'rabbit', 'bear')
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from circuitvit.errors import unknown_name
from circuitvit.models.zoo.card import Card, ClipSpec, InputSpec, build_module, load_module

__all__ = [
    "Card",
    "ClipSpec",
    "InputSpec",
    "build_module",
    "load_module",
    "load_zoo_module",
    "zoo_card",
    "zoo_names",
]

_FOLDER = Path(__file__).parent


def zoo_names() -> tuple[str, ...]:
    """Names of the bundled models, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def zoo_card(name: str) -> Card:
    """The card of a bundled model.

    Raises:
        NameNotFoundError: when there is no model of that name; the message suggests the nearest.
        FileError: when the card is damaged.
    """
    return Card.load(_path(name))


def load_zoo_module(name: str) -> nn.Module:
    """A bundled model with its trained weights, in eval mode, on the CPU: timm's `VisionTransformer`, and of
    "clip-tiny" a `ClipModule`, whose `visual` is one.

    The weights are checked against the hash on the card first.

    Raises:
        NameNotFoundError: when there is no model of that name; the message suggests the nearest.
        FileError: when card or weights are damaged.
    """
    return load_module(_path(name))[0]


def _path(name: str) -> Path:
    if name not in zoo_names():
        raise unknown_name("bundled model", name, zoo_names())
    return _FOLDER / f"{name}.json"
