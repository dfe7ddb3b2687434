"""A Vision Transformer as stages that read from and write to the residual stream."""

from circuitvit.models.compact_gradient import CompactGradient
from circuitvit.models.model import Model
from circuitvit.models.registry import load, wrap
from circuitvit.models.rules import BackwardRules
from circuitvit.models.stages import Reads, Stage, repeated

__all__ = ["BackwardRules", "CompactGradient", "Model", "Reads", "Stage", "load", "repeated", "wrap"]
