"""Dropping the edges that do nothing, which depends on the ablation.

An edge whose receiver leads nowhere is heard by nobody, whatever the ablation. An edge whose sender hears
nothing from the input carries just its reference output when references come from a run on other images
(patch, resample), and does nothing then. Under mean, zero or noise ablation such a sender still computes
something from its ablated inputs, which is not its reference; there its edges stay.
"""

from __future__ import annotations

import numpy as np

from circuitvit.graph import EdgeMask
from circuitvit.graph.liveness import live_receivers, reached_senders
from circuitvit.tasks import Patch, PreparedTask, Resample


def without_dead(prepared: PreparedTask, kept: EdgeMask) -> EdgeMask:
    """The kept edges `(sender, receiver, group)` less those that change no run of the task."""
    return kept & useful_beside(prepared, kept)


def useful_beside(prepared: PreparedTask, kept: EdgeMask) -> EdgeMask:
    """`(sender, receiver, group)`: where an edge, kept beside `kept`, could change a run of the task."""
    graph = prepared.graph
    heard: EdgeMask = np.ones((len(graph.senders), len(graph.groups)), dtype=bool)
    if isinstance(prepared.ablation, (Patch, Resample)):
        heard = reached_senders(graph, kept)
    useful: EdgeMask = heard[:, None, :] & live_receivers(graph, kept)[None] & graph.edge_mask
    return useful
