"""Fidelity: figures on a sample, intervals that cover, and the file that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import circuitvit as cv
from circuitvit.attribution import calibration
from circuitvit.attribution.calibration import draw_strata
from circuitvit.errors import FileError, OptionError
from circuitvit.graph.eap_ig import transformer_graph
from tests.strategies import Case, Recipe

CASE = Case(Recipe(depth=3, heads=3), n_pairs=1)


def scored(method: str = "local") -> cv.EdgeScores:
    return cv.attribute(CASE.model, CASE.task(), method, progress=False)


def calibrated(scores: cv.EdgeScores, n: int, **options: float) -> cv.Fidelity:
    found = cv.calibrate(CASE.model, CASE.task(), scores, n, progress=False, **options).fidelity
    assert found is not None
    return found


# -- figures -----------------------------------------------------------------------------------------


@given(st.integers(0, 2**16), st.integers(5, 60))
def test_with_equal_weights_the_figures_are_the_plain_ones(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    scores, effects, ones = rng.standard_normal(n), rng.standard_normal(n), np.ones(n)
    assert calibration.pearson(scores, effects, ones) == pytest.approx(stats.pearsonr(scores, effects)[0])
    assert calibration.spearman(scores, effects, ones) == pytest.approx(
        stats.spearmanr(abs(scores), abs(effects))[0]
    )
    tops = [set(np.argsort(-abs(values))[:4]) for values in (scores, effects)]
    assert calibration.top_precision(scores, effects, ones, 4) == pytest.approx(len(tops[0] & tops[1]) / 4)
    assert calibration.sign_agreement(scores, effects, ones) == np.mean(scores * effects > 0)


@given(st.integers(0, 2**16))
def test_a_weight_of_three_counts_like_three_equal_edges(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, effects = rng.standard_normal(20), rng.standard_normal(20)
    weights = rng.integers(1, 4, 20)
    thrice = np.repeat(scores, weights), np.repeat(effects, weights), np.ones(weights.sum())
    for figure in (calibration.pearson, calibration.spearman, calibration.sign_agreement):
        assert figure(scores, effects, weights.astype(float)) == pytest.approx(figure(*thrice))


def test_correlation_with_what_is_all_alike_is_unknown() -> None:
    assert calibration.pearson(np.arange(3.0), np.ones(3), np.ones(3)) is None


def test_measuring_every_edge_gives_the_plain_figures_and_intervals_of_no_width() -> None:
    local, exact = scored(), scored("exact")
    found, mask = calibrated(local, 10_000), exact.graph.edge_mask
    assert found.n_measured == found.n_edges == exact.graph.n_edges
    assert found.pearson == pytest.approx(np.corrcoef(local.values[mask], exact.values[mask])[0, 1])
    assert found.low == pytest.approx(exact.values, abs=1e-12)
    assert (found.high == found.low).all()


@pytest.mark.parametrize("method", ["exact", "auto"])
def test_scores_that_are_effects_are_right_in_everything(method: str) -> None:
    found = calibrated(scored(method), 30)
    assert (found.pearson, found.spearman) == (pytest.approx(1), pytest.approx(1))
    assert found.top_precision == found.sign_agreement == 1
    assert set(found.layer_errors.values()) == {0.0}
    assert "all" in found.sentence


# -- the sample --------------------------------------------------------------------------------------


@given(st.integers(30, 400), st.integers(0, 2**16))
def test_strata_cut_the_edges_up_and_are_drawn_from_evenly(n: int, seed: int) -> None:
    graph = transformer_graph(n_layers=4, n_heads=4, d_model=8)
    values = np.random.default_rng(seed).standard_t(2, graph.shape)
    scores = cv.EdgeScores(graph, values)
    strata = draw_strata(scores, np.arange(graph.n_edges), n, seed)
    together = np.concatenate([stratum.edges for stratum in strata])
    assert np.array_equal(np.sort(together), np.arange(graph.n_edges))
    assert sum(len(stratum.drawn) for stratum in strata) == min(n, graph.n_edges)
    for stratum in strata:
        assert set(stratum.drawn) <= set(stratum.edges)
        assert len(stratum.drawn) >= min(len(stratum.edges), 20) or n >= graph.n_edges or stratum is strata[0]
    sizes = np.abs(scores.values[graph.edge_mask])
    strongest, others = strata[0], np.setdiff1d(together, strata[0].edges)
    assert not len(others) or sizes[strongest.edges].min() >= sizes[others].max()


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_cover_as_often_as_they_say(level: float) -> None:
    """Over many draws, of the edges that were not measured; 5 standard errors below would be a fault."""
    exact, local = scored("exact"), scored("eap")
    mask, shares = exact.graph.edge_mask, []
    for seed in range(25):
        found = calibrated(local, 50, level=level, seed=seed)
        fresh = mask & (found.low < found.high)
        shares.append(float(np.mean((found.low <= exact.values) & (exact.values <= found.high), where=fresh)))
    assert np.mean(shares) >= level - 5 * np.std(shares) / 5


def test_the_same_seed_draws_the_same_edges() -> None:
    scores = scored()
    assert calibrated(scores, 40, seed=3).summary() == calibrated(scores, 40, seed=3).summary()
    assert calibrated(scores, 40, seed=3).summary() != calibrated(scores, 40, seed=4).summary()


# -- keeping it ----------------------------------------------------------------------------------------


def test_files_and_circuits_carry_the_fidelity(tmp_path: Path) -> None:
    scores = cv.calibrate(CASE.model, CASE.task(), scored(), 40, progress=False)
    again = cv.EdgeScores.load(scores.save(tmp_path / "scores.json"), scores.graph)
    assert again.fidelity is not None
    assert scores.fidelity is not None
    assert again.fidelity.summary() == scores.fidelity.summary()
    assert again.interval("input->m0") == scores.interval("input->m0")
    circuit = again.top(10)
    assert circuit.provenance.parameters["fidelity"]["pearson"] == scores.fidelity.pearson
    report = cv.verify(CASE.model, CASE.task(), circuit, n_random=2, progress=False)
    assert any("chosen by scores (local). Held against" in text for text in report.warnings)


def test_measured_edges_survive_the_file(tmp_path: Path) -> None:
    scores = cv.attribute(CASE.model, CASE.task(), "hybrid", budget=40, progress=False)
    again = cv.EdgeScores.load(scores.save(tmp_path / "scores.json"))
    assert scores.measured is not None
    assert again.measured is not None
    assert 0 < scores.measured.sum() < scores.graph.n_edges
    assert np.array_equal(again.measured, scores.measured)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"pearson": "high"}, "pearson"),
        ({"sign_agreement": 3.0}, "sign_agreement"),
        ({"intervals": {}}, "no interval"),
        ({"intervals": {"input->m0": [1.0]}}, "intervals"),
        ({"layer_errors": {"first": 1.0}}, "layer_errors"),
    ],
)
def test_a_file_whose_fidelity_makes_no_sense_is_refused(
    tmp_path: Path, change: dict[str, object], complaint: str
) -> None:
    path = cv.calibrate(CASE.model, CASE.task(), scored(), 40, progress=False).save(tmp_path / "scores.json")
    content = json.loads(path.read_text())
    content["fidelity"] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=complaint):
        cv.EdgeScores.load(path)


def test_what_cannot_be_calibrated_is_refused() -> None:
    scores = scored()
    with pytest.raises(OptionError, match="at least 30"):
        calibrated(scores, 10)
    with pytest.raises(OptionError, match="level"):
        calibrated(scores, 40, level=0.99)
    with pytest.raises(OptionError, match="a seed must be at least 0"):
        calibrated(scores, 40, seed=-1)
    with pytest.raises(OptionError, match="a seed must be at least 0"):
        cv.attribute(CASE.model, CASE.task(), "random", seed=-1, progress=False)
    with pytest.raises(OptionError, match="belongs to another graph"):
        cv.calibrate(CASE.model, CASE.task(groups="kind"), scores, progress=False)
    with pytest.raises(OptionError, match=r"circuitvit\.calibrate"):
        scores.interval("input->m0")
