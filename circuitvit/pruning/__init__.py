"""Searches that run the model to find a circuit. Selection by scores is in `circuitvit.graph`."""

from circuitvit.pruning.acdc import Divergence, acdc
from circuitvit.pruning.curves import Curve, circuit_curve, score_curve
from circuitvit.pruning.ddmin import ddmin
from circuitvit.pruning.families import FAMILIES, FamilySettings
from circuitvit.pruning.find import Finding, Plan, find
from circuitvit.pruning.learned import LearnedMask, MaskSettings, learn_mask
from circuitvit.pruning.optimal import learn_constants
from circuitvit.pruning.refine import Refinement, refine
from circuitvit.pruning.seeds import Agreement, find_several

__all__ = [
    "FAMILIES",
    "Agreement",
    "Curve",
    "Divergence",
    "FamilySettings",
    "Finding",
    "LearnedMask",
    "MaskSettings",
    "Plan",
    "Refinement",
    "acdc",
    "circuit_curve",
    "ddmin",
    "find",
    "find_several",
    "learn_constants",
    "learn_mask",
    "refine",
    "score_curve",
]
