"""Exact where it matters most, locally exact elsewhere, within a budget.

    s(u->v) = exact effect       for the edges whose estimate is least certain, as many as the budget buys
            = locally exact      for all others

How uncertain an estimate is, is told by what cancels in it. To first order an edge is a sum over tokens,

    EAP = sum over t of (r_u - x_u)[t] . g_v[t]
    doubt = sum over t of | (r_u - x_u)[t] . g_v[t] |, times the share of stages still to come

and where large terms of both signs cancel, the truth, in which every term is a little bent by all that comes
after, need not be small. On a real ViT this finds the edges that matter far better than the score does.
The first layers come first by themselves.

Cost: that of `local`, and the exact effects that fit into the rest of the budget; by default a quarter of
what `exact` costs in all. Blind to: where no token has a first-order effect, as in saturated attention;
backup heads.

Kramár, Lieberum, Shah and Nanda 2024, "AtP*", arXiv:2403.00745, verify the top of a cheap ranking likewise.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.attribution.budget import exact_cost, exact_costs, local_cost
from circuitvit.attribution.exact import edge_effects
from circuitvit.attribution.local import differentiated_runs, local_effects
from circuitvit.attribution.method import Scored, Settings, check_effects, refuse_flat, require_gradient
from circuitvit.engine import BatchRun, Gradients, progress_bar
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask, Graph
from circuitvit.tasks import PreparedTask

DEFAULT_SHARE = 0.25
"""Of the cost of `exact`, where no budget is given."""


TIED = 6
"""Decimals, as shares of the largest, to which edges are told apart when they are chosen."""


def hybrid(prepared: PreparedTask, settings: Settings) -> Scored:
    """Locally exact scores, and exact effects of the most doubtful edges, summed over pairs.

    Raises:
        OptionError: if the budget does not even pay for the locally exact scores.
    """
    require_gradient(prepared, "hybrid")
    refuse_flat(prepared, "hybrid")
    graph = prepared.graph
    budget = _forwards(prepared, settings)
    values, doubt = np.zeros(graph.shape), np.zeros(graph.shape)
    with progress_bar(len(prepared), "local", settings.progress) as bar:
        for run, found in differentiated_runs(prepared, settings.batch_size):
            values += local_effects(run, found)
            doubt += uncancelled(run, found)
            bar.update(len(run.batch.rows))
    check_effects(prepared, values)
    wanted = affordable(graph, doubt, budget - local_cost(graph))
    effects = edge_effects(prepared, wanted, settings)
    parameters = {"forwards": round(budget, 1), "exact_edges": int(wanted.sum())}
    return Scored(np.where(wanted, effects, values), wanted, parameters)


def affordable(graph: Graph, doubt: NDArray[np.float64], budget: float) -> EdgeMask:
    """The most doubtful edges whose exact effects cost no more than a budget together.

    Args:
        graph: of the edges.
        doubt: `(sender, receiver, group)`; how far the exact effect may be from the estimate.
        budget: forward-equivalents for each pair.
    """
    places = np.argwhere(graph.edge_mask)
    costs = exact_costs(graph)
    stakes = doubt * costs  # an early receiver leaves more stages to bend what is linear here
    stakes = np.round(stakes / max(float(stakes.max()), 1e-300), TIED)  # rounding must not break ties
    order = np.argsort(-stakes[tuple(places.T)], kind="stable")
    spent = np.cumsum(costs[tuple(places[order].T)])
    chosen = np.zeros(graph.shape, dtype=bool)
    chosen[tuple(places[order[spent <= budget]].T)] = True
    return chosen


@torch.no_grad()
def uncancelled(run: BatchRun, found: Gradients) -> NDArray[np.float64]:
    """The sizes of the tokens' first-order effects of each edge, summed over tokens and pairs of a batch."""
    graph, deltas, members = run.prepared.graph, run.sources.deltas(), run.sources.members
    total = np.zeros(graph.shape)
    for index, compact in enumerate(found.by_stage(), 1):
        gradient = compact.expand()
        tokens = gradient.shape[2]
        upstream, receivers = graph.sender_slices[index].start, graph.receiver_slices[index]
        by_token = torch.einsum("sbtd,rbtd->srbt", deltas[:upstream, :, :tokens], gradient).abs()
        for group in range(len(graph.groups)):
            seen = by_token if members is None else by_token * (members[..., :tokens] == group)
            total[:upstream, receivers, group] = seen.sum(dim=(2, 3)).double().cpu().numpy()
    return np.where(graph.edge_mask, total, 0.0)


def _forwards(prepared: PreparedTask, settings: Settings) -> float:
    """The budget in forward-equivalents for each pair."""
    graph = prepared.graph
    if settings.budget is None:
        return local_cost(graph) + DEFAULT_SHARE * exact_cost(graph)
    forwards = settings.budget.forwards(prepared, settings.batch_size)
    if forwards < local_cost(graph):
        raise OptionError(
            f"hybrid takes at least {local_cost(graph):.0f} forward-equivalents a pair here, and the budget "
            f"({settings.budget}) allows {forwards:.0f}: raise it, or use method='eap'"
        )
    return forwards
