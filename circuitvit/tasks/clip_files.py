"""One clip file to a model's input: frames of an array or of a video, sampled as the model's `ClipSpec` says.

An array is `(frame, height, width, 3)` or `(frame, height, width)`, 8-bit colours, alone in a `.npy` or
`.npz`; videos are decoded by PyAV, the extra `video`. Each frame goes through the transform of an image.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from circuitvit.errors import DataError, FileError, OptionError, counted
from circuitvit.models.zoo import ClipSpec
from circuitvit.tasks.image_files import flatten, naming, preprocess, refuse_missing

ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
CLIP_SUFFIXES = ARRAY_SUFFIXES | VIDEO_SUFFIXES
"""What counts as a clip when a folder is listed; a file that is named outright is a video, or an array."""


def load_clip(path: str | Path, spec: ClipSpec) -> Float[Tensor, "time channel height width"]:
    """A clip file as the model takes it: some of its frames, each preprocessed like an image.

    Raises:
        DataError: if the file is missing, damaged, no clip, or has too few frames; the message names it.
        FileError: for a video without PyAV.
    """
    path = Path(path)
    refuse_missing(path)
    with naming(path, "clip"):
        frames = _of_array(path, spec) if path.suffix.lower() in ARRAY_SUFFIXES else _of_video(path, spec)
        return torch.stack([preprocess(frame, spec) for frame in frames])


def check_clip(path: str | Path, spec: ClipSpec) -> None:
    """Decode a clip file and see that it can be preprocessed.

    Raises:
        DataError, FileError: as :func:`load_clip`.
    """
    load_clip(path, spec)


def clip_of(frames: Sequence[Image.Image], spec: ClipSpec) -> Float[Tensor, "time channel height width"]:
    """Frames at hand as the model takes them: some of them, each preprocessed like an image.

    Raises:
        DataError: if there are too few.
    """
    chosen = [frames[place] for place in sampled(len(frames), spec)]
    return torch.stack([preprocess(flatten(frame, spec.size[0]), spec) for frame in chosen])


def sampled(count: int, spec: ClipSpec) -> list[int]:
    """Which of a file's frames the model is given: evenly spread from the first to the last, or by stride.

    Args:
        count: how many frames there are.
        spec: the model's preprocessing.

    Raises:
        DataError: if there are too few, and none may be repeated.
        OptionError: if the specification makes no sense.

    Example:
        >>> spec = ClipSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, frames=4)
        >>> sampled(10, spec), sampled(4, spec)
        ([0, 3, 6, 9], [0, 1, 2, 3])
        >>> sampled(10, ClipSpec((3, 8, 8), (0.5,) * 3, (0.5,) * 3, frames=4, stride=2))
        [1, 3, 5, 7]
    """
    if spec.frames < 1 or (spec.stride is not None and spec.stride < 1):
        raise OptionError(f"a clip needs at least 1 frame, and a stride of at least 1: {spec}")
    needed = spec.frames if spec.stride is None else (spec.frames - 1) * spec.stride + 1
    if count < needed and not (spec.repeat and count):
        every = "" if spec.stride is None else f", every {spec.stride}th of {needed}"
        raise DataError(
            f"it has {counted(count, 'frame')}, and the model takes {spec.frames}{every}: give a longer one, "
            "or let frames be repeated with preprocessing=ClipSpec(..., repeat=True)"
        )
    if spec.stride is None or count < needed:
        spread: list[int] = np.linspace(0, count - 1, spec.frames).round().astype(int).tolist()
        return spread
    first = (count - needed) // 2
    return list(range(first, first + needed, spec.stride))


# -- arrays of frames ----------------------------------------------------------------------------


def _of_array(path: Path, spec: ClipSpec) -> list[Image.Image]:
    frames = _array(path)
    if frames.dtype != np.uint8 or frames.ndim not in (3, 4) or frames.shape[3:] not in ((), (1,), (3,)):
        raise DataError(
            f"its array is {frames.dtype} of shape {frames.shape}: frames are uint8, (frame, height, width) "
            "or (frame, height, width, 3)"
        )
    if 0 in frames.shape:
        raise DataError(f"its array of shape {frames.shape} is empty")
    frames = frames[..., 0] if frames.shape[3:] == (1,) else frames
    return [Image.fromarray(frames[place]) for place in sampled(len(frames), spec)]


def _array(path: Path) -> NDArray[Any]:
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        with found:
            if len(found.files) != 1:
                raise DataError(
                    f"it holds {len(found.files)} arrays ({', '.join(found.files[:5])}): a clip is one, as "
                    "np.savez(path, frames=...) writes it; or give a tensor"
                )
            array: NDArray[Any] = found[found.files[0]]
            return array
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"it is no array that numpy can read, or damaged: {error}") from error


# -- videos --------------------------------------------------------------------------------------


def _of_video(path: Path, spec: ClipSpec) -> list[Image.Image]:
    """The frames that are wanted. Containers are often wrong about their length, so it is counted first."""
    count = sum(1 for _ in _decoded(path))
    if not count:
        raise DataError("no frame of it can be decoded")
    wanted = sampled(count, spec)
    places = set(wanted)
    kept = {
        place: Image.fromarray(_pixels(frame))
        for place, frame in enumerate(_decoded(path))
        if place in places
    }
    return [kept[place] for place in wanted]


def _pixels(frame: Any) -> UInt8[np.ndarray, "height width 3"]:
    if getattr(frame, "rotation", 0):
        raise DataError(
            f"its frames are stored turned by {frame.rotation} degrees: save it upright first, as ffmpeg does"
        )
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    return pixels


def _decoded(path: Path) -> Iterator[Any]:
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise DataError("it has no video stream")
            yield from container.decode(video=0)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # what PyAV's own errors derive from
        raise DataError(f"it cannot be decoded, it may be truncated or no video: {error}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise FileError(
            "video files need PyAV, which is not installed: pip install circuitvit[video]"
        ) from error
    return av
