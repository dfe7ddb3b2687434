"""What a view is of: images, how they look, and how the model's tokens lie on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from circuitvit.errors import OptionError, check_whole
from circuitvit.export.maps import as_picture
from circuitvit.models import Model
from circuitvit.tasks.images import Images, as_images
from circuitvit.tasks.task import check_size

ImageSpec = Images | Tensor | NDArray[Any] | str | Path | Sequence[str | Path]
"""Preprocessed images as a tensor; or a file, a folder or a list of files, preprocessed as the model says."""

Grid = tuple[int, int]

BATCH = 8
"""Images run at once unless told otherwise: views are of few images, and memory grows with this."""


@dataclass(frozen=True, eq=False, repr=False)
class Subjects:
    """The images of a view.

    Attributes:
        names: of the images, for titles: file names, or "image 0".
        pictures: the images as people see them, `(image, height, width, 3)`, uint8.
        grid: rows and columns of patches.
        kinds: the kind of each token, such as `("cls", "patch", ...)`; patches are last, row by row.
    """

    names: tuple[str, ...]
    pictures: NDArray[np.uint8]
    grid: Grid
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    @property
    def n_prefix(self) -> int:
        """How many tokens come before the patches."""
        return len(self.kinds) - self.grid[0] * self.grid[1]

    def on_grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of tokens `(..., token)` as maps of the patches `(..., row, column)`."""
        return values[..., self.n_prefix :].reshape(*values.shape[:-1], *self.grid)

    def index(self, image: int) -> int:
        """The place of an image, counted from the end where negative.

        Raises:
            OptionError: if there is no such image.
        """
        if not -len(self) <= image < len(self):
            raise OptionError(f"there is no image {image}: the view has {len(self)}, counted from 0")
        return image % len(self)

    def token_name(self, token: int) -> str:
        """What to call a token: "cls", "reg 2", or "patch (3, 5)" for a row and a column."""
        if token >= self.n_prefix:
            row, column = divmod(token - self.n_prefix, self.grid[1])
            return f"patch ({row}, {column})"
        kind = self.kinds[token]
        alike = [place for place in range(self.n_prefix) if self.kinds[place] == kind]
        return kind if len(alike) == 1 else f"{kind} {alike.index(token)}"


def images_of(model: Model, images: ImageSpec) -> Images:
    """Images checked to fit a model.

    Raises:
        DataError: if they cannot be read or have another size than the model takes.
    """
    model.refresh()
    found = as_images(images, model.preprocessing)
    found.check(quiet=True)
    check_size(found, model)
    return found


def batches_of(
    model: Model, images: Images, batch_size: int | None = None
) -> Iterator[Float[Tensor, "batch channel height width"]]:
    """The images in order, on the model's device, a few at a time.

    Raises:
        OptionError: if the batch size is not positive.
    """
    size = BATCH if batch_size is None else batch_size
    check_whole("the batch size (batch_size)", size)
    for start in range(0, len(images), size):
        yield images.take(start, min(start + size, len(images))).to(model.device, model.dtype)


def subjects_of(model: Model, images: Images) -> Subjects:
    """Names, pictures and token layout of images.

    Raises:
        DataError: if the model's tokens do not form a grid over the image.
    """
    n_tokens = int(model.embed(images.take(0, 1).to(model.device, model.dtype)).shape[1])
    kinds = model.token_kinds(n_tokens)
    rows, columns = model.grid_at(*images.shape[1:])
    pictures = [as_picture(images.take(row, row + 1)[0], model.preprocessing) for row in range(len(images))]
    return Subjects(images.names, np.stack(pictures), (rows, columns), kinds)
