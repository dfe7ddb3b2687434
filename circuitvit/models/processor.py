"""Pictures to inputs as the image processors of transformers do it, to the last bit.

timm resizes the picture by Pillow and crops to the nearest pixel; transformers resizes a tensor by
torchvision, and rounds crops down. The difference is a level of brightness and a pixel here and there, but
then the numbers are not those that a user of the library has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from circuitvit.errors import OptionError, unknown_name
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import ClipSpec, InputSpec

MODES = {"nearest": "NEAREST_EXACT", "lanczos": "LANCZOS", "bilinear": "BILINEAR", "bicubic": "BICUBIC"}
"""What torchvision calls the ways to resize a tensor."""


@dataclass(frozen=True)
class ProcessorSpec(InputSpec):
    """How pictures become the input of a model of transformers; `crop_pct` says nothing here.

    What is resized is a tensor of bytes. The middle of `size` is cropped out of it, with black around where
    it is smaller.

    Attributes:
        resize: height and width that a picture is squeezed to; or the length of its short side; or nothing,
            where it is not resized.
        floats: whether numbers from 0 to 1 are resized, which are not rounded (DINOv3).
    """

    resize: tuple[int, ...] = ()
    floats: bool = False

    def transform(self) -> Callable[[Image.Image], Float[Tensor, "channel height width"]]:
        """From a picture in mode "RGB" or "L" to the input, in float32.

        Raises:
            OptionError: for an interpolation that torchvision does not know for tensors.
        """
        if self.interpolation not in MODES:
            raise OptionError(str(unknown_name("interpolation", self.interpolation, MODES)))
        import_timm()  # after which torchvision can be imported
        functional = import_module("torchvision.transforms.v2.functional")
        mode = functional.InterpolationMode[MODES[self.interpolation]]

        def transform(image: Image.Image) -> Float[Tensor, "channel height width"]:
            pixels = torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)
            pixels = pixels.permute(2, 0, 1).contiguous()
            pixels = pixels * (1 / 255) if self.floats else pixels
            if self.resize:
                pixels = functional.resize(
                    pixels, self._resized(*pixels.shape[1:]), interpolation=mode, antialias=True
                )
            pixels = functional.pad(pixels, self._missing(*pixels.shape[1:]))
            top, left = (
                (have - want) // 2 for have, want in zip(pixels.shape[1:], self.size[1:], strict=True)
            )
            pixels = functional.crop(pixels, top, left, *self.size[1:]).float()
            levels = 1.0 if self.floats else 255.0
            mean, std = torch.tensor(self.mean) * levels, torch.tensor(self.std) * levels
            normalised: Tensor = functional.normalize(pixels, mean, std)
            return normalised

        return transform

    def _resized(self, height: int, width: int) -> list[int]:
        """Height and width of a picture once it is resized."""
        if len(self.resize) == 2:
            return list(self.resize)
        short, long = self.resize[0], int(self.resize[0] * max(height, width) / min(height, width))
        return [short, long] if height <= width else [long, short]

    def _missing(self, height: int, width: int) -> list[int]:
        """What is missing on the left, at the top, on the right and at the bottom."""
        down, right = (max(want - have, 0) for want, have in zip(self.size[1:], (height, width), strict=True))
        return [right // 2, down // 2, (right + 1) // 2, (down + 1) // 2]


@dataclass(frozen=True)
class ProcessorClips(ClipSpec, ProcessorSpec):
    """The same for each frame of a clip, as the video processors of transformers do it."""
