"""Ablation tests of a circuit: is it enough, is it needed, is it better than chance, and how sure are we?

`verify` gives a `Report`, `audit` puts a circuit to every test, and `Hypothesis` states a claim and tests it.
The pieces are public too: faithfulness from metrics at hand, intervals over pairs, random circuits to compare
with, robustness, stability, and activation patching.
"""

from circuitvit.verification.against_random import necessity_test, sufficiency_test
from circuitvit.verification.audit import AuditSettings, audit
from circuitvit.verification.bootstrap import (
    Bootstrap,
    Estimate,
    mean_above,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.verification.completeness import completeness_test
from circuitvit.verification.connected import complement_circuits, connected_circuits
from circuitvit.verification.equivalence import equivalence_test
from circuitvit.verification.faithfulness import faithfulness, require_effect
from circuitvit.verification.flips import Flip, FlipSearch, flip_search
from circuitvit.verification.hypothesis import (
    REFUTED,
    SUPPORTED,
    UNDECIDED,
    BeatsRandom,
    Expectation,
    Falls,
    Flips,
    Hypothesis,
    Rises,
    Unchanged,
    Verdict,
)
from circuitvit.verification.hypothesis_file import HypothesisFile, read_hypotheses
from circuitvit.verification.independence import hsic, hsic_permutation_p, independence_test
from circuitvit.verification.judging import Court, judge_all
from circuitvit.verification.meter import PairMeter
from circuitvit.verification.minimality import minimality_test
from circuitvit.verification.outcome import Outcome, conclusion
from circuitvit.verification.patching import PatchingMap, patching_map
from circuitvit.verification.patterns import select_edges
from circuitvit.verification.random_circuits import layer_profile, random_circuits
from circuitvit.verification.report import (
    CircuitSize,
    PairFailure,
    PairResult,
    RandomBaseline,
    Report,
    Section,
)
from circuitvit.verification.robustness import Robustness, RobustnessRow, robustness
from circuitvit.verification.stability import Stability, stability
from circuitvit.verification.subtask import subtask
from circuitvit.verification.verify import verify

__all__ = [
    "REFUTED",
    "SUPPORTED",
    "UNDECIDED",
    "AuditSettings",
    "BeatsRandom",
    "Bootstrap",
    "CircuitSize",
    "Court",
    "Estimate",
    "Expectation",
    "Falls",
    "Flip",
    "FlipSearch",
    "Flips",
    "Hypothesis",
    "HypothesisFile",
    "Outcome",
    "PairFailure",
    "PairMeter",
    "PairResult",
    "PatchingMap",
    "RandomBaseline",
    "Report",
    "Rises",
    "Robustness",
    "RobustnessRow",
    "Section",
    "Stability",
    "Unchanged",
    "Verdict",
    "audit",
    "complement_circuits",
    "completeness_test",
    "conclusion",
    "connected_circuits",
    "equivalence_test",
    "faithfulness",
    "flip_search",
    "hsic",
    "hsic_permutation_p",
    "independence_test",
    "judge_all",
    "layer_profile",
    "mean_above",
    "mean_interval",
    "minimality_test",
    "necessity_test",
    "patching_map",
    "random_circuits",
    "ratio_interval",
    "read_hypotheses",
    "require_effect",
    "robustness",
    "select_edges",
    "share_interval",
    "stability",
    "subtask",
    "sufficiency_test",
    "verify",
]
