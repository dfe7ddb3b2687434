"""Scoring methods: what every edge contributes to the behaviour, one file per method."""

from circuitvit.attribution.budget import Budget
from circuitvit.attribution.calibrate import calibrate
from circuitvit.attribution.method import Method, Settings
from circuitvit.attribution.nodes import attribute_nodes
from circuitvit.attribution.registry import METHODS, attribute, provenance_of

__all__ = [
    "METHODS",
    "Budget",
    "Method",
    "Settings",
    "attribute",
    "attribute_nodes",
    "calibrate",
    "provenance_of",
]
