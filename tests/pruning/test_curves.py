"""Curves of faithfulness against size: sizes after pruning, areas computed by hand, k*."""

from __future__ import annotations

import pytest
import torch

import circuitvit as cv
from circuitvit.errors import OptionError
from circuitvit.pruning.curves import Curve, Point, circuit_curve, score_curve
from tests.pruning.test_find import images, small_module


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(3, 1), images(3, 2), metric=cv.logit_diff(0, 1))


def curve(*points: tuple[float, float]) -> Curve:
    return Curve("by hand", tuple(Point(x, round(100 * x), f) for x, f in points), 100)


class TestNumbers:
    def test_areas_are_trapezoids_over_shares_of_edges(self) -> None:
        line = curve((0.1, 0.0), (0.5, 0.5), (1.0, 1.0))
        assert line.cpr == pytest.approx(0.4 * 0.25 + 0.5 * 0.75)
        assert line.cmd == pytest.approx(0.4 * 0.75 + 0.5 * 0.25)

    def test_overshooting_counts_for_cpr_and_against_cmd(self) -> None:
        line = curve((0.5, 1.4), (1.0, 1.0))
        assert line.cpr == pytest.approx(0.5 * 1.2)
        assert line.cmd == pytest.approx(0.5 * 0.2)

    def test_log_cmd_is_a_mean_over_orders_of_magnitude(self) -> None:
        assert curve((0.01, 0.5), (0.1, 0.5), (1.0, 0.5)).log_cmd == pytest.approx(0.5)
        assert curve((0.01, 0.0), (0.1, 1.0), (1.0, 1.0)).log_cmd == pytest.approx(0.25)

    def test_k_star_is_where_the_curve_enters_the_band_for_good(self) -> None:
        assert curve((0.1, 0.95), (0.2, 0.5), (0.5, 0.92), (1.0, 1.0)).k_star() == 50
        assert curve((0.1, 0.95), (1.0, 0.5)).k_star() is None


class TestCurves:
    def test_scores_give_the_largest_live_circuit_of_each_size(self, model: cv.Model, task: cv.Task) -> None:
        scores = cv.attribute(model, task, progress=False)
        line = score_curve(model, task, scores, fractions=(0.1, 0.3, 1.0), progress=False)
        for point in line.points:
            assert point.size <= round(point.fraction * model.graph.n_edges)
            sizes = [len(scores.top(k)) for k in range(model.graph.n_edges + 1)]
            assert point.size == max(
                size for size in sizes if size <= round(point.fraction * model.graph.n_edges)
            )
        assert line.points[-1].faithfulness == pytest.approx(1, abs=1e-4)

    def test_each_point_is_the_faithfulness_of_its_circuit(self, model: cv.Model, task: cv.Task) -> None:
        scores = cv.attribute(model, task, progress=False)
        line = score_curve(model, task, scores, connected=True, fractions=(0.4,), progress=False)
        circuits = (cv.Circuit.full(model.graph), cv.Circuit.empty(model.graph), scores.connected(18))
        runs = [cv.run(model, task, circuit) for circuit in circuits]
        whole, nothing, found = (float((logits[:, 0] - logits[:, 1]).mean()) for logits in runs)
        assert line.points[0].size == len(circuits[2])
        assert line.points[0].faithfulness == pytest.approx((found - nothing) / (whole - nothing), abs=1e-3)

    def test_a_family_gives_at_each_size_the_largest_that_fits(self, model: cv.Model, task: cv.Task) -> None:
        scores = cv.attribute(model, task, progress=False)
        family = [scores.connected(k) for k in (5, 20, 40)]
        line = circuit_curve(
            model, task, family, "connected", fractions=(0.001, 0.5, 0.9, 1.0), progress=False
        )
        assert [point.size for point in line.points] == [0, *map(len, family[1:]), model.graph.n_edges]

    @pytest.mark.parametrize("fractions", [(), (0.0,), (1.5,)])
    def test_impossible_sizes_are_refused(
        self, model: cv.Model, task: cv.Task, fractions: tuple[float]
    ) -> None:
        with pytest.raises(OptionError, match="shares of all edges"):
            circuit_curve(model, task, [], "none", fractions=fractions)


class TestConstants:
    def test_learned_constants_harm_less_than_means(self, model: cv.Model, task: cv.Task) -> None:
        empty = cv.Circuit.empty(model.graph)
        constants = cv.learn_constants(model, task, empty, steps=60, learning_rate=0.05, progress=False)
        clean = torch.log_softmax(model(images(3, 1)), dim=-1)

        def harm(ablation: object) -> float:
            logits = torch.log_softmax(cv.run(model, task.with_options(ablation=ablation), empty), dim=-1)
            return float((clean.exp() * (clean - logits)).sum(dim=-1).mean())

        assert harm(constants) < 0.8 * harm("mean-tokens")

    def test_saved_and_loaded(self, model: cv.Model, task: cv.Task, tmp_path: object) -> None:
        values = torch.randn(len(model.graph.senders), 1, model.d_model)
        path = cv.Constants(values).save(f"{tmp_path}/constants.safetensors")
        assert torch.equal(cv.Constants.load(path).values, values)
        run = cv.run(model, task.with_options(ablation=cv.Constants.load(path)), cv.Circuit.full(model.graph))
        assert torch.allclose(run, model(images(3, 1)), atol=1e-4)

    def test_misfits_are_refused(self, model: cv.Model, task: cv.Task, tmp_path: object) -> None:
        with pytest.raises(cv.CircuitViTError, match="finite numbers of shape"):
            cv.Constants(torch.zeros(3))
        with pytest.raises(cv.CircuitViTError, match="of width 5"):
            cv.run(
                model,
                task.with_options(ablation=cv.Constants(torch.zeros(7, 1, 5))),
                cv.Circuit.full(model.graph),
            )
        with pytest.raises(cv.CircuitViTError, match="cannot read"):
            cv.Constants.load(f"{tmp_path}/missing.safetensors")
