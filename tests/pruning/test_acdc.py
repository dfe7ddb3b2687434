"""ACDC: the edges of the naive search, whatever shortcuts it takes, and what it promises of its answer."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine import batch_runs
from circuitvit.errors import DataError, OptionError
from tests.reference import literal_acdc
from tests.reference.literal_vit import by_sender
from tests.strategies import Case, Recipe, cases

MODELS = int(os.environ.get("CIRCUITVIT_ACDC_MODELS", "50"))
"""How many random models the comparison with the naive search takes."""

SHARES = (0.001, 0.01, 0.03, 0.1, 0.3)
"""Thresholds, as shares of the divergence that ablating everything causes."""


def divergence_of(case: Case, kind: str) -> literal_acdc.Divergence:
    return literal_acdc.kl if kind == "kl" else literal_acdc.metric_difference(case.formula)


def threshold(case: Case, kind: str, share: float) -> float:
    whole = case.literal.run(case.clean).logits
    none = case.literal.run(case.clean, case.reference, lambda _: False, case.token_groups).logits
    return share * float(divergence_of(case, kind)(whole, none).mean())


def is_touched(case: Case) -> bool:
    """Whether ablation changes anything: a task where it does not is refused, see below."""
    return threshold(case, "kl", 1.0) > 1e-5


noising = (
    cases(max_depth=2, max_heads=2).map(lambda case: replace(case, direction="noising")).filter(is_touched)
)


@settings(max_examples=MODELS)
@given(noising, st.sampled_from(("kl", "metric")), st.sampled_from(SHARES), st.integers(1, 3))
def test_it_finds_the_edges_of_the_naive_search(case: Case, kind: Any, share: float, batch_size: int) -> None:
    tau = threshold(case, kind, share)
    divergence = divergence_of(case, kind)
    kept = literal_acdc.acdc(case.literal, case.clean, case.reference, tau, divergence, case.token_groups)
    expected = literal_acdc.pruned(case.literal, kept, case.token_groups, case.ablation == "patch")
    found = cv.acdc(case.model, case.task(), tau, divergence=kind, batch_size=batch_size, progress=False)
    assert set(found) == expected
    # And what the search promises: no dead edge, and a divergence below tau for each edge that went.
    assert case.ablation != "patch" or found == found.pruned()
    whole, left = case.literal.run(case.clean).logits, cv.run(case.model, case.task(), found)
    assert float(divergence(whole, left).mean()) <= tau * (found.graph.n_edges - len(found)) + 1e-9


# -- the answer ----------------------------------------------------------------------------------------


def test_the_higher_the_threshold_the_fewer_edges_are_left() -> None:
    case = Case(Recipe(depth=2, heads=2))
    sizes = [len(cv.acdc(case.model, case.task(), tau, progress=False)) for tau in (1e-9, 1e-3, 1e-2, 1e6)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[2] > sizes[3] == 0


def test_edges_that_do_not_matter_go_and_those_that_do_stay() -> None:
    """A head whose output weights are zero is heard by nobody, whatever it hears."""
    case = Case(Recipe(depth=1, heads=2))
    with torch.no_grad():
        case.module.blocks[0].attn.proj.weight[:, :6] = 0.0
    circuit = cv.acdc(case.model, case.task(), 1e-6, divergence="metric", progress=False)
    assert set(circuit.nodes) == {"input", "a0.h1", "m0", "logits"}


@pytest.mark.parametrize("divergence", ["kl", "metric"])
def test_the_batch_size_changes_nothing(divergence: Any) -> None:
    case = Case(Recipe(depth=2, heads=2, registers=1), n_pairs=4, groups="per-image")
    tau = threshold(case, divergence, 0.02)
    circuits = [
        cv.acdc(case.model, case.task(), tau, divergence=divergence, batch_size=size, progress=False)
        for size in (1, 3, 4)
    ]
    assert circuits[0] == circuits[1] == circuits[2]
    assert 0 < len(circuits[0]) < circuits[0].graph.n_edges


@pytest.mark.parametrize("ablation", ["noise", "resample"])
def test_random_ablations_use_the_references_of_their_seed(ablation: str) -> None:
    """Resampling only exchanges images: the mean of the metric stays the same, the divergence does not."""
    case = Case(Recipe(depth=2, heads=1), n_pairs=3)
    task = case.task(ablation=ablation)
    (run,) = batch_runs(task.prepare(case.model), 3)
    reference = by_sender(case.model.graph.senders, run.sources.reference_outputs())
    tau = threshold(case, "kl", 0.02)
    kept = literal_acdc.acdc(case.literal, case.clean, reference, tau, literal_acdc.kl)
    expected = literal_acdc.pruned(case.literal, kept, deaf_is_inert=ablation == "resample")
    assert set(cv.acdc(case.model, task, tau, batch_size=2, progress=False)) == expected


def test_the_circuit_knows_how_it_was_found() -> None:
    case = Case(Recipe(depth=1))
    provenance = cv.acdc(case.model, case.task(), 0.05, divergence="metric", progress=False).provenance
    assert provenance.method == "acdc"
    assert provenance.parameters == {"tau": 0.05, "divergence": "metric"}
    assert provenance.weights == case.model.weights_hash


# -- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_a_threshold_is_positive(tau: float) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="tau must be a positive number"):
        cv.acdc(case.model, case.task(), tau)


def test_an_unknown_divergence_is_refused() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="'kl' or 'metric'"):
        cv.acdc(case.model, case.task(), 0.1, divergence="js")


def test_the_denoising_direction_is_refused() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match="direction='noising'"):
        cv.acdc(case.model, case.task(direction="denoising"), 0.1)


@pytest.mark.parametrize("divergence", ["kl", "metric"])
def test_equal_clean_and_corrupt_images_are_refused(divergence: Any) -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(DataError, match=r"nothing to explain.*images"):
        cv.acdc(case.model, cv.Task(case.clean, case.clean, cv.logit_diff(0, 1)), 0.1, divergence=divergence)


def test_a_metric_that_nothing_changes_is_refused() -> None:
    case = Case(Recipe(depth=1))
    task = case.task(metric=lambda logits: torch.ones_like(logits[:, 0]))
    with pytest.raises(DataError, match=r"nothing to explain.*metric"):
        cv.acdc(case.model, task, 0.1, divergence="metric")
