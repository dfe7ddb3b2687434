"""Vision Transformers with written weights: models whose circuit is known edge by edge.

A scoring method or a search can be held against them, as on a trained model it never can. They are real timm
modules, and take part in everything: `circuitvit.compiled("relay").model` is a model like any other.

    programs    scenes, the language, the five programs, adversarial parts
    planted     programs with something to be found by looking inside
    compiler    `compiled`: from a program to weights, and the edges that it is wired by
    edges       edges that matter, by brute force, and how well scores find them

Lindner et al. 2023, "Tracr", arXiv:2301.05062; Gupta et al. 2024, "InterpBench: semi-synthetic transformers
for evaluating mechanistic interpretability techniques", arXiv:2407.14494; Mueller et al. 2025, "MIB: a
mechanistic interpretability benchmark", arXiv:2504.13151.
"""

from circuitvit.groundtruth.compiler import CLASSES, Compiled, compiled
from circuitvit.groundtruth.edges import Separation, active_edges, separation
from circuitvit.groundtruth.planted import PLANTED
from circuitvit.groundtruth.programs import PARTS, PROGRAMS

__all__ = [
    "CLASSES",
    "PARTS",
    "PLANTED",
    "PROGRAMS",
    "Compiled",
    "Separation",
    "active_edges",
    "compiled",
    "separation",
]
