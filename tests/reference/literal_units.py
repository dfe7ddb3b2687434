"""Values inside of a module, what is added to them and what they are differentiated by, by torch's own hooks.

A test says where the module keeps a node's value, as (some columns of) what a module is given; everything
else is the module's own forward. Nothing here knows stages or parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Formula = Callable[[Tensor], Tensor]
"""Logits to one number for each image."""


@dataclass(frozen=True)
class Tapped:
    """A module, and where values are.

    Attributes:
        run: from images to logits, by the module's own forward.
        places: by name the module that is given the value, and its columns; None for all.
    """

    run: Callable[[Tensor], Tensor]
    places: Mapping[str, tuple[nn.Module, slice | None]]

    def logits(
        self,
        images: Tensor,
        changes: Mapping[str, Tensor] | None = None,
        seen: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """The logits when something is added to some of the values.

        Args:
            images: of the run.
            changes: by place.
            seen: is given the values that can be differentiated by.
        """
        with ExitStack() as stack, torch.enable_grad():
            for name, (module, columns) in self.places.items():
                own = columns or slice(None)

                def enter(module: Any, inputs: Any, name: str = name, own: slice = own) -> Any:
                    given = inputs[0].clone()
                    value = given[..., own].clone()
                    value = value if value.requires_grad else value.requires_grad_()
                    if seen is not None:
                        seen[name] = value
                    given[..., own] = value + (changes or {}).get(name, 0.0)
                    return (given, *inputs[1:])

                stack.callback(module.register_forward_pre_hook(enter).remove)
            return self.run(images)

    def values(self, images: Tensor) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        self.logits(images, seen=seen)
        return {name: value.detach() for name, value in seen.items()}

    def slopes(
        self, images: Tensor, formula: Formula, changes: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The gradient of the sum over images at every value."""
        seen: dict[str, Tensor] = {}
        total = formula(self.logits(images, changes, seen)).sum()
        found = torch.autograd.grad(total, list(seen.values()), materialize_grads=True)
        return dict(zip(seen, found, strict=True))


def mean_of(value: Tensor, per_token: bool) -> Tensor:
    mean = value.mean(dim=0, keepdim=True)
    return mean if per_token else mean.mean(dim=1, keepdim=True)
