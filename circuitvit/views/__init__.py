"""Other looks at the same decomposition: what each part says of a class, where it looks, what it does where.

Every view is data first, a frozen dataclass of arrays, and a figure second:

    >>> import circuitvit as cv
    >>> from circuitvit.datasets.catdog import catdog_pairs
    >>> model, pairs = cv.load("catdog-tiny"), catdog_pairs(2, seed=0)
    >>> view = direct_logit_attribution(model, pairs.clean, "cat", "dog")
    >>> view.by_token.shape == (2, len(view.senders), 37)
    True
    >>> view.figure().save("attribution.png")  # doctest: +SKIP

Figures need matplotlib (`pip install circuitvit[plots]`), which is imported when the first one is asked for.
"""

from circuitvit.views.attention import AttentionPatterns, attention_patterns
from circuitvit.views.attribution import DirectAttribution, attribution_of_task, direct_logit_attribution
from circuitvit.views.comparison import Comparison, MethodCurve, compare
from circuitvit.views.effects import EffectHeatmap, FaithfulnessCurve, effect_heatmap, faithfulness_curve
from circuitvit.views.lens import LogitLens, logit_lens
from circuitvit.views.position import HeadPosition, PositionHeads, position_heads
from circuitvit.views.segmentation import PatchEvidence, SegmentationScore, patch_evidence
from circuitvit.views.subjects import Subjects
from circuitvit.views.symbols import class_symbols
from circuitvit.views.tuned_lens import LensAgreement, TunedLens, tuned_lens

__all__ = [
    "AttentionPatterns",
    "Comparison",
    "DirectAttribution",
    "EffectHeatmap",
    "FaithfulnessCurve",
    "HeadPosition",
    "LensAgreement",
    "LogitLens",
    "MethodCurve",
    "PatchEvidence",
    "PositionHeads",
    "SegmentationScore",
    "Subjects",
    "TunedLens",
    "attention_patterns",
    "attribution_of_task",
    "class_symbols",
    "compare",
    "direct_logit_attribution",
    "effect_heatmap",
    "faithfulness_curve",
    "logit_lens",
    "patch_evidence",
    "position_heads",
    "tuned_lens",
]
