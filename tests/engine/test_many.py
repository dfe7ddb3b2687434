"""Many masks in one run, against runs of one mask after the other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import BatchRun, batch_runs, many, masked_run
from circuitvit.engine.many import masked_runs, planned
from circuitvit.graph import EdgeMask, Graph
from tests.families import FAMILIES, made
from tests.strategies import Case, Recipe, assert_close, cases

SEEDS = st.integers(0, 2**16)


def neighbours(graph: Graph, seed: int, density: float, count: int = 5) -> EdgeMask:
    """A random mask, others that differ from it in few edges, and one that has nothing to do with it."""
    drawn = np.random.default_rng(seed)
    first = graph.edge_mask & (drawn.random(graph.shape) < density)
    masks = [first, graph.edge_mask & (drawn.random(graph.shape) < density)]
    for _ in range(count):
        flipped = drawn.random(graph.shape) < 2 / graph.n_edges
        masks.append(first ^ (graph.edge_mask & flipped))
    return np.stack([*masks, first])


def check(run: BatchRun, masks: EdgeMask, relative: float = 1e-10) -> None:
    """However long it takes: whether it pays is another question."""
    alone = torch.stack([masked_run(run.sources, each) for each in masks])
    assert_close(masked_runs(run.sources, masks), alone, relative)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(many.Plan, "pays", lambda *given: True)
        assert_close(masked_runs(run.sources, masks), alone, relative)


@settings(max_examples=8)
@given(cases(), SEEDS, st.sampled_from((0.1, 0.5, 0.95)))
def test_masks_run_together_give_what_each_gives_alone(case: Case, seed: int, density: float) -> None:
    (run,) = batch_runs(case.task().prepare(case.model), case.n_pairs)
    check(run, neighbours(run.sources.graph, seed, density))


@pytest.mark.parametrize(
    "family",
    ["timm, gated and normed together", "timm, two of each", "timm, pool beside a class token",
     "timm, norm across heads", "transformers, timesformer"],
)  # fmt: skip
def test_in_families_whose_parts_are_joined_otherwise(family: str) -> None:
    model, images = made(family)[0], FAMILIES[family].images
    task = cv.Task(images(1), images(1, seed=1), metric=cv.logit(0))
    (run,) = batch_runs(task.prepare(model), 1)
    check(run, neighbours(run.sources.graph, 0, 0.5), 1e-9)


def test_few_images_and_masks_at_a_time_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(Recipe(depth=2, heads=2), n_pairs=3)
    (run,) = batch_runs(case.task().prepare(case.model), 3)
    masks = neighbours(run.sources.graph, 1, 0.5)
    monkeypatch.setattr(many, "ROOM_BYTES", 1)
    check(run, masks)


def test_what_masks_agree_on_runs_once() -> None:
    """Masks that differ in what the readout hears share everything before it."""
    case = Case(Recipe(depth=2, heads=2), n_pairs=1)
    (run,) = batch_runs(case.task().prepare(case.model), 1)
    graph = run.sources.graph
    logits = graph.receiver_index["logits"]
    masks = np.repeat(graph.edge_mask[None], len(graph.senders), axis=0)
    for sender, mask in enumerate(masks):
        mask[sender, logits] = False
    plan = planned(run.sources, masks)
    assert plan.starts[-1] == len(graph.senders)
    assert [unit.states for unit in plan.units] == [*[1] * (len(plan.units) - 1), len(masks)]


def test_masks_with_much_in_them_and_little_in_common_are_run_one_after_the_other() -> None:
    """With a quarter of all edges or more, or less; those that lack one edge each share most of the rest."""
    case = Case(Recipe(depth=4, heads=3), n_pairs=1)
    (run,) = batch_runs(case.task().prepare(case.model), 1)
    graph, drawn = run.sources.graph, np.random.default_rng(0)
    unlike = graph.edge_mask & (drawn.random((6, *graph.shape)) < 0.6)
    first = graph.edge_mask & (drawn.random(graph.shape) < 0.1)
    alike = np.repeat(first[None], first.sum(), axis=0)
    for mask, edge in zip(alike, np.argwhere(first), strict=True):
        mask[tuple(edge)] = False
    assert not planned(run.sources, unlike).pays(1)
    assert planned(run.sources, alike).pays(1)
    mixed = np.concatenate([unlike, alike])[drawn.permutation(len(unlike) + len(alike))]
    check(run, mixed)
