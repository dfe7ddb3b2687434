"""Node scores: the literal definition, and how they relate to edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError
from tests.strategies import Case, Recipe, assert_same_scores, cases


def literal(case: Case, method: str) -> dict[str, float]:
    """One full run for each node and group, in which all of the node's edges are ablated; or its gradient."""
    model, groups = case.literal, case.token_groups
    scores, whole = {}, case.formula(model.run(case.base).logits)
    embedded = model.run(case.base).outputs["input"].requires_grad_()
    run = model.run(case.base, embedded=embedded)
    slopes = torch.autograd.grad(
        case.formula(run.logits).sum(), [run.outputs[each] for each in model.senders()]
    )
    for sender, slope in zip(model.senders(), slopes, strict=True):
        for group, name in enumerate(("",) if groups is None else groups.names):

            def kept(edge: str, sender: str = sender, name: str = name) -> bool:
                return not (edge.startswith(f"{sender}->") and edge.endswith(f"@{name}" if name else ""))

            change = case.reference[sender] - run.outputs[sender].detach()
            change = change if groups is None else change * groups.inside(group, len(case.base))
            effect = case.formula(model.run(case.base, case.reference, kept, groups).logits) - whole
            score = effect.sum() if method == "exact" else (change * slope).sum()
            scores[f"{sender}@{name}" if name else sender] = float(score) / len(case.base)
    return scores


@pytest.mark.parametrize("method", ["exact", "atp"])
@given(case=cases(smooth=True, max_depth=2, max_heads=2))
def test_scores_are_those_of_the_definition(method: str, case: Case) -> None:
    found = cv.attribute_nodes(case.model, case.task(), method, progress=False)
    assert_same_scores(found.to_dict(), literal(case, method))
    again = cv.attribute_nodes(case.model, case.task(), method, batch_size=1, progress=False)
    assert again.values == pytest.approx(found.values, abs=1e-10)


@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_to_first_order_a_node_is_the_sum_of_its_edges(case: Case) -> None:
    edges = cv.attribute(case.model, case.task(), "eap", progress=False)
    nodes = cv.attribute_nodes(case.model, case.task(), "atp", progress=False)
    scale = max(1.0, np.abs(edges.values).max())
    assert nodes.values == pytest.approx(edges.values.sum(axis=1), abs=1e-9 * scale)


def test_nodes_are_found_by_name() -> None:
    case = Case(Recipe(depth=1, heads=2, registers=1), n_pairs=1)
    nodes = cv.attribute_nodes(case.model, case.task(groups="kind"), progress=False)
    assert list(nodes.to_dict())[:3] == ["input@cls", "input@reg", "input@patch"]
    name, score = nodes.strongest(1)[0]
    assert nodes[name] == score == max(nodes.to_dict().values(), key=abs)
    assert repr(nodes).startswith("NodeScores(exact, 12 nodes; strongest:")
    with pytest.raises(NameNotFoundError, match="m0@cls"):
        nodes["m0@class"]


def test_what_makes_no_sense_is_refused() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(NameNotFoundError, match="exact"):
        cv.attribute_nodes(case.model, case.task(), "exakt", progress=False)
    with pytest.raises(OptionError, match="atp needs the metric's gradient"):
        cv.attribute_nodes(case.model, case.task(metric=cv.accuracy(0)), "atp", progress=False)
    with pytest.raises(OptionError, match="shape"):
        cv.NodeScores(case.model.graph, np.zeros(3))
