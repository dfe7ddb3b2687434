"""Vectors that a model's outputs are compared with: given as numbers, or read from a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from circuitvit.errors import DataError, OptionError

VectorSpec = Tensor | NDArray[np.floating] | Sequence[float] | str | Path
"""A vector as numbers, or the file of one: `.npy`, or `.safetensors` with a single tensor."""

VECTOR_FILES = (".npy", ".safetensors")


def is_vector(source: object) -> bool:
    """Whether a source is meant for a vector: one axis of numbers, or the file of one; and not an image.

    Example:
        >>> is_vector([1.0, 0.5]), is_vector("direction.npy"), is_vector("cat.png")
        (True, True, False)
    """
    if isinstance(source, (str, Path)):
        return Path(source).suffix.lower() in VECTOR_FILES
    if isinstance(source, (Tensor, np.ndarray)):
        return source.ndim < 3
    return isinstance(source, Sequence) and all(isinstance(item, (int, float)) for item in source)


def read_vector(source: VectorSpec, width: int, what: str) -> Float[Tensor, " width"]:
    """The vector in float64 on the CPU.

    Args:
        source: numbers or a file, see `VectorSpec`.
        width: how many numbers there have to be: the model's outputs.
        what: what it is for, for messages.

    Raises:
        DataError: if the file cannot be read, or the vector has another width, is zero, NaN or infinite.
        OptionError: if it is no vector at all.

    Example:
        >>> read_vector([3.0, 4.0], 2, "the direction").tolist()
        [3.0, 4.0]
    """
    try:
        given = _read_file(Path(source)) if isinstance(source, (str, Path)) else torch.as_tensor(source)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionError(f"{what} is no vector of numbers: {error}") from error
    if given.dtype == torch.bool or given.is_complex():
        raise OptionError(f"{what} is no vector of real numbers, but of {given.dtype}")
    return checked_vector(given.detach().to("cpu", torch.float64), width, what)


def checked_vector(vector: Float[Tensor, " width"], width: int, what: str) -> Float[Tensor, " width"]:
    """The vector, if it can be compared with outputs of this width.

    Raises:
        DataError: as `read_vector`.
    """
    if tuple(vector.shape) != (width,):
        raise DataError(f"{what} has shape {tuple(vector.shape)}, and the model gives {width} outputs")
    if not vector.isfinite().all():
        raise DataError(f"{what} holds NaN or infinite values")
    if not vector.any():
        raise DataError(f"{what} is zero, so it points nowhere")
    return vector


def _read_file(path: Path) -> Tensor:
    if not path.is_file():
        raise DataError(f"cannot read the vector {path}: there is no such file")
    try:
        if path.suffix.lower() == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        tensors = load_file(path)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise DataError(f"cannot read the vector {path}: {error}") from error
    if len(tensors) != 1:
        raise DataError(f"cannot read the vector {path}: it holds {len(tensors)} tensors, not one")
    return next(iter(tensors.values()))
