"""A Vision Transformer as stages that read from and write to the residual stream."""

from circuitvit.models.changes import At, add, causal, clamp, knock_out
from circuitvit.models.dictionaries import Dictionary
from circuitvit.models.dictionary_files import load_dictionary
from circuitvit.models.factored import Factored
from circuitvit.models.families.layout import Layout
from circuitvit.models.folding import to_module
from circuitvit.models.heads import Head, HeadTokens, with_head
from circuitvit.models.model import Model
from circuitvit.models.refined import Units, features, neurons, refined, split_sources
from circuitvit.models.registry import load, register, wrap
from circuitvit.models.rules import BackwardRules
from circuitvit.models.sites import Site, Sites
from circuitvit.models.stages import Reads, Stage, places, repeated, through

__all__ = [
    "At",
    "BackwardRules",
    "Dictionary",
    "Factored",
    "Head",
    "HeadTokens",
    "Layout",
    "Model",
    "Reads",
    "Site",
    "Sites",
    "Stage",
    "Units",
    "add",
    "causal",
    "clamp",
    "features",
    "knock_out",
    "load",
    "load_dictionary",
    "neurons",
    "places",
    "refined",
    "register",
    "repeated",
    "split_sources",
    "through",
    "to_module",
    "with_head",
    "wrap",
]
