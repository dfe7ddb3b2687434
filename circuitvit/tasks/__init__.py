"""The behaviour under study: image pairs, a metric on logits, and what ablation means."""

from circuitvit.tasks import corruptions, words
from circuitvit.tasks.ablations import Ablation, Constants, Mean, Noise, Patch, Resample, Zero, ablation_names
from circuitvit.tasks.classes import ClassGroup, group
from circuitvit.tasks.groups import TokenGroups
from circuitvit.tasks.metrics import (
    Metric,
    PerPair,
    accuracy,
    cross_entropy,
    divergence,
    kl_divergence,
    log_probability,
    logit,
    logit_diff,
    metric_names,
    probability,
    projection,
    similarity,
)
from circuitvit.tasks.split import Split, as_task, select_pairs, split
from circuitvit.tasks.task import GROUPS, Batch, PreparedTask, Task, prepare

__all__ = [
    "GROUPS",
    "Ablation",
    "Batch",
    "ClassGroup",
    "Constants",
    "Mean",
    "Metric",
    "Noise",
    "Patch",
    "PerPair",
    "PreparedTask",
    "Resample",
    "Split",
    "Task",
    "TokenGroups",
    "Zero",
    "ablation_names",
    "accuracy",
    "as_task",
    "corruptions",
    "cross_entropy",
    "divergence",
    "group",
    "kl_divergence",
    "log_probability",
    "logit",
    "logit_diff",
    "metric_names",
    "prepare",
    "probability",
    "projection",
    "select_pairs",
    "similarity",
    "split",
    "words",
]
