"""Scoring methods: what every edge contributes to the behaviour. Loaded when first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from circuitvit.attribution.methods import METHODS

if TYPE_CHECKING:
    from circuitvit.attribution.budget import Budget
    from circuitvit.attribution.calibration import calibrate
    from circuitvit.attribution.nodes import attribute_nodes
    from circuitvit.attribution.scoring import attribute, provenance_of

__all__ = ["METHODS", "Budget", "attribute", "attribute_nodes", "calibrate", "provenance_of"]

_FILES = {
    "Budget": "budget",
    "attribute": "scoring",
    "attribute_nodes": "nodes",
    "calibrate": "calibration",
    "provenance_of": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"circuitvit.attribution.{_FILES[name]}"), name)
