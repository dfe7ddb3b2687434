"""Top images of units on a page: small pictures, lit where the unit is active."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from circuitvit.errors import OptionError
from circuitvit.export.picture import Picture
from circuitvit.export.svg import image_uri
from circuitvit.graph.files import clean

HEIGHT = 112
"""Pixels of a picture on a page."""

EACH = 6
"""Pictures of a unit that a page holds."""

DARK = 0.55
"""How bright a picture is where the unit is not active."""


class Example(NamedTuple):
    """One of the images that a unit answers to most.

    Attributes:
        picture: `(height, width, 3)`.
        said: its name and the value.
    """

    picture: NDArray[np.uint8]
    said: str


class HasExamples(Protocol):
    """What knows top images, as `top_images` finds them."""

    def examples(self, count: int) -> Mapping[str, Sequence[Example]]:
        """Those of each unit, at most `count`, the largest first."""


def gallery(found: HasExamples, picture: Picture, order: Sequence[str]) -> list[dict[str, Any]]:
    """What the page shows of each drawn node that has examples, in order.

    Raises:
        OptionError: if they are of nothing in the graph.
    """
    examples = found.examples(EACH)
    places = {node.name: place for place, node in enumerate(picture.nodes)}
    if not any(name in places for name in examples):
        raise OptionError(
            f"the examples are of {', '.join(list(examples)[:3])}, and none of these is a node of the graph"
        )
    labels = {node.name: node.label for node in picture.nodes}
    return [
        {
            "place": places[name],
            "name": clean(name),
            "label": labels[name],
            "images": [(image_uri(each.picture, 80), clean(each.said)) for each in examples[name]],
        }
        for name in order
        if examples.get(name)
    ]


def lit(picture: NDArray[np.uint8], patches: NDArray[np.float32] | None) -> NDArray[np.uint8]:
    """A small picture, dark where the patch values `(row, column)` are far below the largest, or below 0.

    Example:
        >>> white = np.full((2, 4, 3), 255, dtype=np.uint8)
        >>> lit(white, np.array([[0, 5]], dtype=np.float32))[0, :, 0].tolist()
        [140, 140, 255, 255]
    """
    scale = min(1.0, HEIGHT / len(picture))
    size = round(picture.shape[1] * scale), round(picture.shape[0] * scale)
    small = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))
    if patches is None or patches.max() <= 0:
        return small
    share = np.sqrt(np.clip(patches / patches.max(), 0, 1))
    rows, columns = (np.arange(side) * n // side for side, n in zip(size[::-1], share.shape, strict=True))
    light = DARK + (1 - DARK) * share[rows][:, columns, None]
    return np.asarray(small * light, dtype=np.uint8)
