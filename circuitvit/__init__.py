"""Find, draw and verify the circuits of Vision Transformers.

A model becomes a graph of components (input, attention heads with separate query, key and value inputs, MLPs,
logits) joined by edges of the residual stream. Every edge is scored, the graph is pruned to the circuit that
carries a behaviour, and the circuit is proved by ablation, drawn and saved.

    >>> import circuitvit as cv
    >>> model = cv.load("catdog-tiny")
"""

from circuitvit._version import __version__
from circuitvit.attribution import METHODS, attribute
from circuitvit.engine import run
from circuitvit.errors import CircuitViTError
from circuitvit.graph import Circuit, EdgeScores, Graph
from circuitvit.models import Model, load, wrap
from circuitvit.models.compiled import Compiled, compiled
from circuitvit.pruning import (
    Curve,
    Finding,
    MaskSettings,
    Plan,
    acdc,
    circuit_curve,
    find,
    find_several,
    learn_constants,
    learn_mask,
    refine,
    score_curve,
)
from circuitvit.tasks import (
    Constants,
    Mean,
    Noise,
    Patch,
    PerPair,
    Resample,
    Task,
    TokenGroups,
    Zero,
    accuracy,
    cross_entropy,
    kl_divergence,
    log_probability,
    logit,
    logit_diff,
    probability,
)
from circuitvit.verification import (
    AuditSettings,
    BeatsRandom,
    Falls,
    Flips,
    Hypothesis,
    Report,
    Rises,
    Unchanged,
    Verdict,
    audit,
    flip_search,
    patching_map,
    read_hypotheses,
    robustness,
    stability,
    verify,
)

__all__ = [
    "METHODS",
    "AuditSettings",
    "BeatsRandom",
    "Circuit",
    "CircuitViTError",
    "Compiled",
    "Constants",
    "Curve",
    "EdgeScores",
    "Falls",
    "Finding",
    "Flips",
    "Graph",
    "Hypothesis",
    "MaskSettings",
    "Mean",
    "Model",
    "Noise",
    "Patch",
    "PerPair",
    "Plan",
    "Report",
    "Resample",
    "Rises",
    "Task",
    "TokenGroups",
    "Unchanged",
    "Verdict",
    "Zero",
    "__version__",
    "accuracy",
    "acdc",
    "attribute",
    "audit",
    "circuit_curve",
    "compiled",
    "cross_entropy",
    "find",
    "find_several",
    "flip_search",
    "kl_divergence",
    "learn_constants",
    "learn_mask",
    "load",
    "log_probability",
    "logit",
    "logit_diff",
    "patching_map",
    "probability",
    "read_hypotheses",
    "refine",
    "robustness",
    "run",
    "score_curve",
    "stability",
    "verify",
    "wrap",
]
