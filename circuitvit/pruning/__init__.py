"""Searches that run the model to find a circuit. Selecting by scores alone is in `circuitvit.graph.selection`."""

from circuitvit.pruning.acdc import Divergence, acdc

__all__ = ["Divergence", "acdc"]
