"""What is asked of a function that a user gives for an edit, tried before anything long is run."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from circuitvit.errors import OptionError


def takes_two(function: Callable[..., Any]) -> bool:
    """Whether a function is to be told where it is called: what has a default is not for that."""
    try:
        given = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except ValueError:  # a builtin that does not tell
        return False
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    own = [each for each in given.parameters.values() if each.kind in placed]
    return len(own) > 1 and (own[1].default is inspect.Parameter.empty or own[1].name == "at")


def check_call(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that cannot be called with what an edit gives.

    Raises:
        OptionError: saying what it is called with.
    """
    try:
        given = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
        given.bind(*(None,) * (2 if takes_two(function) else 1))
    except ValueError:  # a builtin that does not tell
        return
    except TypeError as error:
        raise OptionError(f"the function for {name} is called with x, or with x and at: {error}") from error


def check_answers(function: Callable[[Tensor], Tensor], name: str, two: Tensor) -> None:
    """Refuse a function that answers differently each time, or for an image with others beside it, or through
    which no gradient goes.

    What it cannot do with random numbers is told when it is run.

    Args:
        function: of a batch.
        name: of what it changes.
        two: random numbers, for two images.

    Raises:
        OptionError: saying what to give instead.
    """
    try:
        with torch.enable_grad():
            differentiable = function(two.clone().requires_grad_()).requires_grad
        with torch.no_grad():
            once, again, alone = function(two), function(two), function(two[:1])
    except Exception:  # such as one for other images than these
        return
    close = 5e-2 if two.dtype in (torch.float16, torch.bfloat16) else 1e-3
    if not torch.allclose(once, again, close, close, equal_nan=True):
        raise OptionError(
            f"the function for {name} gives something else each time, so that no two runs could be compared: "
            "draw noise once, and give it as a tensor"
        )
    if not torch.allclose(once[:1], alone, close, close, equal_nan=True):
        raise OptionError(
            f"the function for {name} mixes the images of a batch, of which every run has others: compute a "
            "mean over images once, from model.activations, and give it as a tensor"
        )
    if not differentiable and not torch.equal(once[0], once[1]):
        raise OptionError(
            f"the function for {name} lets no gradient through (detach, no_grad, .data), so that scores by "
            "gradients would not see what passes it: leave that out"
        )
