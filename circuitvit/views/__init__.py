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

from circuitvit.views.ablating import MeanAblation, mean_ablate
from circuitvit.views.attention import AttentionPatterns, attention_patterns
from circuitvit.views.attention_page import AttentionPage, attention_page
from circuitvit.views.attribution import DirectAttribution, attribution_of_task, direct_logit_attribution
from circuitvit.views.carried_over import Universality, universality
from circuitvit.views.compared_model import ComparedModel, Cost
from circuitvit.views.comparison import Comparison, MethodCurve, compare
from circuitvit.views.contributions import Decomposition, decompose
from circuitvit.views.crossings import Flow, flow
from circuitvit.views.decider_heads import DeciderHeads, deciders
from circuitvit.views.effects import EffectHeatmap, FaithfulnessCurve, effect_heatmap, faithfulness_curve
from circuitvit.views.factors import Disentanglement, disentanglement
from circuitvit.views.head_table import HeadKinds, KindScore, head_kinds
from circuitvit.views.knockouts import KnockOuts, knock_outs
from circuitvit.views.lens import LogitLens, logit_lens
from circuitvit.views.matching import Match, match
from circuitvit.views.misread import Counterfactual, Suppressed, Why
from circuitvit.views.misread_list import Misread, misread_images
from circuitvit.views.misread_runs import why
from circuitvit.views.model_figures import Ability, Depth, Rightness, Use
from circuitvit.views.model_sheet import ModelSheet
from circuitvit.views.models_compared import compare_models
from circuitvit.views.outcomes import Outcomes
from circuitvit.views.over_training import Across, Formed
from circuitvit.views.over_training_runs import across
from circuitvit.views.position import HeadPosition, PositionHeads, position_heads
from circuitvit.views.probe_results import LinearProbes
from circuitvit.views.probe_scores import ProbeScores
from circuitvit.views.probes import linear_probes
from circuitvit.views.ranking import Lift, Picks, Ranking
from circuitvit.views.register_tokens import Registers, registers
from circuitvit.views.repeated import RepeatedPatches, repeated_patches
from circuitvit.views.scrubbing import Scrubbing, scrub
from circuitvit.views.segmentation import (
    PatchEvidence,
    SegmentationChange,
    SegmentationScore,
    patch_evidence,
    segmentation_change,
)
from circuitvit.views.spanning import TextSpan, text_span
from circuitvit.views.steering import Direction, Steering, difference_of_means, steer
from circuitvit.views.subjects import Subjects
from circuitvit.views.symbols import class_symbols
from circuitvit.views.symmetries import Equivariance, equivariance
from circuitvit.views.tokens import TokenAblations, token_ablations
from circuitvit.views.tops import TopImages, top_images
from circuitvit.views.tuned import LensAgreement, TunedLens, tuned_lens
from circuitvit.views.visualisation import FeatureVisualisation, feature_visualisation

__all__ = [
    "Ability",
    "Across",
    "AttentionPage",
    "AttentionPatterns",
    "ComparedModel",
    "Comparison",
    "Cost",
    "Counterfactual",
    "DeciderHeads",
    "Decomposition",
    "Depth",
    "DirectAttribution",
    "Direction",
    "Disentanglement",
    "EffectHeatmap",
    "Equivariance",
    "FaithfulnessCurve",
    "FeatureVisualisation",
    "Flow",
    "Formed",
    "HeadKinds",
    "HeadPosition",
    "KindScore",
    "KnockOuts",
    "LensAgreement",
    "Lift",
    "LinearProbes",
    "LogitLens",
    "Match",
    "MeanAblation",
    "MethodCurve",
    "Misread",
    "ModelSheet",
    "Outcomes",
    "PatchEvidence",
    "Picks",
    "PositionHeads",
    "ProbeScores",
    "Ranking",
    "Registers",
    "RepeatedPatches",
    "Rightness",
    "Scrubbing",
    "SegmentationChange",
    "SegmentationScore",
    "Steering",
    "Subjects",
    "Suppressed",
    "TextSpan",
    "TokenAblations",
    "TopImages",
    "TunedLens",
    "Universality",
    "Use",
    "Why",
    "across",
    "attention_page",
    "attention_patterns",
    "attribution_of_task",
    "class_symbols",
    "compare",
    "compare_models",
    "deciders",
    "decompose",
    "difference_of_means",
    "direct_logit_attribution",
    "disentanglement",
    "effect_heatmap",
    "equivariance",
    "faithfulness_curve",
    "feature_visualisation",
    "flow",
    "head_kinds",
    "knock_outs",
    "linear_probes",
    "logit_lens",
    "match",
    "mean_ablate",
    "misread_images",
    "patch_evidence",
    "position_heads",
    "registers",
    "repeated_patches",
    "scrub",
    "segmentation_change",
    "steer",
    "text_span",
    "token_ablations",
    "top_images",
    "tuned_lens",
    "universality",
    "why",
]
