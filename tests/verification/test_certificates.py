"""Certificates: what the theorem promises is true of every deletion, and of as many draws as it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.errors import CircuitViTError, DataError, FileError, OptionError
from circuitvit.graph import Circuit, EdgeScores
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.tasks import as_task, select_pairs
from circuitvit.verification.certificates import Certificate, certify
from tests.rightness import METRIC, images, micro

GRAPH = transformer_graph(1, 2)


def voted(counts: list[int], pairs: int, k: int) -> Certificate:
    """Votes of all subsets: the first edges have these counts."""
    votes = np.zeros(GRAPH.shape, dtype=np.int64)
    votes[tuple(np.argwhere(GRAPH.edge_mask)[: len(counts)].T)] = counts
    return Certificate(GRAPH, votes, comb(pairs, k), pairs, k, 0.0)


def worst(votes: int, pairs: int, k: int, replaced: bool) -> int:
    """How many pairs may go before the worst possible votes turn the majority, by counting; -1 for a tie.

    The subsets that go are those that have voted for the edge; those that come vote against it.
    """
    total = comb(pairs, k)
    for radius in range(pairs - k + 1):
        left = comb(pairs - radius, k)
        against = total - votes
        stand = 2 * max(0, left - against) > (total if replaced else left)
        if not stand:
            return radius - 1
    return pairs - k


@pytest.mark.parametrize(("pairs", "k"), [(4, 2), (6, 3), (7, 2), (6, 1), (6, 5)])
def test_radii_are_those_of_the_worst_votes_and_no_smaller(pairs: int, k: int) -> None:
    for votes in range(comb(pairs, k) + 1):
        found = voted([votes], pairs, k)
        sides = votes, comb(pairs, k) - votes
        deleted = max(worst(side, pairs, k, False) for side in sides)
        replaced = max(worst(side, pairs, k, True) for side in sides)
        edge = GRAPH.edges[0]
        place = GRAPH.edge_index(edge)
        assert found.radius(edge) == max(deleted, 0)
        assert found.decisions.replaced[place] == max(replaced, 0)
        expected = "abstain" if deleted < 0 else "in" if votes > sides[1] else "out"
        assert found.decision(edge) == expected


def test_a_tie_is_abstained_from_and_has_no_radius() -> None:
    found = voted([10, 11, 20], 6, 3)
    names = GRAPH.edges[:3]
    assert [found.decision(each) for each in names] == ["abstain", "in", "in"]
    assert [found.radius(each) for each in names] == [0, 0, 3]
    assert found.sizes() == (2, 1, 1, 1)
    assert [row["decision"] for row in found.records()] == ["abstain", "in", "in"]
    assert "all 20 subsets of 3 of 6 pairs: 2 edges in the circuit, 1 of them whichever pair" in str(found)


def test_random_subsets_certify_what_is_false_as_seldom_as_they_say() -> None:
    """Shares lie just where a certificate would be false, the worst place for each radius."""
    pairs, k, n, alpha, runs = 12, 6, 300, 0.05, 400
    rng, wrong, certified = np.random.default_rng(0), 0, 0
    radii = np.arange(GRAPH.n_edges) % 4  # the smallest that is not to be certified; of 0 the decision itself
    shares = np.array([1 - comb(pairs - r, k) / comb(pairs, k) / 2 for r in radii.tolist()])
    shares[-1] = 1.0
    for _ in range(runs):
        votes = np.zeros(GRAPH.shape, dtype=np.int64)
        votes[GRAPH.edge_mask] = rng.binomial(n, shares)
        found = Certificate(GRAPH, votes, n, pairs, k, alpha).decisions
        sign, deleted = (each[GRAPH.edge_mask] for each in (found.sign, found.deleted))
        is_wrong = (sign < 0) | ((sign > 0) & (deleted >= radii))
        wrong += bool(is_wrong[:-1].any())
        certified += deleted[-1] >= 3
    assert 0 < wrong <= alpha * runs
    assert certified == runs


# -- on models -----------------------------------------------------------------------------------


def task_of(count: int, spread: float = 0.6, **options: Any) -> cv.Task:
    """Pairs that are somewhat alike."""
    sides = [images(1, seed) + spread * images(count, seed + 10) for seed in (0, 1)]
    return cv.Task(*sides, METRIC, **options)


def test_no_deletion_turns_what_is_certified() -> None:
    model = cv.wrap(micro())
    prepared = task_of(6).prepare(model)
    whole = certify(model, prepared, "eap", edges=12, k=3, progress=False)
    sign, deleted, _ = whole.decisions
    assert whole.alpha == 0
    assert (deleted[sign != 0] >= 1).any()
    assert (deleted[sign != 0] == 0).any()
    turned = 0
    for radius in (1, 2):
        for gone in combinations(range(6), radius):
            left = select_pairs(prepared, [row for row in range(6) if row not in gone])
            again = certify(model, left, "eap", edges=12, k=3, progress=False).decisions.sign
            assert np.array_equal(again[deleted >= radius], sign[deleted >= radius])
            turned += int((again != sign).sum())
    assert turned  # others did turn: the certificate is no empty promise


def test_an_edge_that_three_pairs_show_survives_the_deletion_of_two() -> None:
    """Three pairs differ in the colour, which the value carries, and three in where the cue is, which the key
    does; on subsets of one kind the other edge has no effect but rounding, and is not found."""
    relay = cv.compiled("relay", dtype=torch.float64)
    task = cv.Task(*relay.pairs(6), metric=cv.logit_diff("yes", "no"))
    edges = len(relay.wired)
    found = certify(relay.model, task, "exact", edges=edges, progress=False)
    assert {edge: found.radius(edge) for edge in relay.wired} == {
        edge: 2 if edge.startswith("input") else 3 for edge in relay.wired
    }
    assert set(found.at(2)) == set(relay.wired)
    assert found.at(2).provenance.shares_of == "the votes"
    assert {edge for edge in relay.model.graph.edges if found.decision(edge) != "out"} == set(relay.wired)


@pytest.mark.parametrize(
    "options", [{}, {"direction": "denoising", "groups": "kind"}, {"ablation": cv.Mean(images(3, 9))}]
)
def test_scores_kept_by_pair_vote_as_scores_of_each_subset(options: dict[str, Any]) -> None:
    model, task = cv.wrap(micro()), task_of(4, **options)

    def anew(model: cv.Model, task: cv.Task) -> Circuit:
        return cv.attribute(model, task, "local", progress=False).top(9, prune=False)

    kept = certify(model, task, "local", edges=9, k=2, progress=False)
    assert np.array_equal(kept.votes, certify(model, task, anew, k=2, progress=False).votes)
    assert kept.subsets == 6


@pytest.mark.parametrize(("method", "keywords"), [("hybrid", {"budget": 25}), ("atp-star", {})])
def test_methods_that_choose_by_all_pairs_choose_for_each_pair_alone(
    method: str, keywords: dict[str, Any]
) -> None:
    model = cv.wrap(micro())
    prepared = task_of(3).prepare(model)
    alone = [
        cv.attribute(model, select_pairs(prepared, [row]), method, progress=False, **keywords).values
        for row in range(3)
    ]
    votes = sum(
        EdgeScores(model.graph, (alone[row] + alone[other]) / 2).top(9, prune=False).kept.astype(int)
        for row, other in combinations(range(3), 2)
    )
    found = certify(model, prepared, method, edges=9, k=2, progress=False, **keywords)
    assert np.array_equal(found.votes, votes)
    assert not np.array_equal(  # which is no more than what they find on all pairs together
        np.mean(alone, axis=0), cv.attribute(model, prepared, method, progress=False, **keywords).values
    )


def knows(name: str) -> Callable[[cv.Model, cv.Task], list[str]]:
    """A search that finds the edge if a pair is there."""

    def search(model: cv.Model, task: cv.Task) -> list[str]:
        return ["input->logits"] if name in task.prepare(model).clean.names else []

    return search


def test_a_search_is_repeated_on_random_subsets_the_same_for_a_seed() -> None:
    model = cv.wrap(micro())
    prepared = task_of(10).prepare(model)
    first = prepared.clean.names[0]
    found, again, other = (
        certify(model, prepared, knows(first), n=100, k=3, seed=seed, progress=False) for seed in (0, 0, 1)
    )
    place = model.graph.edge_index("input->logits")
    assert found.subsets == 100
    assert found.alpha == 0.05
    assert abs(found.share[place] - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 100)
    assert found.decision("input->logits") == "out"
    assert np.array_equal(found.votes, again.votes)
    assert not np.array_equal(found.votes, other.votes)
    short = certify(model, prepared, knows(first), n=100, k=3, within=1e-4, progress=False)
    assert short.subsets == 1
    assert short.decision("m0->logits") == "abstain"
    assert f"{model.graph.n_edges} abstained from, 0 out" in str(short), "also those that were never found"
    assert not short.circuit


def test_pairs_are_deleted_with_their_order_kept() -> None:
    model, seen = cv.wrap(micro()), []

    def search(model: cv.Model, task: cv.Task) -> list[str]:
        seen.append(task.prepare(model).clean.names)
        return []

    prepared = task_of(4).prepare(model)
    certify(model, as_task(prepared), search, k=3, progress=False)
    assert seen == list(combinations(prepared.clean.names, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "auto"}, "auto looks at all pairs"),
        ({"method": "hybrid", "budget": "9s"}, "budget='9s' is shared by all pairs"),
        ({"method": "exact", "state": "a"}, "leave out state="),
        ({"ablation": "mean"}, "'mean' ablation a pair's scores depend on other pairs"),
        ({"ablation": "resample"}, "'resample' ablation"),
        ({"k": 4}, "subsets of 4 pairs need more than 4"),
        ({"k": 2, "n": 5}, "certify nothing, were they all to agree: it takes 2"),
        ({"edges": 10_000}, "asked for 10000 edges"),
        ({"selection": "best"}, "selection"),
        ({"method": lambda model, task: [], "edges": 3}, "edges is for a method of scores"),
        ({"alpha": 1.0}, "the level alpha"),
    ],
)
def test_what_cannot_be_certified_is_said_before_work_begins(settings: dict[str, Any], message: str) -> None:
    task = task_of(4, ablation=settings.pop("ablation", "patch"))
    with pytest.raises(CircuitViTError, match=message):
        certify(cv.wrap(micro()), task, progress=False, **settings)


def test_a_single_pair_has_no_subsets() -> None:
    with pytest.raises(DataError, match="single pair"):
        certify(cv.wrap(micro()), task_of(1), progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"subsets": 3}, "votes lie between"),
        ({"k": 8}, "subsets of 8 of 8 pairs"),
        ({"pairs": 10**12}, "subsets of 3 of"),
        ({"alpha": 1.0}, "alpha"),
    ],
)
def test_a_file_of_what_no_run_gives_is_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    found = replace(voted([20, 5], 8, 3), **wrong)
    with pytest.raises(FileError, match=message):
        Certificate.load(found.save(tmp_path / "found.json"))


def test_a_certificate_is_a_circuit_and_says_where_it_came_from(tmp_path: Path) -> None:
    model, task, alike = cv.wrap(micro()), task_of(5), task_of(5, spread=0.05)
    found = certify(model, task, "eap", edges=12, k=2, progress=False)
    back = Certificate.load(found.save(tmp_path / "found.safetensors"))
    assert back.circuit == found.circuit == Circuit.load(found.circuit.save(tmp_path / "circuit.json"))
    assert found.circuit.provenance.method == "certify"
    assert cv.verify(model, alike, found, n_random=0, progress=False).size.edges == len(found.circuit)
    with pytest.raises(OptionError, match="radius"):
        found.at(-1)


def texts(figure: Any) -> list[str]:
    return [each.get_text() for axes in figure.axes for each in (*axes.texts, *axes.get_yticklabels())]


def test_the_figure_tells_what_stays(tmp_path: Path) -> None:
    figure = voted([10, 11, 20], 6, 3).figure()
    assert texts(figure)[-1:]
    assert {"2", "1"} <= set(texts(figure))
    assert figure.save(tmp_path / "votes.svg").stat().st_size
