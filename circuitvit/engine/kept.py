"""Activations that have been read, in memory or in a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from circuitvit.errors import FileError, counted, unknown_name
from circuitvit.graph.files import write_bytes

FORMAT = "circuitvit activations 1"
"""Stands in a file's metadata."""


@dataclass(frozen=True, eq=False, repr=False)
class Activations(Mapping[str, Tensor]):
    """Activations of images, by the names that they were asked for under.

    Attributes:
        tensors: `(image, token, width)` each; of scores and patterns `(image, query, key)`, of logits
            `(image, class)`. Of a file they are read when they are looked at.
        images: names of the images.
        tokens: by the name of each activation what its tokens (or queries) are: "cls", "patch (0, 3)", ...
        model: the name of the model.

    Example:
        >>> import torch
        >>> import circuitvit as cv
        >>> model = cv.load("catdog-tiny")
        >>> model.activations(torch.zeros(2, 3, 48, 48), ["resid1", "a1.h0.pattern"], tokens="cls")
        Activations of catdog-tiny: 2 images (image 0, image 1)
        resid1         2 x 1 x 64  cls
        a1.h0.pattern  2 x 1 x 37  cls
    """

    tensors: Mapping[str, Tensor]
    images: tuple[str, ...]
    tokens: Mapping[str, tuple[str, ...]]
    model: str

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise unknown_name("activation", name, tuple(self.tensors))
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        images = ", ".join(self.images[:3]) + (", ..." if len(self.images) > 3 else "")
        rows = [
            (name, " x ".join(map(str, self.tensors[name].shape)), _few(self.tokens[name])) for name in self
        ]
        shown = rows if len(rows) <= 26 else [*rows[:25], ("...", f"{len(rows) - 25} more", "")]
        wide, long = (max((len(row[column]) for row in shown), default=0) for column in (0, 1))
        lines = [f"{name:<{wide}}  {shape:<{long}}  {tokens}".rstrip() for name, shape, tokens in shown]
        count = counted(len(self.images), "image")
        return "\n".join([f"Activations of {self.model}: {count} ({images})", *lines])

    def save(self, path: str | Path) -> Path:
        """Write the activations as safetensors, in the file that `activations(..., out=path)` writes.

        Raises:
            FileError: if it cannot be written.
        """
        from safetensors.torch import save

        said = {
            "model": self.model,
            "images": list(self.images),
            "names": list(self),
            "tokens": {name: list(self.tokens[name]) for name in self},
        }
        tensors = {name: each.detach().cpu().contiguous() for name, each in self.items()}
        return write_bytes(path, save(tensors, {"format": FORMAT, "said": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path) -> Activations:
        """Read what `save` or `activations(..., out=path)` has written; values stay there until looked at.

        Raises:
            FileError: if the file is missing, or is not such a file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileError(f"there is no file {path}")
        try:
            with safe_open(str(path), "pt") as file:
                counts = {name: (*file.get_slice(name).get_shape(), None)[0] for name in file.keys()}  # noqa: SIM118
                said = _checked(dict(file.metadata() or {}), counts, path)
        except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
            raise FileError(f"{path} is no file of activations: {error}") from error
        return cls(_Stored(path, tuple(said["tokens"])), tuple(said["images"]), said["tokens"], said["model"])


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file, which is mapped into memory when one of them is looked at."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self._path, self._names = path, names

    @cached_property
    def _all(self) -> Mapping[str, Tensor]:
        from safetensors.torch import load_file

        try:
            return load_file(self._path)
        except (SafetensorError, OSError) as error:
            raise FileError(f"cannot read the activations in {self._path}: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        return self._all[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _checked(metadata: Mapping[str, str], counts: Mapping[str, int | None], path: Path) -> dict[str, Any]:
    """What a file says of itself, which has tensors for so many images by name.

    Raises:
        FileError: if it does not say what it should.
    """
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path} is no file of activations: its metadata do not say {FORMAT!r}")
    said: Any = json.loads(metadata["said"])
    fits = (
        isinstance(said, dict)
        and isinstance(said.get("model"), str)
        and all(_are_texts(said.get(key)) for key in ("images", "names"))
        and isinstance(said.get("tokens"), dict)
        and set(said["tokens"]) == set(said["names"]) == set(counts)
        and set(counts.values()) == {len(said["images"])}
        and all(_are_texts(each) for each in said["tokens"].values())
    )
    if not fits:
        raise FileError(f"{path} is no file of activations: what it says of itself does not fit its tensors")
    return {**said, "tokens": {name: tuple(said["tokens"][name]) for name in said["names"]}}


def _are_texts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _few(names: Sequence[str]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{len(names)} tokens: {names[0]}, {names[1]}, ... {names[-1]}"
