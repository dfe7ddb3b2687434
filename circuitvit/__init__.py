"""Find, draw and verify the circuits of Vision Transformers.

A model becomes a graph of components (input, attention heads with separate query, key and value inputs, MLPs,
logits) joined by edges of the residual stream. Every edge is scored, the graph is pruned to the circuit that
carries a behaviour, and the circuit is proved by ablation, drawn and saved.

    >>> import circuitvit as cv
    >>> model = cv.load("catdog-tiny")

Importing the package loads nothing but this file: torch and the other rooms come with the first name that is
used. A new name goes into `__all__`, below for type checkers, and into the table of homes.
"""

from circuitvit._lazy import lazy
from circuitvit._version import __version__

TYPE_CHECKING = False  # typing's own would cost half of the import

if TYPE_CHECKING:
    from circuitvit import attribution as attribution
    from circuitvit import datasets as datasets
    from circuitvit import engine as engine
    from circuitvit import errors as errors
    from circuitvit import export as export
    from circuitvit import graph as graph
    from circuitvit import groundtruth as groundtruth
    from circuitvit import models as models
    from circuitvit import pruning as pruning
    from circuitvit import tasks as tasks
    from circuitvit import testing as testing
    from circuitvit import training as training
    from circuitvit import verification as verification
    from circuitvit import views as views
    from circuitvit.attribution import METHODS, attribute, attribute_nodes, calibrate
    from circuitvit.engine import run
    from circuitvit.errors import CircuitViTError
    from circuitvit.graph import Circuit, EdgeScores, Fidelity, Graph, NodeScores
    from circuitvit.groundtruth import Compiled, compiled
    from circuitvit.models import Model, load, register, wrap
    from circuitvit.pruning import (
        Curve,
        FamilySettings,
        Finding,
        MaskSettings,
        Plan,
        acdc,
        circuit_curve,
        ddmin,
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
        split,
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
    from circuitvit.views.comparison import Comparison, compare
else:
    __getattr__, __dir__ = lazy(
        __name__,
        {
            "circuitvit.attribution": "METHODS attribute attribute_nodes calibrate",
            "circuitvit.engine": "run",
            "circuitvit.errors": "CircuitViTError",
            "circuitvit.graph": "Circuit EdgeScores Fidelity Graph NodeScores",
            "circuitvit.groundtruth": "Compiled compiled",
            "circuitvit.models": "Model load register wrap",
            "circuitvit.pruning": (
                "Curve FamilySettings Finding MaskSettings Plan acdc circuit_curve ddmin find find_several "
                "learn_constants learn_mask refine score_curve"
            ),
            "circuitvit.tasks": (
                "Constants Mean Noise Patch PerPair Resample Task TokenGroups Zero accuracy cross_entropy "
                "kl_divergence log_probability logit logit_diff probability split"
            ),
            "circuitvit.verification": (
                "AuditSettings BeatsRandom Falls Flips Hypothesis Report Rises Unchanged Verdict audit "
                "flip_search patching_map read_hypotheses robustness stability verify"
            ),
            "circuitvit.views.comparison": "Comparison compare",
        },
        submodules=(
            "attribution datasets engine errors export graph groundtruth models pruning tasks testing "
            "training verification views"
        ),
    )

__all__ = [
    "METHODS",
    "AuditSettings",
    "BeatsRandom",
    "Circuit",
    "CircuitViTError",
    "Comparison",
    "Compiled",
    "Constants",
    "Curve",
    "EdgeScores",
    "Falls",
    "FamilySettings",
    "Fidelity",
    "Finding",
    "Flips",
    "Graph",
    "Hypothesis",
    "MaskSettings",
    "Mean",
    "Model",
    "NodeScores",
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
    "attribute_nodes",
    "audit",
    "calibrate",
    "circuit_curve",
    "compare",
    "compiled",
    "cross_entropy",
    "ddmin",
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
    "register",
    "robustness",
    "run",
    "score_curve",
    "split",
    "stability",
    "verify",
    "wrap",
]
