"""Image files to model inputs, and the two ways of holding them: a tensor at hand, or files read when needed.

Everything here ends in float32 tensors `(channel, height, width)` as the model takes them. What is a tensor
already is taken as preprocessed; what is a path goes through the model's own preprocessing. Every complaint
about a file names it, and none need wait for long work to begin: `Images.check` decodes all of them first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from circuitvit.errors import DataError, OptionError, unknown_name
from circuitvit.models.processor import ProcessorSpec
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""What counts as an image when a folder is listed; a file that is named outright may end in anything."""

_MAX_PIXELS = 100_000_000  # of a picture once resized: far more than any camera's, scaled to a model's input
_EXIF_ORIENTATION = 0x0112
_TURN = Image.Transpose
_UPRIGHT = {
    2: _TURN.FLIP_LEFT_RIGHT, 3: _TURN.ROTATE_180, 4: _TURN.FLIP_TOP_BOTTOM, 5: _TURN.TRANSPOSE,
    6: _TURN.ROTATE_270, 7: _TURN.TRANSVERSE, 8: _TURN.ROTATE_90,
}  # fmt: skip


# -- one file ------------------------------------------------------------------------------------


def decode_image(path: str | Path) -> Image.Image:
    """An image file decoded to its last pixel and turned upright, in the mode it was saved in.

    Of an animation it is the first frame.

    Raises:
        DataError: if the file is missing, unreadable, truncated, no image, or decodes to absurdly many
            pixels (Pillow's own limit); the message names it.
    """
    path = Path(path)
    _refuse_missing(path)
    try:
        with Image.open(path) as opened:
            opened.load()
            # Not `ImageOps.exif_transpose`: it rewrites the EXIF data too, and fails where that is damaged.
            turn = _UPRIGHT.get(opened.getexif().get(_EXIF_ORIENTATION, 1))
            return opened.copy() if turn is None else opened.transpose(turn)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image, whatever its name says, or lacks its beginning") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"the image {path} is absurdly large, scale it down first: {error}") from error
    except Exception as error:  # decoders run on arbitrary bytes and raise nearly anything
        raise DataError(f"cannot read the image {path}, it may be truncated or damaged: {error}") from error


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """An image file in 8-bit colours, decoded in full and upright; what is transparent becomes white.

    16-bit greyscale is scaled to 8 bits.

    Args:
        path: of the file.
        channels: 3 for mode "RGB", 1 for mode "L".

    Raises:
        DataError: as :func:`decode_image`, and for pixels that have no 8-bit meaning (floating point).
        OptionError: for another number of channels.
    """
    image = decode_image(path)
    with _naming(path):
        return _flatten(image, channels)


def preprocess(image: Image.Image, spec: InputSpec) -> Float[Tensor, "channel height width"]:
    """A picture as the model takes it: timm's own evaluation transform for `spec`, in float32.

    The short side is resized to `size / crop_pct`, the middle is cropped out, and pixels in [0, 1] are
    normalised by mean and standard deviation.

    Raises:
        DataError: for a picture so elongated that resizing its short side would fill the memory.
        OptionError: for a `spec` that contradicts itself.

    Example:
        >>> spec = InputSpec((3, 32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> tensor = preprocess(Image.new("RGB", (64, 48), "white"), spec)
        >>> tensor.shape, tensor.min().item()
        (torch.Size([3, 32, 32]), 1.0)
    """
    transform = _transform(spec)
    _refuse_elongated(image, spec)
    return transform(_flatten(image, spec.size[0]))


def load_image(path: str | Path, spec: InputSpec) -> Float[Tensor, "channel height width"]:
    """An image file as the model takes it: :func:`read_image`, then :func:`preprocess`.

    Raises:
        DataError, OptionError: as those two; the message names the file.
    """
    image = read_image(path, spec.size[0])
    with _naming(path):
        return preprocess(image, spec)


def _flatten(image: Image.Image, channels: int) -> Image.Image:
    """`image` in mode "RGB" or "L", composited on white."""
    if channels not in (1, 3):
        raise OptionError(
            f"image files give 1 or 3 channels and the model takes {channels}: preprocess the images "
            "yourself, and give a tensor (image, channel, height, width)"
        )
    mode = "RGB" if channels == 3 else "L"
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_8_bits(image)
    try:
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert(mode)
    except ValueError as error:  # such as LAB, for which Pillow has no conversion
        raise DataError(f"its pixels are {image.mode}, which cannot be converted to {mode}") from error


