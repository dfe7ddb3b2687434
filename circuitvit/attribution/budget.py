"""What a budget buys: exact effects where they fit into it, and of the most doubtful edges where they do not.

A budget is forward-equivalents for each pair, or seconds for the whole task. A forward-equivalent is the work
of one plain forward on one image. Costs are counted from the list of stages, so that a budget in
forward-equivalents buys the same scores on every machine. Seconds are turned into them with the time that one
forward takes here and now; what they buy depends on the machine.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from circuitvit.attribution.costs import (
    exact_cost,
    exact_costs,
    local_cost,
    seconds_per_forward,
    tell_time,
)
from circuitvit.attribution.eap import eap, new_total
from circuitvit.attribution.exact import edge_effects, exact
from circuitvit.attribution.local import differentiated_runs, local_effects
from circuitvit.attribution.scoring import Running, Scored, check_effects, require_slope, without_gradient
from circuitvit.engine import (
    BatchRun,
    Gradients,
    agreed,
    own_share,
    place_in_group,
    progress_bar,
    summed,
)
from circuitvit.errors import OptionError
from circuitvit.graph import EdgeMask, Graph
from circuitvit.tasks import PreparedTask

DEFAULT_SHARE = 0.25
"""What `hybrid` spends of the cost of `exact`, where no budget is given."""

TIED = 6
"""Decimals, as shares of the largest, to which edges are told apart when they are chosen."""

LARGEST = 1e9
"""Forward-equivalents or seconds that may be asked for."""

LONGEST = 1e7
"""Seconds that may be asked for in words: more than a quarter of a year is a slip of the pen."""

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def seconds(duration: str | float) -> float:
    """A duration in seconds.

    Raises:
        OptionError: if it is not a positive number of seconds, or text such as "90s", "2m" or "1.5h".

    Example:
        >>> seconds("2m"), seconds(30)
        (120.0, 30.0)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(duration))
    amount = 0.0 if match is None else float(match[1]) * UNITS.get(match[2], 0.0)
    if not 0 < amount < LONGEST:
        raise OptionError(f"a duration is a number with s, m or h, such as '120s' or '2m', not {duration!r}")
    return amount


@dataclass(frozen=True)
class Budget:
    """An amount of work.

    Attributes:
        amount: a positive number.
        seconds: whether it is seconds for the whole task; else forward-equivalents for each pair.

    Raises:
        OptionError: if the amount is no positive number.

    Example:
        >>> Budget.parse("2m")
        Budget(amount=120.0, seconds=True)
        >>> Budget.parse(60)
        Budget(amount=60.0, seconds=False)
    """

    amount: float
    seconds: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.amount < LARGEST:
            raise OptionError(f"a budget is a positive number, not {self.amount!r}")

    @classmethod
    def parse(cls, spec: str | float | Budget) -> Budget:
        """A budget from a number of forward-equivalents, or a duration such as "60s" or "2m".

        Raises:
            OptionError: if it is neither, or not positive.
        """
        if isinstance(spec, Budget):
            return spec
        try:
            amount = seconds(spec)
        except OptionError as error:
            raise OptionError(
                "a budget is a number of forward-equivalents for each pair, such as 60, or a duration with "
                f"s, m or h, such as '60s', not {spec!r}"
            ) from error
        return cls(amount, str(spec).strip()[-1].isalpha())

    def forwards(self, prepared: PreparedTask, batch_size: int) -> float:
        """The budget in forward-equivalents for each pair; seconds are turned into them by timing a few."""
        if not self.seconds:
            return self.amount
        forward = agreed(seconds_per_forward(prepared, batch_size), prepared.processes)
        return place_in_group(prepared.processes)[1] * self.amount / (len(prepared) * forward)

    def __str__(self) -> str:
        return f"{self.amount:g} s" if self.seconds else f"{self.amount:g} forward-equivalents a pair"


# -- the methods ---------------------------------------------------------------------------------


