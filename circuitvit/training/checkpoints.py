"""Checkpoints: a model as it was at several steps of its training, each with a card of its own.

Much is learned early and little late, so the steps lie closer together at the beginning: of `n` checkpoints
the one with number `i` is of step `steps * (i / (n - 1))**2`, rounded. The first is of the weights as they
were drawn, the last of those that training ends with.

Writing them changes nothing of the training: a copy of the module gets the weights of the step, is measured
and saved, and draws no random number.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from circuitvit.errors import FileError, OptionError, check_whole

Write = Callable[[nn.Module, Path | None, int], Any]
"""Saves a module as it is after so many steps to a path without ending."""


def checkpoint_steps(count: int, steps: int) -> tuple[int, ...]:
    """The steps at which checkpoints are kept, the first 0 and the last `steps`.

    Args:
        count: how many checkpoints, at least 2.
        steps: of the training.

    Raises:
        OptionError: if there are fewer than two, or not as many steps.

    Example:
        >>> checkpoint_steps(6, 1000)
        (0, 40, 160, 360, 640, 1000)
        >>> checkpoint_steps(4, 3)
        (0, 1, 2, 3)
    """
    check_whole("the number of checkpoints", count, 2)
    if count > steps + 1:
        raise OptionError(f"{steps} steps have {steps + 1} checkpoints at most, not {count}: give more steps")
    found = [0]
    for place in range(1, count):
        found.append(max(round(steps * (place / (count - 1)) ** 2), found[-1] + 1))
    return tuple(found)


class Checkpoints:
    """Keeps checkpoints of a module while it is trained: called with the number of steps done.

    Files are `NAME-checkpoints/NAME-step-000250.safetensors` and `.json`, each written whole or not at all;
    the card comes last, so that a checkpoint that has one is complete. Older ones of the same name are taken
    away first, so that a folder never holds two trainings.

    Args:
        module: that is trained.
        stem: path of the model itself, beside which the folder stands.
        count: how many checkpoints; None for none.
        steps: of the training.
        write: saves one.

    Raises:
        OptionError: if there is no place to keep them in, or for a number that cannot be had.
        FileError: if the folder cannot be made or emptied.

    Attributes:
        written: the weights of those that were written, by step.
    """

    def __init__(
        self, module: nn.Module, stem: Path | None, count: int | None, steps: int, write: Write
    ) -> None:
        self.written: list[Path] = []
        self._steps = () if count is None else checkpoint_steps(count, steps)
        if not self._steps:
            return
        if stem is None:
            raise OptionError("checkpoints are kept beside the model: say where it is to be written (out=)")
        self._module, self._twin, self._write = module, copy.deepcopy(module).eval(), write
        self._name, self._folder = stem.name, stem.with_name(f"{stem.name}-checkpoints")
        older = re.compile(rf"{re.escape(stem.name)}-step-\d+\.(json|safetensors)")
        try:
            self._folder.mkdir(exist_ok=True)
            for path in self._folder.iterdir():
                if older.fullmatch(path.name):
                    path.unlink()
        except OSError as error:
            raise FileError(f"cannot write to the folder {self._folder}: {error.strerror}") from error

    def __call__(self, step: int) -> None:
        """Write a checkpoint, if this step is one of those."""
        if step in self._steps:
            self._twin.load_state_dict(self._module.state_dict())
            stem = self._folder / f"{self._name}-step-{step:06d}"
            self.written.append(self._write(self._twin, stem, step).weights)
