"""Ablation tests of a circuit: is it enough, is it needed, is it better than chance, and how sure are we?

`verify` gives a `Report`. The pieces are public too: faithfulness from metrics at hand, intervals over pairs,
and random circuits to compare with.
"""

from circuitvit.verification.bootstrap import (
    Bootstrap,
    Estimate,
    mean_interval,
    ratio_interval,
    share_interval,
)
from circuitvit.verification.faithfulness import faithfulness, require_effect
from circuitvit.verification.random_circuits import layer_profile, random_circuits
from circuitvit.verification.report import CircuitSize, PairResult, RandomBaseline, Report, Section
from circuitvit.verification.verify import verify

__all__ = [
    "Bootstrap",
    "CircuitSize",
    "Estimate",
    "PairResult",
    "RandomBaseline",
    "Report",
    "Section",
    "faithfulness",
    "layer_profile",
    "mean_interval",
    "random_circuits",
    "ratio_interval",
    "require_effect",
    "share_interval",
    "verify",
]
