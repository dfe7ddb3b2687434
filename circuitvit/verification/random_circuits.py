"""Random circuits to compare with: is a circuit better than chance with as many edges in each layer?

What is matched is the size of the circuit (after dead-edge pruning) and its profile: how many edges enter
each stage, and at which token group. Within a stage the edges are drawn uniformly without replacement. A
finer profile, by sender stage too, would often leave no choice: from one MLP to another there is one edge.

What is not matched is how many of the edges do anything. Random edges seldom join up, so after pruning most
random circuits are nearly empty, and beating them is necessary rather than impressive. Reports say how many
of their edges are live. Random circuits as a null hypothesis are Shi et al. 2024 ("Hypothesis testing the
circuit hypothesis in LLMs", arXiv:2410.13032).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

from circuitvit.errors import OptionError
from circuitvit.graph import Circuit, EdgeMask, Provenance


def random_circuits(circuit: Circuit, n: int, seed: int = 0) -> tuple[Circuit, ...]:
    """Random circuits with as many edges into each stage as the pruned circuit has.

    Args:
        circuit: to match. Its dead edges are not counted.
        n: how many; the first ones do not depend on how many follow.
        seed: of the draws.

    Returns:
        `n` circuits, none pruned, in a fixed order; two may be equal.

    Raises:
        OptionError: if `n` or `seed` is negative.

    Example:
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> circuit = Circuit.from_edges(transformer_graph(2, 2), ["input->a1.h0<v>", "a1.h0->logits"])
        >>> [len(each) for each in random_circuits(circuit, 3, seed=1)]
        [2, 2, 2]
    """
    if n < 0 or seed < 0:
        raise OptionError(f"the number of random circuits and the seed are 0 or more, not {n} and {seed}")
    profile = layer_profile(circuit)
    rng = np.random.default_rng(seed)
    found = circuit.provenance
    origin = Provenance(
        found.model, found.weights, method="random", parameters={"asked": int(profile.sum())}, seed=seed
    )
    return tuple(Circuit(circuit.graph, _draw(circuit, profile, rng), provenance=origin) for _ in range(n))


def layer_profile(circuit: Circuit) -> Int64[NDArray[np.int64], "stage group"]:
    """How many live edges of the circuit enter each stage at each token group, `(stage, group)`.

    Example:
        >>> from circuitvit.graph import Circuit
        >>> from circuitvit.graph.eap_ig import transformer_graph
        >>> layer_profile(Circuit.full(transformer_graph(1, 1)))[
        ...     :, 0
        ... ].tolist()  # input, attention, MLP, logits
        [0, 3, 2, 3]
    """
    graph = circuit.graph
    into = circuit.pruned().kept.sum(axis=0, dtype=np.int64)  # (receiver, group)
    return np.array([into[receivers].sum(axis=0) for receivers in graph.receiver_slices], dtype=np.int64)


def _draw(circuit: Circuit, profile: NDArray[np.int64], rng: np.random.Generator) -> EdgeMask:
    graph = circuit.graph
    kept = np.zeros(graph.shape, dtype=bool)
    for receivers, wanted in zip(graph.receiver_slices, profile, strict=True):
        for group, count in enumerate(wanted.tolist()):
            places = np.argwhere(graph.edge_mask[:, receivers, group])
            senders, local = places[rng.permutation(len(places))[:count]].T
            kept[senders, local + receivers.start, group] = True
    return kept