def _to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit greyscale (mode "I" or "I;16") in mode "L"; Pillow alone would clip it to white."""
    pixels = np.asarray(image)
    if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
        raise DataError("its pixels are numbers without a fixed range: save it with 8 or 16 bits")
    return Image.fromarray((pixels / 257).round().astype(np.uint8))


@lru_cache(maxsize=64)
def _transform(spec: InputSpec) -> Callable[[Image.Image], Tensor]:
    if min(spec.size) < 1 or not spec.crop_pct > 0:
        raise OptionError(f"preprocessing needs a size (channels, height, width) and a crop_pct: {spec}")
    if not len(spec.mean) == len(spec.std) == spec.size[0] or not min(spec.std) > 0:
        raise OptionError(f"preprocessing needs a mean, and a std above 0, for every channel: {spec}")
    if isinstance(spec, ProcessorSpec):
        return spec.transform()
    try:
        transform: Callable[[Image.Image], Tensor] = import_timm().data.create_transform(
            input_size=spec.size, is_training=False, interpolation=spec.interpolation,
            mean=spec.mean, std=spec.std, crop_pct=spec.crop_pct, crop_mode=spec.crop_mode,
        )  # fmt: skip
    except KeyError as error:
        known = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
        raise OptionError(str(unknown_name("interpolation", spec.interpolation, known))) from error
    return transform


def _refuse_elongated(image: Image.Image, spec: InputSpec) -> None:
    """A picture of 1 x 65,000 pixels passes every limit on its size, and becomes 224 x 14 million."""
    _, height, width = spec.size
    scale = max(height / image.height, width / image.width) / spec.crop_pct
    if image.height * image.width * scale**2 > _MAX_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too elongated to crop to {width} x {height}"
        )


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path} is a folder, where an image file was expected")
    if not path.is_file():
        raise DataError(
            f"no image {path}: {'not a regular file' if path.exists() else 'there is no such file'}"
        )


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Put the name of the file before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"cannot use the image {path}: {error}") from error


# -- many images ---------------------------------------------------------------------------------


class Images(ABC):
    """A fixed, ordered set of model inputs, taken a slice at a time, be it a tensor or files on a disk."""

    @abstractmethod
    def __len__(self) -> int:
        """How many images there are; at least 1."""

    @abstractmethod
    def take(self, start: int, stop: int) -> Float[Tensor, "image channel height width"]:
        """Images `start` to `stop` (exclusive, as in a slice), in float32 on the CPU."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """What to call each image in messages and reports."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of each image."""

    @abstractmethod
    def check(self, quiet: bool = False) -> None:
        """Find out now, before long work, whether every image can be read.

        Files are decoded once, with a progress bar, unless `quiet`, when that takes more than a second.

        Raises:
            DataError: for the first image that cannot be read; the message names it.
        """


@dataclass(frozen=True, eq=False, repr=False)
class TensorImages(Images):
    """Images that are preprocessed already. Float32 values on the CPU are not copied.

    Attributes:
        tensor: (image, channel, height, width); a single (channel, height, width) becomes a batch of one.

    Raises:
        DataError: if the tensor has other dimensions, is empty, is not floating, or holds NaN or infinity.

    Example:
        >>> images = TensorImages(torch.zeros(2, 3, 32, 32))
        >>> len(images), images.shape, images.names
        (2, (3, 32, 32), ('image 0', 'image 1'))
    """

    tensor: Float[Tensor, "image channel height width"]

    def __post_init__(self) -> None:
        tensor, shape = self.tensor.detach(), tuple(self.tensor.shape)
        if tensor.ndim not in (3, 4):
            raise DataError(f"images are (image, channel, height, width), not of shape {shape}")
        if tensor.numel() == 0:
            raise DataError(f"no images: the tensor of shape {shape} is empty")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"a tensor is taken as preprocessed, and this one is {kind}: scale and normalise "
                            "the pixels first (see model.preprocessing), or give image files")  # fmt: skip
        tensor = tensor.to("cpu", torch.float32).reshape(-1, *shape[-3:])
        bad = (~tensor.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"NaN or infinite values in {len(bad)} of {len(tensor)} images, first image {bad[0]}"
            )
        object.__setattr__(self, "tensor", tensor)

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, start: int, stop: int) -> Float[Tensor, "image channel height width"]:
        return self.tensor[start:stop]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"image {index}" for index in range(len(self)))

    @property
    def shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self.tensor.shape
        return channels, height, width

    def check(self, quiet: bool = False) -> None:
        """Nothing is left to find out: the constructor looks at every value."""

    def __repr__(self) -> str:
        return f"TensorImages({len(self)} of {' x '.join(map(str, self.shape))})"


