"""Searches that run the model to find a circuit. Selection by scores is in `circuitvit.graph`."""

from circuitvit.pruning.acdc import acdc
from circuitvit.pruning.by_nodes import find_nodes
from circuitvit.pruning.curves import Curve, FamilySettings, circuit_curve, score_curve
from circuitvit.pruning.find import Finding, Plan, find, find_several
from circuitvit.pruning.learned import MaskSettings, learn_mask, learn_masks
from circuitvit.pruning.optimal import learn_constants
from circuitvit.pruning.refine import ddmin, refine
from circuitvit.pruning.thinning import Thinned, ThinSettings, thin

__all__ = [
    "Curve",
    "FamilySettings",
    "Finding",
    "MaskSettings",
    "Plan",
    "ThinSettings",
    "Thinned",
    "acdc",
    "circuit_curve",
    "ddmin",
    "find",
    "find_nodes",
    "find_several",
    "learn_constants",
    "learn_mask",
    "learn_masks",
    "refine",
    "score_curve",
    "thin",
]
