"""Drawn scenes in which some factors vary and nothing else does: every combination of their levels, once.

In such a full factorial design no two factors go together, so that what each of them explains of anything is
found exactly, and adds up: the table that `circuitvit.disentanglement` asks for by default.

Example:
    >>> scenes, factors = factorial_scenes({"species": ("cat", "dog"), "x": (0.4, 0.6)})
    >>> len(scenes), factors["species"].tolist(), factors["x"].tolist()
    (4, ['cat', 'cat', 'dog', 'dog'], [0.4, 0.6, 0.4, 0.6])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from circuitvit.datasets.catdog import CLASSES, Animal, Scene, generator, random_scene
from circuitvit.errors import OptionError, unknown_name

Levels = Mapping[str, Sequence[Any] | Mapping[str, Any]]
"""By factor its levels: values, or values by name, as of colours."""

LEVELS: Levels = {
    "species": CLASSES,
    "x": (0.42, 0.5, 0.58),
    "y": (0.58, 0.7),
    "radius": (0.22, 0.28),
    "tilt": (-0.3, 0.0, 0.3),
    "fur": {"dark": (0.34, 0.3, 0.28), "light": (0.88, 0.84, 0.78)},
    "background": {"blue": (0.5, 0.6, 0.72), "ochre": (0.7, 0.6, 0.48)},
}
"""What varies unless told otherwise: 576 scenes of one animal."""


def factorial_scenes(levels: Levels = LEVELS, seed: int = 0) -> tuple[list[Scene], dict[str, NDArray[Any]]]:
    """Every combination of some factors' levels as a scene of one animal; all else is the same in all.

    Args:
        levels: of attributes of `Animal` and `Scene`.
        seed: of what is the same in all scenes, pixel noise included.

    Returns:
        The scenes, the last factor changing fastest; and of each factor the level in each scene, `(scene,)`.

    Raises:
        NameNotFoundError: if a factor is neither an animal's nor a scene's.
        OptionError: if a factor has fewer than two levels, or there is no factor.
    """
    own = {field.name for field in fields(Animal)}
    whole = {field.name for field in fields(Scene)} - {"animals"}
    for name, given in levels.items():
        if name not in own | whole:
            raise unknown_name("factor of a scene", name, sorted(own | whole))
        if len(given) < 2:
            raise OptionError(f"a factor varies: {name!r} has {len(given)} level, give two or more")
    if not levels:
        raise OptionError("no factors are named: give the levels of one or more")
    named = [given if isinstance(given, Mapping) else dict(zip(given, given, strict=True))
             for given in levels.values()]  # fmt: skip
    base = replace(random_scene(generator(seed, "scene", 0)), texture="plain")
    table = list(product(*named))
    scenes = []
    for row in table:
        values = {name: given[level] for name, given, level in zip(levels, named, row, strict=True)}
        animal = replace(base.animals[0], **{name: value for name, value in values.items() if name in own})
        outside = {name: value for name, value in values.items() if name in whole}
        scenes.append(replace(base, animals=(animal,), **outside))
    columns = zip(*table, strict=True)
    return scenes, {name: np.array(column) for name, column in zip(levels, columns, strict=True)}
