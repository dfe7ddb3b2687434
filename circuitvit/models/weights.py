"""What weights a model has, whatever the layout: the same for timm, torchvision, transformers and open_clip.

Stages name their tensors in an order of their own: norms, queries, keys, values, outputs, MLPs, the readout.
So it does not matter whether a module keeps queries, keys and values together or apart, or what it calls
them. The others, such as those of the embedding, come in the order in which the module's own forward first
uses them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from circuitvit.models.parts import Linear, Norm
from circuitvit.models.stages import Content, Stage

VERSION = "w2"
"""Stands before every hash: hashes are comparable where it is the same."""

LIBRARIES = ("clip", "open_clip", "timm", "torch", "torchvision", "transformers")
"""Whose versions are recorded where a model has parts of theirs."""


def content_hash(stages: Sequence[Stage], module: nn.Module, run: Callable[[], object]) -> str:
    """SHA-256 over the values of all tensors that a model computes with, with `VERSION` before it.

    A tensor that changes nothing, a bias of zeros or a factor of ones, counts as one that is not there.
    Shapes count without dimensions of size 1.

    Args:
        stages: of the model.
        module: whose tensors they are.
        run: runs the module on some input.
    """
    digest, named = hashlib.sha256(), set[int]()
    for stage in stages:
        digest.update(b"stage")
        for value, neutral, own in (weight for content in stage.contents() for weight in _weights(content)):
            digest.update(b"|")
            named.update(tensor.data_ptr() for tensor in own if tensor is not None)
            if value is not None:
                _add(digest, value, neutral)
    others = _Watch(
        tensor
        for tensor in module.state_dict(keep_vars=True).values()
        if tensor.is_floating_point() and tensor.data_ptr() not in named
    )
    with torch.no_grad(), others:
        run()
    digest.update(b"others")
    for tensor in others.used.values():
        digest.update(b"|")
        _add(digest, tensor, 0.0)
    return f"{VERSION}-{digest.hexdigest()}"


def hash_with(found: str, what: str, tensors: Iterable[Tensor]) -> str:
    """A hash of weights with something more in it, of the same kind."""
    digest = hashlib.sha256(f"{found}|{what}".encode())
    for tensor in tensors:
        digest.update(b"|")
        _add(digest, tensor, None)
    return f"{VERSION}-{digest.hexdigest()}"


def _weights(content: Content) -> Iterator[tuple[Tensor | None, float | None, tuple[Tensor | None, ...]]]:
    """Values, what they could as well be filled with if they were not there, and the module's own tensors."""
    match content:
        case Norm():
            yield content.weight, 1.0, (content.weight,)
            yield content.bias, 0.0, (content.bias,)
        case Linear():
            yield content.weight, None, content.tensors[:1]
            yield content.bias, 0.0, content.tensors[1:]
        case nn.Module():
            for name, tensor in content.state_dict(keep_vars=True).items():
                yield tensor, 0.0 if name.endswith("bias") else None, (tensor,)
        case _:
            yield content, 1.0, (content,)


def _add(digest: Any, tensor: Tensor, neutral: float | None) -> None:
    values = tensor.detach().cpu().contiguous()
    if neutral is None or not bool((values == neutral).all()):
        shape = tuple(side for side in values.shape if side != 1)
        digest.update(f"{shape}{values.dtype}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which order some tensors are first used."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.used: dict[int, Tensor] = {}
        self._watched = {id(tensor) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if id(value) in self._watched:
                self.used.setdefault(id(value), value)
        return func(*args, **(kwargs or {}))


def libraries(module: nn.Module, *others: object) -> dict[str, str]:
    """Versions of the libraries that a module's parts, and other things, come from, by name."""
    homes = {type(part).__module__.partition(".")[0] for part in (*module.modules(), *others)}
    versions = {
        name: getattr(sys.modules.get(name), "__version__", None)
        for name in LIBRARIES
        if name in homes | {"torch"}
    }
    return {name: str(version) for name, version in versions.items() if version is not None}
