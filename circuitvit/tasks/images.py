"""Images and clips: a tensor at hand, pictures at hand, or files read when they are needed.

Everything here ends in float32 tensors of the shape that the model's `InputSpec` says: an image is
`(channel, height, width)`, a clip `(time, channel, height, width)`. What is a tensor already is taken as
preprocessed; pictures, 8-bit pixels and paths go through the model's own preprocessing. Every complaint about
a file names it, and none need wait for long work to begin: `Images.check` decodes all of them first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from circuitvit._progress import progress_bar
from circuitvit.errors import DataError, counted
from circuitvit.models.sentences import TextSpec
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.tasks.ahead import in_threads
from circuitvit.tasks.clip_files import CLIP_SUFFIXES, check_clip, clip_of, load_clip
from circuitvit.tasks.image_files import (
    IMAGE_SUFFIXES,
    check_image,
    flatten,
    load_image,
    naming,
    preprocess,
    refuse_elongated,
    refuse_missing,
)
from circuitvit.tasks.inputs import Images as Images
from circuitvit.tasks.inputs import few as few
from circuitvit.tasks.pictures import name_of, pictures_at_hand
from circuitvit.tasks.sentences import sentences_of

SPECS: tuple[type[InputSpec], ...] = (InputSpec, ClipSpec)
"""The kinds of inputs; a tensor of them has one dimension more than they have axes."""

SUFFIXES = {"image": IMAGE_SUFFIXES, "clip": CLIP_SUFFIXES}


@dataclass(frozen=True, eq=False, repr=False)
class TensorImages(Images):
    """Images that are preprocessed already. Float32 values on the CPU are not copied.

    Attributes:
        tensor: images (image, channel, height, width), of which a single one (channel, height, width) becomes
            a batch of one; or clips (clip, time, channel, height, width).

    Raises:
        DataError: if the tensor has other dimensions, is empty, is not floating, or holds NaN or infinity.

    Example:
        >>> images = TensorImages(torch.zeros(2, 3, 32, 32))
        >>> len(images), images.shape, images.names
        (2, (3, 32, 32), ('image 0', 'image 1'))
    """

    tensor: Float[Tensor, "image *shape"]

    def __post_init__(self) -> None:
        tensor, shape = self.tensor.detach(), tuple(self.tensor.shape)
        tensor = tensor[None] if tensor.ndim == 3 else tensor
        if tensor.ndim not in (4, 5):
            raise DataError(f"{_said(InputSpec)}, {_said(ClipSpec)}, not of shape {shape}")
        if tensor.numel() == 0:
            raise DataError(f"no images: the tensor of shape {shape} is empty")
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(f"a tensor is taken as preprocessed, and this one is {kind}: scale and normalise "
                            "the pixels first (see model.preprocessing), or give image files")  # fmt: skip
        tensor = tensor.to("cpu", torch.float32)
        bad = (~tensor.flatten(1).isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise DataError(
                f"NaN or infinite values in {len(bad)} of {len(tensor)} images, first image {bad[0]}"
            )
        object.__setattr__(self, "tensor", tensor)

    def __len__(self) -> int:
        return len(self.tensor)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        return self.tensor[start:stop]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"image {index}" for index in range(len(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape[1:])

    def check(self, progress: bool = True) -> None:
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
            refuse_missing(path)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def slow(self) -> bool:
        return True

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        paths = self.paths[start:stop]
        found = torch.empty(len(paths), *self.shape)

        def load(row: int) -> None:
            found[row] = self._load(paths[row])

        for _ in in_threads(load, range(len(paths))):
            pass
        return found

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.paths)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def check(self, progress: bool = True) -> None:
        with progress_bar(len(self), "checking", progress, unit=self.spec.what) as bar:
            for _ in in_threads(self._check, self.paths):
                bar.update()

    def _load(self, path: Path) -> Float[Tensor, "*shape"]:
        return load_image(path, self.spec)

    def _check(self, path: Path) -> None:
        check_image(path, self.spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} files: {few(self.names)})"


@dataclass(frozen=True, repr=False)
class FileClips(FileImages):
    """Videos or arrays of frames, decoded each time they are taken, and sampled as the preprocessing says."""

    spec: ClipSpec

    def _load(self, path: Path) -> Float[Tensor, "time channel height width"]:
        return load_clip(path, self.spec)

    def _check(self, path: Path) -> None:
        check_clip(path, self.spec)


@dataclass(frozen=True, eq=False, repr=False)
class HeldImages(Images):
    """Pictures at hand, preprocessed each time they are taken, as their files would be.

    Attributes:
        pictures: of Pillow, at least one, as they are.
        spec: the model's preprocessing.

    Example:
        >>> spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
        >>> HeldImages((Image.new("RGB", (64, 48), "white"),), spec).take(0, 1).shape
        torch.Size([1, 3, 32, 32])
    """

    pictures: tuple[Image.Image, ...]
    spec: InputSpec

    def __len__(self) -> int:
        return len(self.pictures)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        made = []
        for name, picture in self._named(start, stop):
            with naming(name):
                made.append(preprocess(flatten(picture, self.spec.size[0]), self.spec))
        return torch.stack(made) if made else torch.empty(0, *self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self._named(0, len(self)))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    def check(self, progress: bool = True) -> None:
        for name, picture in self._named(0, len(self)):
            with naming(name):
                refuse_elongated(flatten(picture, self.spec.size[0]), self.spec)

    def _named(self, start: int, stop: int) -> list[tuple[str, Image.Image]]:
        places = range(*slice(start, stop).indices(len(self.pictures)))
        return [(name_of(self.pictures[place], place), self.pictures[place]) for place in places]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({counted(len(self), 'picture')}: {few(self.names)})"


@dataclass(frozen=True, eq=False, repr=False)
class MadeImages(Images):
    """Images made of others, one by one, when they are needed.

    Attributes:
        whole: what they are made of.
        change: from a batch of one to a batch of one of the same shape.
    """

    whole: Images
    change: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.whole)

    def take(self, start: int, stop: int) -> Float[Tensor, "image *shape"]:
        taken = self.whole.take(start, stop)
        made = [self._made(taken[row : row + 1].clone()) for row in range(len(taken))]
        return torch.cat(made) if made else taken

    def _made(self, image: Float[Tensor, "1 *shape"]) -> Float[Tensor, "1 *shape"]:
        made: Any = self.change(image)
        given = made.shape if isinstance(made, Tensor) else type(made).__name__
        if given != image.shape:
            raise DataError(
                f"the corruption gives {given} for {image.shape}: it takes a batch and gives one of its shape"
            )
        if not made.isfinite().all():
            raise DataError("the corruption gives NaN or infinite values")
        changed: Tensor = made.to("cpu", torch.float32)
        return changed

    @property
    def names(self) -> tuple[str, ...]:
        return self.whole.names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.whole.shape

    def check(self, progress: bool = True) -> None:
        """The images themselves are checked where they are; whether the change can be made is seen on one."""
        self.take(0, 1)


Picture = Image.Image | Tensor | NDArray[Any]
"""One image at hand: a picture of Pillow, an array of 8-bit pixels, or a preprocessed array."""

ImageSpec = Images | Picture | str | Path | Sequence[str | Path] | Sequence[Picture]
"""Images or clips as a preprocessed tensor, a file, a folder, or a list of files; images as pictures too."""


def as_images(source: ImageSpec, spec: InputSpec) -> Images:
    """Whatever a user gives for images, as `Images`.

    Args:
        source: sentences, alone or in a list, or a text file of them, where the model is a text tower; else
            the path of a file; the path of a folder, for all image (or clip) files right in it, sorted by
            name (hidden files and other files are ignored); a list of paths of files; a picture of Pillow, an
            array or tensor of 8-bit pixels (colours last or first), or a list of these; a floating-point
            tensor or array, or a list of these, taken as preprocessed. 8-bit pixels with four dimensions are
            a clip's frames where the model takes clips.
        spec: the model's preprocessing, for all that is not preprocessed. Of a tensor height and width are
            not compared with it, because some models take any.

    Raises:
        DataError: for a missing file or folder, a folder without images, or an unusable tensor; for images
            where the model takes clips, and the other way round.

    Example:
        >>> spec = InputSpec((3, 32, 32), (0.5,) * 3, (0.5,) * 3)
        >>> as_images(torch.zeros(3, 32, 32), spec)
        TensorImages(1 of 3 x 32 x 32)
        >>> as_images([Image.new("RGB", (64, 48)), np.zeros((48, 64, 3), np.uint8)], spec)
        HeldImages(2 pictures: image 0, image 1)
    """
    if isinstance(source, Images):
        refuse_other(source.shape, spec, (*source.shape[:-2], *spec.shape[-2:]) == spec.shape)
        return source
    if isinstance(spec, TextSpec):
        return sentences_of(source, spec)
    if isinstance(source, (str, Path)) and str(source):
        path = Path(source)
        return files_of(list_images(path, spec) if path.is_dir() else (path,), spec)
    if isinstance(source, Sequence) and all(isinstance(item, (str, Path)) for item in source):
        return files_of(tuple(Path(item) for item in source if isinstance(item, (str, Path))), spec)
    held = pictures_at_hand(source)
    if held is not None and isinstance(spec, ClipSpec):
        return _clips(source, held, spec)
    if held is not None:
        return HeldImages(held, spec)
    found = _preprocessed(source, spec)
    refuse_other(found.shape, spec, (*found.shape[:-2], *spec.shape[-2:]) == spec.shape)
    return found


def _clips(source: object, pictures: tuple[Image.Image, ...], spec: ClipSpec) -> Images:
    """Pictures for a model of clips: the frames of one, or arrays that each hold the frames of one."""
    if not isinstance(source, Sequence) or not any(getattr(each, "ndim", 0) == 4 for each in source):
        with naming("of these frames", "clip"):
            return TensorImages(clip_of(pictures, spec)[None])
    clips = []
    for place, each in enumerate(source):
        with naming(f"{place} of the list", "clip"):
            clips.append(clip_of(pictures_at_hand(each) or (), spec))
    return TensorImages(torch.stack(clips))


def _preprocessed(source: object, spec: InputSpec) -> TensorImages:
    """Numbers that are no pixels, alone or in a list of one shape."""
    if (
        isinstance(source, Sequence)
        and source
        and all(isinstance(each, (Tensor, np.ndarray)) for each in source)
    ):
        each = [_tensor(one) if isinstance(one, np.ndarray) else one for one in source]
        shapes = {tuple(one.shape) for one in each}
        if len(shapes) > 1:
            raise DataError(f"tensors of a list must be alike, and have shapes {', '.join(map(str, shapes))}")
        source = torch.stack(each)
    if isinstance(source, np.ndarray) and source.dtype.kind in "biuf":
        source = _tensor(source)
    if not isinstance(source, Tensor):
        raise DataError(
            f"cannot take {spec.what}s from {type(source).__name__}: give paths, pictures of Pillow, arrays "
            f"of 8-bit pixels, or one tensor ({spec.what}, {', '.join(spec.axes)})"
        )
    if source.ndim in (3, 4) and source.shape[-1] in (1, 3, 4) and source.shape[-3] != spec.shape[-3]:
        kind = str(source.dtype).removeprefix("torch.")
        raise DataError(
            f"an array of shape {tuple(source.shape)} has its colours last, as pixels have, and its numbers "
            f"are {kind}: give pixels as uint8, from 0 to 255"
        )
    return TensorImages(source)


def _tensor(array: NDArray[Any]) -> Tensor:
    """An array as a tensor, copied: it may be read-only, run backwards, or be of another machine's bytes."""
    try:
        return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise DataError(f"cannot take numbers of {array.dtype}: give float32, or pixels as uint8") from error


