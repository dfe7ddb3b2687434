"""What a view is of: images, how they look, and how the model's tokens lie on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from circuitvit._progress import progress_bar
from circuitvit.errors import OptionError, counted
from circuitvit.export.maps import picture_on
from circuitvit.export.sheet import Sheet
from circuitvit.models import Model
from circuitvit.models.families.family import Grid
from circuitvit.models.tokens import token_name
from circuitvit.tasks.images import Images, as_images
from circuitvit.tasks.images import ImageSpec as ImageSpec
from circuitvit.tasks.task import batches_of, check_size


@dataclass(frozen=True, eq=False, repr=False)
class Subjects:
    """The images of a view.

    Attributes:
        names: of the images, for titles: file names, or "image 0".
        pictures: the images as people see them, `(image, height, width, 3)`, uint8; clips as strips.
        grid: rows and columns of patches; of clips with time first.
        kinds: the kind of each token, such as `("cls", "patch", ...)`; patches are last, row by row.
    """

    names: tuple[str, ...]
    pictures: UInt8[NDArray[np.uint8], "image height width 3"]
    grid: Grid
    kinds: tuple[str, ...]

    along = "names:image"

    def _check(self) -> None:
        if not self.grid or min(self.grid) < 1 or prod(self.grid) > len(self.kinds):
            raise OptionError(f"{len(self.kinds)} tokens do not hold a grid of {self.grid} patches")

    def __repr__(self) -> str:
        grid = " x ".join(map(str, self.grid))
        return f"Subjects({counted(len(self), 'image')}, {len(self.kinds)} tokens, patches {grid})"

    @property
    def axes_of_tokens(self) -> dict[str, list[str]]:
        """Names of the images, and of the tokens, for tables."""
        tokens = [self.token_name(token) for token in range(len(self.kinds))]
        return {"image": list(self.names), "token": tokens}

    def check_tokens(self, count: int) -> None:
        """Refuse arrays of another number of tokens.

        Raises:
            OptionError: saying how many there are.
        """
        if count != len(self.kinds):
            raise OptionError(f"arrays of {count} tokens, and the images have {len(self.kinds)}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def of_words(self) -> bool:
        """Whether they are sentences, and tokens are words."""
        return "word" in self.kinds

    @property
    def n_prefix(self) -> int:
        """How many tokens come before the patches."""
        return len(self.kinds) - prod(self.grid)

    def on_grid(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of tokens `(..., token)` as maps of patches `(..., row, column)`, with time before rows."""
        return values[..., self.n_prefix :].reshape(*values.shape[:-1], *self.grid)

    @cached_property
    def sheet(self) -> Sheet:
        """How the patches lie on paper, where a clip is a strip of frames."""
        return Sheet(self.grid)

    def on_sheet(self, values: NDArray[Any]) -> NDArray[Any]:
        """Values of tokens `(..., token)` as they are drawn, `(..., row, column)`."""
        return self.sheet.lay(self.on_grid(values))

    def patch(self, place: tuple[int, ...]) -> int:
        """The token of a patch by row and column, of a clip by frame, row and column.

        Raises:
            OptionError: if there is no such patch.
        """
        inside = len(place) == len(self.grid) and all(
            0 <= at < size for at, size in zip(place, self.grid, strict=True)
        )
        if not inside:
            said = ", ".join(f"{size} {name}" for size, name in zip(self.grid, self.axes, strict=True))
            raise OptionError(f"there is no patch {place}: the grid has {said}")
        return self.n_prefix + int(np.ravel_multi_index(place, self.grid))

    def place(self, token: int) -> tuple[int, ...]:
        """The place of a patch token on the grid."""
        return tuple(int(at) for at in np.unravel_index(token - self.n_prefix, self.grid))

    @property
    def axes(self) -> tuple[str, ...]:
        """What the sides of the grid are called."""
        return ("frames", "rows", "columns")[-len(self.grid) :]

    def index(self, image: int) -> int:
        """The place of an image, counted from the end where negative.

        Raises:
            OptionError: if there is no such image.
        """
        if not -len(self) <= image < len(self):
            raise OptionError(f"there is no image {image}: the view has {len(self)}, counted from 0")
        return image % len(self)

    def token_name(self, token: int) -> str:
        """What to call a token: "cls", "reg 2", or "patch (3, 5)" for row and column; time comes first."""
        return token_name(self.kinds, token, lambda: self.grid)


def images_of(model: Model, images: ImageSpec) -> Images:
    """Images checked to fit a model.

    Raises:
        DataError: if they cannot be read or have another size than the model takes.
    """
    model.refresh()
    found = as_images(images, model.preprocessing)
    found.check(progress=False)
    check_size(found, model)
    return found


def watched_batches(
    model: Model, images: Images, batch_size: int | None, what: str, progress: bool
) -> Iterator[Float[Tensor, "batch *shape"]]:
    """The images a few at a time, as `batches_of`, with a bar that says what is being looked at."""
    with progress_bar(len(images), what, progress, unit=model.preprocessing.what) as bar:
        for batch in batches_of(model, images, batch_size):
            yield batch
            bar.update(len(batch))


def subjects_of(model: Model, images: Images) -> Subjects:
    """Names, pictures and token layout of images.

    Raises:
        DataError: if the model's tokens do not form a grid over the image.
    """
    n_tokens = int((model.bare or model).embed(images.take(0, 1).to(model.device, model.dtype)).shape[1])
    kinds = model.token_kinds(n_tokens)
    grid = model.grid_at(*images.shape[-2:])
    pictures = [
        picture_on(Sheet(grid), images.take(row, row + 1)[0], model.preprocessing)
        for row in range(len(images))
    ]
    return Subjects(images.names, np.stack(pictures), grid, kinds)