def hybrid(prepared: PreparedTask, how: Running, *, budget: Budget | str | float | None = None) -> Scored:
    """Exact where it matters most, locally exact elsewhere, within a budget.

        s(u->v) = exact effect       for the edges whose estimate is least certain, as many as the budget buys
                = locally exact      for all others

    How uncertain an estimate is, is told by what cancels in it. To first order an edge is a sum over tokens,

        EAP = sum over t of (r_u - x_u)[t] . g_v[t]
        doubt = sum over t of | (r_u - x_u)[t] . g_v[t] |, times the share of stages still to come

    and where large terms of both signs cancel, the truth, in which every term is a little bent by all that
    comes after, need not be small. On a real ViT this finds the edges that matter far better than the score
    does. The first layers come first by themselves.

    Cost: that of `local`, and the exact effects that fit into the rest of the budget; by default a quarter of
    what `exact` costs in all. Blind to: where no token has a first-order effect, as in saturated attention;
    backup heads.

    Kramár, Lieberum, Shah and Nanda 2024, "AtP*", arXiv:2403.00745, verify the top of a cheap ranking
    likewise.

    Args:
        budget: what may be spent: forward-equivalents for each pair, such as 60, or a duration for the whole
            task, such as "60s". Results under a duration depend on the machine.

    Raises:
        OptionError: if the budget does not even pay for the locally exact scores, or for a metric without a
            gradient.
    """
    require_slope(prepared, "hybrid")
    graph = prepared.graph
    forwards = _forwards(prepared, how, None if budget is None else Budget.parse(budget))
    tell_time(prepared, "hybrid", forwards, how.batch_size, how.progress)
    values, doubt = np.zeros(graph.shape), np.zeros(graph.shape)
    with progress_bar(len(prepared), "local", how.progress) as bar:
        for run, found in differentiated_runs(own_share(prepared), how.batch_size):
            values += local_effects(run, found)
            doubt += uncancelled(run, found)
            bar.update(len(run.batch.rows))
    values, doubt = summed(values, prepared.processes), summed(doubt, prepared.processes)
    check_effects(prepared, values)
    wanted = affordable(graph, doubt, forwards - local_cost(graph))
    effects = edge_effects(prepared, wanted, how)
    chosen = {"forwards": round(forwards, 1), "exact_edges": int(wanted.sum())}
    return Scored(np.where(wanted, effects, values), wanted, chosen)


def auto(prepared: PreparedTask, how: Running, *, budget: Budget | str | float = "60s") -> Scored:
    """The best scores that a budget buys: exact where they fit into it, hybrid where they do not.

    The choice and its reason are kept in the scores' provenance, as `chosen`.

    Cost: what the budget says. Blind to: what the chosen method is blind to; `calibrate` measures how much.

    Args:
        budget: what may be spent: forward-equivalents for each pair, such as 60, or a duration for the whole
            task, such as "60s". Results under a duration depend on the machine.

    Raises:
        OptionError: if it is no budget.
    """
    budget = Budget.parse(budget)
    forwards = budget.forwards(prepared, how.batch_size)
    needed = exact_cost(prepared.graph)
    cost = f"exact effects cost about {needed:,.0f} forward-equivalents a pair"
    allows = f"the budget ({budget}) allows {forwards:,.0f}"
    if needed <= forwards:
        return _all_exact(prepared, how, f"{cost}, {allows}")
    if no_gradient := without_gradient(prepared):
        return _all_exact(prepared, how, f"{no_gradient}, so no estimate can be had; {cost}, {allows}")
    if forwards < local_cost(prepared.graph):
        reason = f"eap: even locally exact scores cost about {local_cost(prepared.graph):,.0f}, {allows}"
        return Scored(eap(prepared, how), None, {"chosen": reason}, "eap")
    found = hybrid(prepared, how, budget=Budget(forwards))
    reason = (
        f"hybrid: {cost}, {allows}: the most doubtful {found.parameters['exact_edges']:,} edges are exact"
    )
    return Scored(found.values, found.measured, {**found.parameters, "chosen": reason}, "hybrid")


def _all_exact(prepared: PreparedTask, how: Running, reason: str) -> Scored:
    chosen = {"chosen": f"exact: {reason}"}
    return Scored(exact(prepared, how), prepared.graph.edge_mask, chosen, "exact")


def _forwards(prepared: PreparedTask, how: Running, budget: Budget | None) -> float:
    """The budget of `hybrid` in forward-equivalents for each pair."""
    graph = prepared.graph
    if budget is None:
        return local_cost(graph) + DEFAULT_SHARE * exact_cost(graph)
    forwards = budget.forwards(prepared, how.batch_size)
    if forwards < local_cost(graph):
        raise OptionError(
            f"hybrid takes at least {local_cost(graph):.0f} forward-equivalents a pair here, and the budget "
            f"({budget}) allows {forwards:.0f}: raise it, or use method='eap'"
        )
    return forwards


# -- which edges are worth it --------------------------------------------------------------------


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
    graph, deltas = run.prepared.graph, run.sources.deltas()
    total = new_total(run.prepared)
    for index, compact in enumerate(found.by_stage(), 1):
        gradient = compact.expand()
        _, _, tokens, width = gradient.shape
        upstream, receivers = graph.upstream[index], graph.receiver_slices[index]
        by_token = torch.einsum("sbtd,rbtd->srbt", deltas[upstream, :, :tokens, :width], gradient).abs()
        members = run.sources.members_at(index, tokens)
        for group in range(len(graph.groups)):
            seen = by_token if members is None else by_token * (members == group)
            total[upstream, receivers, group] = seen.sum(dim=(2, 3)).double()
    return np.where(graph.edge_mask, total.cpu().numpy(), 0.0)
