"""Circuits to draw: seeded, so that a picture that fails can be looked at."""

from __future__ import annotations

import numpy as np

from circuitvit.graph import Circuit, EdgeScores, Graph, Provenance
from circuitvit.graph.eap_ig import transformer_graph

MADE = Provenance(
    model="vit_tiny_patch16_224",
    method="eap",
    task="logit difference of tabby and Border collie, 1 pair, patch",
)


def random_scores(graph: Graph, seed: int = 0) -> EdgeScores:
    """Heavy-tailed scores, a few strong and many weak, as real ones are."""
    draw = np.random.default_rng(seed)
    values = np.sign(draw.standard_normal(graph.shape)) * np.exp(1.2 * draw.standard_normal(graph.shape))
    return EdgeScores(graph, 0.02 * values, "eap", provenance=MADE)


def random_circuit(n_layers: int, n_heads: int, n_edges: int, seed: int = 0) -> Circuit:
    """A connected circuit of a plain transformer with random scores."""
    return random_scores(transformer_graph(n_layers, n_heads), seed).connected(n_edges)
