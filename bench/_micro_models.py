"""Micro-models of other libraries than timm, from configurations: what `models_tried` tries besides timm's.

Add yours to `MICRO`: "library: class" to a function that imports the library and builds the module, with few
layers and little width. Weights are redrawn by `models_tried`; a library that is not installed is left out.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

MICRO: dict[str, Callable[[], nn.Module]] = {}
