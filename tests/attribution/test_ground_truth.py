"""Scores against models whose circuit is known: where they are right, and each known way in which they fail.

The failures are no bugs: they follow from what a method computes. They are asserted so that what the
documentation says of them stays true.
"""

from __future__ import annotations

import pytest
import torch

import circuitvit as cv
from circuitvit.groundtruth import PROGRAMS
from circuitvit.testing import active_edges, separation

WHOLE = 12.0
"""The effect of ablating everything in a program without parts: from +6 to -6."""


def task_of(found: cv.Compiled, change: str | None = None, **options: object) -> cv.Task:
    metric = cv.logit_diff("yes", "no")
    return cv.Task(*found.pairs(8, change=change), metric=metric, **options)  # type: ignore[arg-type]


def scores_of(found: cv.Compiled, method: str, change: str | None = None, **options: object) -> cv.EdgeScores:
    return cv.attribute(found.model, task_of(found, change, **options), method, progress=False)


def effect_of(found: cv.Compiled, *edges: str, change: str | None = None) -> float:
    """The mean effect of ablating these edges together."""
    task, whole = task_of(found, change), cv.Circuit.full(found.model.graph)
    gone = cv.Circuit.from_edges(found.model.graph, edges)
    runs = [cv.run(found.model, task, whole), cv.run(found.model, task, ablate=gone)]
    before, after = ((logits[:, 0] - logits[:, 1]).mean() for logits in runs)
    return float(after - before)


# -- where scores are right ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_exact_effects_come_first_without_exception(name: str, seed: int) -> None:
    found = cv.compiled(name, seed=seed)
    truth = active_edges(found.model, task_of(found))
    measured = separation(scores_of(found, "exact"), truth)
    assert (measured.roc_auc, measured.average_precision) == (1.0, 1.0)


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_adversarial_parts_gradients_find_the_edges_too(name: str) -> None:
    found = cv.compiled(name)
    truth = active_edges(found.model, task_of(found))
    for method in ("eap", "eap-ig"):
        assert separation(scores_of(found, method), truth).roc_auc == 1.0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", PROGRAMS)
def test_without_adversarial_parts_local_ranks_active_edges_first(name: str, seed: int) -> None:
    found = cv.compiled(name, seed=seed)
    assert separation(scores_of(found, "local"), active_edges(found.model, task_of(found))).roc_auc >= 0.98


@pytest.mark.parametrize("part", ["saturated", "norm"])
def test_local_is_wrong_where_what_follows_the_receiver_bends(part: str) -> None:
    """It is exact at the receiver alone: a saturated softmax or a moving norm later on misleads it."""
    found = cv.compiled("query", parts=(part,))
    truth = active_edges(found.model, task_of(found))
    assert separation(scores_of(found, "local"), truth).roc_auc < 0.98
    assert separation(scores_of(found, "exact"), truth).roc_auc == 1.0


# -- a backup (OR) ---------------------------------------------------------------------------------------

REDUNDANT = ("a1.h0->m1", "a1.h1->m1")


@pytest.mark.parametrize("method", ["eap", "exact"])
def test_a_backup_hides_both_heads(method: str) -> None:
    found = cv.compiled("relay", parts=("backup",))
    scores = scores_of(found, method)
    assert [scores[edge] for edge in REDUNDANT] == pytest.approx([0, 0], abs=1e-4)
    assert effect_of(found, *REDUNDANT) == pytest.approx(-WHOLE, abs=1e-3)


def test_a_search_finds_one_of_the_two_that_a_backup_hides() -> None:
    found = cv.compiled("relay", parts=("backup",))
    task = task_of(found).prepare(found.model)
    plan = cv.Plan(steps=30, trim_runs=400, batch_size=8)
    learned = cv.find(found.model, task, plan=plan, progress=False)
    assert learned.minimal
    for circuit in (learned.circuit, cv.acdc(found.model, task, tau=0.1, progress=False)):
        assert circuit <= found.wired
        assert len([edge for edge in REDUNDANT if edge in circuit]) == 1


# -- a gate (AND) ----------------------------------------------------------------------------------------


def test_a_gate_hides_both_heads_from_denoising() -> None:
    """Ablating either breaks it, so noising sees both; restoring one alone does nothing."""
    found = cv.compiled("relay", parts=("gate",))
    noising, denoising = (
        scores_of(found, "exact", direction=direction) for direction in ("noising", "denoising")
    )
    assert [noising[edge] for edge in REDUNDANT] == pytest.approx([-WHOLE] * 2, abs=1e-3)
    assert [denoising[edge] for edge in REDUNDANT] == pytest.approx([0, 0], abs=1e-3)


