"""Scoring methods: what every edge contributes to the behaviour. Loaded when first used."""

from typing import TYPE_CHECKING

from circuitvit._lazy import lazy
from circuitvit.attribution.methods import METHODS

if TYPE_CHECKING:
    from circuitvit.attribution import budget as budget
    from circuitvit.attribution import calibration as calibration
    from circuitvit.attribution import exact as exact
    from circuitvit.attribution import scoring as scoring
    from circuitvit.attribution.budget import Budget
    from circuitvit.attribution.calibration import calibrate
    from circuitvit.attribution.nodes import attribute_nodes
    from circuitvit.attribution.refining import refine_nodes
    from circuitvit.attribution.scoring import attribute, provenance_of
    from circuitvit.attribution.unit_scores import attribute_units
else:
    __getattr__, __dir__, _ = lazy(
        __name__,
        {
            "circuitvit.attribution.budget": "Budget",
            "circuitvit.attribution.calibration": "calibrate",
            "circuitvit.attribution.nodes": "attribute_nodes",
            "circuitvit.attribution.refining": "refine_nodes",
            "circuitvit.attribution.scoring": "attribute provenance_of",
            "circuitvit.attribution.unit_scores": "attribute_units",
        },
        submodules="budget calibration exact scoring",
    )

__all__ = [
    "METHODS",
    "Budget",
    "attribute",
    "attribute_nodes",
    "attribute_units",
    "calibrate",
    "provenance_of",
    "refine_nodes",
]