def files_of(paths: tuple[Path, ...], spec: InputSpec) -> FileImages:
    """Files of images, or of clips where the model takes clips.

    Raises:
        DataError: if there are no paths, or one of them is not a file, or one of the other kind.
    """
    for path in paths:
        for what, suffixes in SUFFIXES.items():
            if what != spec.what and path.suffix.lower() in suffixes:
                raise DataError(f"{path} is {_article(what)}, and the model takes {spec.what}s")
    return FileClips(paths, spec) if isinstance(spec, ClipSpec) else FileImages(paths, spec)


def refuse_other(shape: tuple[int, ...], spec: InputSpec, fits: bool) -> None:
    """Refuse inputs of another shape than the model's.

    Args:
        shape: of one of them.
        spec: the model's preprocessing.
        fits: whether the shape will do.

    Raises:
        DataError: naming both shapes and their axes, and saying so where an image is given for a clip.
    """
    if not fits and isinstance(spec, TextSpec) and shape[:-1] == spec.shape[:-1]:
        way = f", as edits at places are for these: .text(images, tokens={shape[-1]}) is for others"
        raise DataError(
            f"sentences of {counted(shape[-1], 'token')}, and the model takes those of {spec.shape[-1]}"
            + (", padding among them" if spec.whole else way)
        )
    if not fits:
        given = next((kind for kind in SPECS if len(kind.axes) == len(shape)), type(spec))
        way = ""
        if given.what != spec.what:
            way = f"; a batch of {spec.what}s is ({spec.what}, {', '.join(spec.axes)})"
        raise DataError(
            f"{given.what}s of shape {shape} ({', '.join(given.axes)}), but the model takes {spec.what}s of "
            f"{spec.shape} ({', '.join(spec.axes)}){way}"
        )


# -- folders -------------------------------------------------------------------------------------


def list_images(folder: Path, spec: InputSpec | None = None) -> tuple[Path, ...]:
    """The image files right in a folder, or the clips where the model takes those, sorted by name."""
    what = "image" if spec is None else spec.what
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder" if folder.exists() else f"there is no folder {folder}")
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    files = [path for path in inside if path.is_file()]
    images = tuple(path for path in files if path.suffix.lower() in SUFFIXES[what])
    if not images:
        holds = [path.name if path in files else f"the folder {path.name}" for path in inside]
        found = f" (it holds {few(holds)})" if holds else ""
        known = ", ".join(sorted(SUFFIXES[what]))
        raise DataError(f"the folder {folder} has no {what}s, which end in {known}{found}")
    return images


def _said(kind: type[InputSpec]) -> str:
    return f"{kind.what}s are ({kind.what}, {', '.join(kind.axes)})"


def _article(what: str) -> str:
    return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"
