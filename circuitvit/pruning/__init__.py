"""Searches that run the model to find a circuit. Selection by scores is in `circuitvit.graph`."""

from circuitvit.pruning.acdc import Divergence, acdc
from circuitvit.pruning.find import Finding, Plan, find
from circuitvit.pruning.learned import LearnedMask, MaskSettings, learn_mask
from circuitvit.pruning.refine import Refinement, refine

__all__ = [
    "Divergence",
    "Finding",
    "LearnedMask",
    "MaskSettings",
    "Plan",
    "Refinement",
    "acdc",
    "find",
    "learn_mask",
    "refine",
]
