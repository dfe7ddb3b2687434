"""The best scores that a budget buys: exact where they fit into it, hybrid where they do not.

Cost: what the budget says, by default 60 s for the whole task. The choice and its reason are kept in the
scores' provenance. Blind to: what the chosen method is blind to; `calibrate` measures how much that is.
"""

from __future__ import annotations

from dataclasses import replace

from circuitvit.attribution.budget import Budget, exact_cost, local_cost
from circuitvit.attribution.eap import eap
from circuitvit.attribution.exact import exact
from circuitvit.attribution.hybrid import hybrid
from circuitvit.attribution.method import FLAT_AT_CLEAN, Scored, Settings
from circuitvit.tasks import PreparedTask

DEFAULT_BUDGET = Budget(60.0, seconds=True)


def auto(prepared: PreparedTask, settings: Settings) -> Scored:
    """The scores of the method that the budget allows, summed over pairs, with `chosen` saying why."""
    budget = settings.budget or DEFAULT_BUDGET
    forwards = budget.forwards(prepared, settings.batch_size)
    needed = exact_cost(prepared.graph)
    cost = f"exact effects cost about {needed:,.0f} forward-equivalents a pair"
    allows = f"the budget ({budget}) allows {forwards:,.0f}"
    if needed <= forwards:
        return Scored(
            exact(prepared, settings),
            prepared.graph.edge_mask,
            {"chosen": f"exact: {cost}, {allows}"},
            "exact",
        )
    if no_gradient := _without_gradient(prepared):
        reason = f"exact: {no_gradient}, so no estimate can be had; {cost}, {allows}"
        return Scored(exact(prepared, settings), prepared.graph.edge_mask, {"chosen": reason}, "exact")
    if forwards < local_cost(prepared.graph):
        reason = f"eap: even locally exact scores cost about {local_cost(prepared.graph):,.0f}, {allows}"
        return Scored(eap(prepared, settings), None, {"chosen": reason}, "eap")
    found = hybrid(prepared, replace(settings, budget=Budget(forwards)))
    reason = (
        f"hybrid: {cost}, {allows}: the most doubtful {found.parameters['exact_edges']:,} edges are exact"
    )
    return replace(found, parameters={**found.parameters, "chosen": reason}, method="hybrid")


def _without_gradient(prepared: PreparedTask) -> str | None:
    """Why no gradient can be had at the base run; None where one can."""
    metric = prepared.metric.metric
    if not metric.differentiable:
        return f"{metric.name} has no gradient"
    flat = metric.name in FLAT_AT_CLEAN and not prepared.denoising
    return f"{metric.name} is flat at the clean run" if flat else None
