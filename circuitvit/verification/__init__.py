"""Ablation tests of a circuit: is it enough, is it needed, is it better than chance, and how sure are we?

`verify` gives a `Report`, `audit` puts a circuit to every hypothesis test, and `Hypothesis` states a claim
and tests it. The pieces are public too: faithfulness from metrics at hand, intervals over pairs, random
connected circuits as the null, robustness, stability, and activation patching.
"""

from circuitvit.verification.audit import audit, equivalence_test, necessity_test, sufficiency_test
from circuitvit.verification.certificates import Certificate, certify
from circuitvit.verification.cross_effects import CrossEffect, Specificity, specificity
from circuitvit.verification.cue import Audit
from circuitvit.verification.cue_runs import audit_cue
from circuitvit.verification.drift import Drift
from circuitvit.verification.drift_runs import diff
from circuitvit.verification.expectations import BeatsRandom, Expectation, Falls, Flips, Rises, Unchanged
from circuitvit.verification.faithfulness import faithfulness
from circuitvit.verification.group_accuracy import GroupAccuracy
from circuitvit.verification.hypotheses import Hypothesis, check_hypotheses
from circuitvit.verification.hypothesis_file import HypothesisFile, read_hypotheses, read_interpretation
from circuitvit.verification.ideals import completeness_test, minimality_test
from circuitvit.verification.independence import hsic_permutation_p, independence_test
from circuitvit.verification.interpretation import Claim, Interpretation
from circuitvit.verification.interventions import Flip, FlipSearch, PatchingMap, flip_search, patching_map
from circuitvit.verification.null import complement_circuits, connected_circuits, stage_profile
from circuitvit.verification.patterns import select_edges
from circuitvit.verification.report import Report, Section, save_verdicts
from circuitvit.verification.robustness import Robustness, robustness, stability
from circuitvit.verification.statistics import (
    Bootstrap,
    Estimate,
    mean_above,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.verification.verdict import REFUTED, SUPPORTED, UNDECIDED, AuditSettings, Verdict, conclusion
from circuitvit.verification.verify import verify

__all__ = [
    "REFUTED",
    "SUPPORTED",
    "UNDECIDED",
    "Audit",
    "AuditSettings",
    "BeatsRandom",
    "Bootstrap",
    "Certificate",
    "Claim",
    "CrossEffect",
    "Drift",
    "Estimate",
    "Expectation",
    "Falls",
    "Flip",
    "FlipSearch",
    "Flips",
    "GroupAccuracy",
    "Hypothesis",
    "HypothesisFile",
    "Interpretation",
    "PatchingMap",
    "Report",
    "Rises",
    "Robustness",
    "Section",
    "Specificity",
    "Unchanged",
    "Verdict",
    "audit",
    "audit_cue",
    "certify",
    "check_hypotheses",
    "complement_circuits",
    "completeness_test",
    "conclusion",
    "connected_circuits",
    "diff",
    "equivalence_test",
    "faithfulness",
    "flip_search",
    "hsic_permutation_p",
    "independence_test",
    "mean_above",
    "mean_interval",
    "minimality_test",
    "necessity_test",
    "patching_map",
    "ratio_interval",
    "read_hypotheses",
    "read_interpretation",
    "robustness",
    "save_verdicts",
    "select_edges",
    "share_interval",
    "specificity",
    "stability",
    "stage_profile",
    "sufficiency_test",
    "verify",
]
