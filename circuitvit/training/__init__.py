"""Training: small ViTs like the bundled ones, linear heads, and dictionaries of features."""

from __future__ import annotations

from circuitvit.training.clip import train_clip
from circuitvit.training.data import (
    Labelled,
    TrainingData,
    catdog_data,
    digits_data,
    folder_data,
    shortcut_data,
)
from circuitvit.training.loop import Recipe, TrainingResult, evaluate, train, training_data
from circuitvit.training.sae import train_sae

__all__ = [
    "Labelled",
    "Recipe",
    "TrainingData",
    "TrainingResult",
    "catdog_data",
    "digits_data",
    "evaluate",
    "folder_data",
    "shortcut_data",
    "train",
    "train_clip",
    "train_sae",
    "training_data",
]
