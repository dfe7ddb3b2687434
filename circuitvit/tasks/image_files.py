"""One image file to a model's input: decoding, colours, and the model's own preprocessing.

Everything here ends in float32 tensors `(channel, height, width)` as the model takes them, and every
complaint about a file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

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


def decode_image(path: str | Path) -> Image.Image:
    """An image file decoded to its last pixel and turned upright, in the mode it was saved in.

    Of an animation it is the first frame.

    Raises:
        DataError: if the file is missing, unreadable, truncated, no image, or decodes to absurdly many
            pixels (Pillow's own limit); the message names it.
    """
    path = Path(path)
    refuse_missing(path)
    try:
        with Image.open(path) as opened:
            return _upright(opened)
    except UnidentifiedImageError as error:
        raise DataError(f"{path} is not an image, whatever its name says, or lacks its beginning") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"the image {path} is absurdly large, scale it down first: {error}") from error
    except Exception as error:  # decoders run on arbitrary bytes and raise nearly anything
        raise DataError(f"cannot read the image {path}, it may be truncated or damaged: {error}") from error


def flatten(image: Image.Image, channels: int) -> Image.Image:
    """A picture at hand as :func:`read_image` gives those of files.

    Raises:
        DataError, OptionError: as that; also for a file that was opened and cannot be decoded.
    """
    try:
        image = _upright(image)
    except Exception as error:  # the same decoders, which begin when pixels are first asked for
        raise DataError(f"it cannot be decoded: {error}") from error
    return _flatten(image, channels)


def _upright(opened: Image.Image) -> Image.Image:
    """A copy, decoded to its last pixel, turned as the camera was held."""
    opened.load()
    # Not `ImageOps.exif_transpose`: it rewrites the EXIF data too, and fails where that is damaged.
    turn = _UPRIGHT.get(opened.getexif().get(_EXIF_ORIENTATION, 1))
    return opened.copy() if turn is None else opened.transpose(turn)


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
    with naming(path):
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
    refuse_elongated(image, spec)
    return transform(_flatten(image, spec.size[0]))


def load_image(path: str | Path, spec: InputSpec) -> Float[Tensor, "channel height width"]:
    """An image file as the model takes it: :func:`read_image`, then :func:`preprocess`.

    Raises:
        DataError, OptionError: as those two; the message names the file.
    """
    image = read_image(path, spec.size[0])
    with naming(path):
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


def check_image(path: str | Path, spec: InputSpec) -> None:
    """Decode an image file and see that it can be preprocessed.

    Raises:
        DataError: as :func:`load_image`.
    """
    image = read_image(path, spec.size[0])
    with naming(path):
        refuse_elongated(image, spec)


def refuse_elongated(image: Image.Image, spec: InputSpec) -> None:
    """Refuse what fits every limit on its size but one: 1 x 65,000 pixels become 224 x 14 million.

    Raises:
        DataError: naming both sizes; also for a picture without pixels.
    """
    _, height, width = spec.size
    if 0 in image.size:
        raise DataError(f"it has no pixels: {image.width} x {image.height}")
    scale = max(height / image.height, width / image.width) / spec.crop_pct
    if image.height * image.width * scale**2 > _MAX_PIXELS:
        raise DataError(
            f"{image.width} x {image.height} pixels are too elongated to crop to {width} x {height}"
        )


def is_sentence(text: str) -> bool:
    """Whether a text that names no file is rather a sentence: several words, and nothing that ends a file's
    name.
    """
    suffix = Path(text).suffix
    return " " in text.strip() and (not suffix or " " in suffix) and not {"/", "\\"} & set(text)


def refuse_missing(path: Path) -> None:
    """Refuse a path that is no file.

    Raises:
        DataError: naming it.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, where an image file was expected")
    if not path.is_file():
        sentence = is_sentence(str(path)) and not path.exists()
        raise DataError(
            f"no image {path}: {'not a regular file' if path.exists() else 'there is no such file'}"
            + ("; sentences are for the text tower, model.text(images=...)" if sentence else "")
        )


@contextmanager
def naming(path: str | Path, what: str = "image") -> Iterator[None]:
    """Put the name of the file before the message of a DataError."""
    try:
        yield
    except DataError as error:
        raise DataError(f"cannot use the {what} {path}: {error}") from error