@dataclass(frozen=True, repr=False)
class FileImages(Images):
    """Image files, decoded each time they are taken, so that thousands need no more memory than one batch.

    Attributes:
        paths: of the files, at least one.
        spec: the model's preprocessing.

    Raises:
        DataError: if there are no paths, or one of them is not a file.
    """

    paths: tuple[Path, ...]
    spec: InputSpec

    def __post_init__(self) -> None:
        object.__setattr__(self, "paths", tuple(Path(path) for path in self.paths))
        if not self.paths:
            raise DataError("no images: the list of paths is empty")
        for path in self.paths:
            _refuse_missing(path)

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, start: int, stop: int) -> Float[Tensor, "image channel height width"]:
        loaded = [load_image(path, self.spec) for path in self.paths[start:stop]]
        return torch.stack(loaded) if loaded else torch.empty(0, *self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.spec.size

    def check(self, quiet: bool = False) -> None:
        for path in tqdm(self.paths, desc="checking", unit="image", disable=quiet, leave=False, delay=1.0):
            image = read_image(path, self.spec.size[0])
            with _naming(path):
                _refuse_elongated(image, self.spec)

    def __repr__(self) -> str:
        return f"FileImages({len(self)} files: {few(self.names)})"


ImageSpec = Images | Tensor | NDArray[np.floating] | str | Path | Sequence[str | Path]
"""Images as a preprocessed tensor, a file, a folder, or a list of files."""


def as_images(source: ImageSpec, spec: InputSpec) -> Images:
    """Whatever a user gives for images, as `Images`.

    Args:
        source: a tensor or array, taken as preprocessed; the path of a file; the path of a folder, for all
            image files right in it, sorted by name (hidden files and other files are ignored); or a list
            of paths of files.
        spec: the model's preprocessing, for paths. Of a tensor only the number of channels is compared
            with it, because some models take any height and width.

    Raises:
        DataError: for a missing file or folder, a folder without images, or an unusable tensor.

    Example:
        >>> as_images(torch.zeros(3, 32, 32), InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3))
        TensorImages(1 of 3 x 32 x 32)
    """
    if isinstance(source, np.ndarray) and source.dtype.kind in "biuf":
        source = torch.from_numpy(np.array(source))  # copied: an array may be read-only or run backwards
    if isinstance(source, Tensor):
        source = TensorImages(source)
    if isinstance(source, Images):
        if source.shape[0] != spec.size[0]:
            raise DataError(
                f"images of shape {source.shape}, but the model takes {spec.size} (channels first)"
            )
        return source
    if isinstance(source, (str, Path)) and str(source):
        path = Path(source)
        return FileImages(list_images(path) if path.is_dir() else (path,), spec)
    if isinstance(source, Sequence) and all(isinstance(item, (str, Path)) for item in source):
        return FileImages(tuple(map(Path, source)), spec)
    raise DataError(
        f"cannot take images from {type(source).__name__}: give one tensor (image, channel, height, width), "
        "or paths; torch.stack joins a list of tensors, preprocess() turns a PIL image into one"
    )


# -- folders -------------------------------------------------------------------------------------


def list_images(folder: Path) -> tuple[Path, ...]:
    """The image files right in a folder, sorted by name."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    images = tuple(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        found = f" (it holds {few([path.name for path in files])})" if files else ""
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DataError(f"the folder {folder} has no images, which end in {known}{found}")
    return images


def few(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