def test_a_backup_is_seen_by_denoising() -> None:
    denoising = scores_of(cv.compiled("relay", parts=("backup",)), "exact", direction="denoising")
    assert [denoising[edge] for edge in REDUNDANT] == pytest.approx([WHOLE] * 2, abs=1e-3)


# -- cancelling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_cancelling_heads_have_large_effects_that_add_up_to_none(name: str) -> None:
    found = cv.compiled(name, parts=("cancelling",))
    layer = found.program.carrier[0]
    heads = [f"a{layer}.h{place}->logits" for place in (1, 2)]
    scores = scores_of(found, "exact")
    assert [scores[edge] for edge in heads] == pytest.approx([-WHOLE, WHOLE], abs=1e-3)
    assert effect_of(found, *heads) == pytest.approx(0, abs=1e-3)


# -- opposite signs over tokens --------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rounding"), [("eap", 0.5), ("eap-ig", 0.5), ("exact", 1e-4)])
def test_opposite_effects_at_two_tokens_cancel_unless_the_edge_is_resolved(
    method: str, rounding: float
) -> None:
    """For gradients but for what they see of the norm, see below."""
    found = cv.compiled("relay", parts=("opposite",))
    clean, corrupt = found.pairs(8)
    tint = found.program.pixels.index("tint")
    masks = {"loses": clean[:, tint] > corrupt[:, tint], "gains": clean[:, tint] < corrupt[:, tint]}
    groups = cv.TokenGroups.from_masks(found.model, masks)
    assert scores_of(found, method)["input->a0.h1<v>"] == pytest.approx(0, abs=rounding)
    resolved = scores_of(found, method, groups=groups)
    assert resolved["input->a0.h1<v>@loses"] < -WHOLE / 2
    assert resolved["input->a0.h1<v>@gains"] > WHOLE / 2


# -- saturation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "edge"), [("key", "target", "m0->a1.h0<k>"), ("query", "question", "a0.h0->a1.h0<q>")]
)
def test_saturated_attention_has_no_gradient(name: str, change: str, edge: str) -> None:
    soft, saturated = cv.compiled(name), cv.compiled(name, parts=("saturated",))
    for found in (soft, saturated):
        assert scores_of(found, "exact", change)[edge] == pytest.approx(-WHOLE, abs=1e-3)
    assert scores_of(soft, "eap", change)[edge] < -WHOLE / 2
    assert scores_of(saturated, "eap", change)[edge] == pytest.approx(0, abs=1e-4)


# -- the norm --------------------------------------------------------------------------------------------


def test_gradients_see_changes_of_the_norm_that_never_happen() -> None:
    """Dead edges outrank active ones, though no state of the stream is longer than another."""
    plain, crowded = cv.compiled("query"), cv.compiled("query", parts=("norm",))
    dead = "a0.h1->m0"
    for found in (plain, crowded):
        assert scores_of(found, "exact")[dead] == pytest.approx(0, abs=1e-4)
    scores = scores_of(crowded, "eap")
    truth = active_edges(crowded.model, task_of(crowded))
    assert abs(scores[dead]) > min(abs(scores[edge]) for edge in truth)
    assert separation(scores, truth).roc_auc < 0.95
    assert abs(scores_of(plain, "eap")[dead]) < 0.2 * abs(scores[dead])


# -- registers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_goes_through_a_register_is_seen_at_the_register_alone(name: str) -> None:
    found = cv.compiled(name, parts=("register",))
    scores = scores_of(found, "exact", groups="kind")
    writer = "m1" if name == "count" else "a1.h0"
    by_kind = [scores[f"{writer}->a2.h0<v>@{kind}"] for kind in ("cls", "reg", "patch")]
    assert by_kind == pytest.approx([0, -WHOLE, 0], abs=1e-3)


def test_effects_are_those_of_ablating_one_edge_by_hand() -> None:
    """The labels' brute force, `exact` and a run that ablates the edge agree."""
    found = cv.compiled("key", parts=("cancelling",))
    scores = scores_of(found, "exact")
    for edge in torch.randperm(len(scores.graph.edges), generator=torch.Generator().manual_seed(0))[:20]:
        name = scores.graph.edges[int(edge)]
        assert scores[name] == pytest.approx(effect_of(found, name), abs=1e-4)
