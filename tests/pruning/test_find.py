"""Learned masks, refinement and `find`, on models whose answer is known or can be had by brute force."""

from __future__ import annotations

import contextlib
import itertools
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.attribution.budget import seconds
from circuitvit.engine import Evaluator, Saved
from circuitvit.errors import DataError, OptionError
from circuitvit.graph.liveness import live_edges
from circuitvit.models.timm_import import import_timm
from circuitvit.pruning import anytime
from circuitvit.pruning.find import taken_up
from circuitvit.pruning.learned import MaskTrainer

PLAN = cv.Plan(steps=30, trim_runs=500, batch_size=2)


def small_module(seed: int = 0) -> torch.nn.Module:
    """A random ViT of two layers whose heads and MLPs all matter a little."""
    timm = import_timm()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2, num_classes=3
        )
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return module.eval()


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(4, 1), images(4, 2), metric=cv.logit_diff(0, 1))


@pytest.fixture(scope="module")
def finding(model: cv.Model, task: cv.Task) -> cv.Finding:
    return cv.find(model, task, plan=PLAN, progress=False)


class TestKnownAnswer:
    """A model whose heads and MLPs write nothing decides by the edge from the input to the logits alone."""

    @pytest.fixture
    def silent(self) -> cv.Model:
        module = small_module()
        for block in module.blocks:
            for layer in (block.attn.proj, block.mlp.fc2):
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)
        # class tokens would see nothing of the image, so the readout averages the patches
        module.global_pool = "avg"
        return cv.wrap(module)

    def test_find_keeps_that_edge_only(self, silent: cv.Model, task: cv.Task) -> None:
        finding = cv.find(silent, task, plan=PLAN, progress=False)
        assert list(finding.circuit) == ["input->logits"]
        assert finding.faithfulness == pytest.approx(1, abs=1e-5)
        assert finding.minimal

    def test_refine_repairs_an_empty_circuit(self, silent: cv.Model, task: cv.Task) -> None:
        refined = cv.refine(silent, task, cv.Circuit.empty(silent.graph), progress=False)
        assert list(refined.circuit) == ["input->logits"]

    def test_refine_says_where_it_did_not_reach_the_band(
        self, silent: cv.Model, task: cv.Task, capfd: pytest.CaptureFixture[str]
    ) -> None:
        refined = cv.refine(silent, task, cv.Circuit.empty(silent.graph), candidates=0)
        said = capfd.readouterr().err
        assert "outside of 0.9 to 1.1: its faithfulness is 0.000" in said
        assert "none of the edges tried" in said
        assert not refined.minimal


class TestFind:
    def test_faithful_on_its_own_pairs(self, model: cv.Model, task: cv.Task, finding: cv.Finding) -> None:
        assert 0.9 <= finding.faithfulness <= 1.1
        ends = [
            cv.run(model, task, each)
            for each in (cv.Circuit.full(model.graph), cv.Circuit.empty(model.graph))
        ]
        whole, nothing, found = (
            float((logits[:, 0] - logits[:, 1]).mean())
            for logits in (*ends, cv.run(model, task, finding.circuit))
        )
        assert finding.faithfulness == pytest.approx((found - nothing) / (whole - nothing), abs=1e-4)

    def test_no_single_edge_can_go(self, model: cv.Model, task: cv.Task, finding: cv.Finding) -> None:
        assert finding.minimal
        again = Evaluator(task.prepare(model))
        for place in np.argwhere(finding.circuit.kept):
            smaller = finding.circuit.kept.copy()
            smaller[tuple(place)] = False
            assert not 0.95 <= again.faithfulness(live_edges(model.graph, smaller)) <= 1.05

    def test_the_same_plan_gives_the_same_circuit(
        self, model: cv.Model, task: cv.Task, finding: cv.Finding
    ) -> None:
        assert cv.find(model, task, plan=finding.plan, progress=False).circuit == finding.circuit

    def test_the_circuit_says_how_it_was_found(self, model: cv.Model, finding: cv.Finding) -> None:
        provenance = finding.circuit.provenance
        assert provenance.method == "find"
        assert provenance.weights == model.weights_hash
        assert provenance.parameters["steps"] == PLAN.steps
        assert f"{len(finding.circuit)} of {model.graph.n_edges}" in finding.summary

    def test_candidates_fall_in_size_from_the_whole_model(self, model: cv.Model, finding: cv.Finding) -> None:
        sizes = [candidate.size for candidate in finding.candidates]
        assert sizes[0] == model.graph.n_edges
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-1] < sizes[0]

    @pytest.mark.parametrize("plan", [cv.Plan(30, 100, 2), cv.Plan(0, 30, 2)], ids=["thin", "whole"])
    def test_no_circuit_is_run_twice(
        self, model: cv.Model, task: cv.Task, plan: cv.Plan, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """But for those near an end of the band, which are run once beside others and once alone."""
        asked: list[tuple[bytes, bool]] = []
        original = Evaluator._run

        def counted(self: Evaluator, masks: Any, alone: Any) -> Any:
            asked.extend((mask.tobytes(), len(masks) == 1) for mask in masks)
            return original(self, masks, alone)

        monkeypatch.setattr(Evaluator, "_run", counted)
        cv.find(model, task, plan=plan, progress=False)
        assert len(asked) > 20
        assert len(asked) == len(set(asked))

    @pytest.mark.parametrize("faithfulness", [0, 1, 1.5, float("nan")])
    def test_impossible_faithfulness_is_refused(
        self, model: cv.Model, task: cv.Task, faithfulness: float
    ) -> None:
        with pytest.raises(OptionError, match="between 0 and 1"):
            cv.find(model, task, faithfulness=faithfulness)

    def test_nothing_to_explain_is_refused(self, model: cv.Model) -> None:
        same = images(2, 1)
        with pytest.raises(DataError, match="nothing for a circuit to explain"):
            cv.find(model, cv.Task(same, same, metric=cv.logit_diff(0, 1)))

    def test_denoising_is_refused(self, model: cv.Model, task: cv.Task) -> None:
        with pytest.raises(OptionError, match="noising"):
            cv.find(model, task.with_options(direction="denoising"), plan=PLAN)


class TestMask:
    def test_density_comes_down_to_the_target(self, model: cv.Model, task: cv.Task) -> None:
        learned = cv.learn_mask(model, task, 20, cv.MaskSettings(steps=300, batch_size=4), progress=False)
        assert learned.trace.density[0] > 0.95
        assert learned.trace.density[-1] * model.graph.n_edges < 30
        assert 5 <= len(learned.circuit) <= 30

    def test_gates_of_what_is_no_edge_stay_shut(self, model: cv.Model, task: cv.Task) -> None:
        trainer = MaskTrainer(task.prepare(model), 20, cv.MaskSettings())
        trainer.step()
        assert np.isneginf(trainer.openness()[~model.graph.edge_mask]).all()
        assert np.array_equal(trainer.open_edges(), model.graph.edge_mask)

    def test_works_with_token_groups(self, model: cv.Model, task: cv.Task) -> None:
        learned = cv.learn_mask(
            model, task.with_options(groups="kind"), 30, cv.MaskSettings(steps=60), progress=False
        )
        assert learned.circuit.graph.groups == ("cls", "patch")

    @pytest.mark.parametrize("edges", [0, 10_000])
    def test_impossible_sizes_are_refused(self, model: cv.Model, task: cv.Task, edges: int) -> None:
        with pytest.raises(OptionError, match=r"edges of a graph|edges must be at least 1"):
            cv.learn_mask(model, task, edges)

    @pytest.mark.parametrize("name", ["steps", "learning_rate", "batch_size"])
    def test_senseless_settings_are_refused(self, name: str) -> None:
        with pytest.raises(OptionError, match=name):
            cv.MaskSettings(**{name: 0})


class TestRefine:
    def test_stops_at_its_budget_and_says_so(self, model: cv.Model, task: cv.Task) -> None:
        refined = cv.refine(model, task, cv.Circuit.full(model.graph), max_runs=3, progress=False)
        assert not refined.minimal
        assert refined.runs <= 4

    def test_an_empty_band_is_refused(self, model: cv.Model, task: cv.Task) -> None:
        with pytest.raises(OptionError, match="band"):
            cv.refine(model, task, cv.Circuit.full(model.graph), band=(1.1, 0.9))


class TestSeconds:
    @pytest.mark.parametrize(("text", "expected"), [("90s", 90), ("2m", 120), ("1.5h", 5400), (30, 30)])
    def test_durations(self, text: str | float, expected: float) -> None:
        assert seconds(text) == expected

    @pytest.mark.parametrize("text", ["", "soon", "-3s", "0s", "5 days"])
    def test_other_text_is_refused(self, text: str) -> None:
        with pytest.raises(OptionError, match="duration"):
            seconds(text)


class TestFromTheWhole:
    """Nothing is learned: the whole model is trimmed, edges of small exact effect first."""

    @pytest.fixture(scope="class")
    @staticmethod
    def whole(model: cv.Model, task: cv.Task) -> cv.Finding:
        return cv.find(model, task, start="whole", progress=False)

    def test_as_trimming_the_whole_by_exact_effects(
        self, model: cv.Model, task: cv.Task, whole: cv.Finding
    ) -> None:
        scores = cv.attribute(model, task, "exact", progress=False)
        full = cv.Circuit.full(model.graph).with_scores(scores)
        assert whole.circuit == cv.refine(model, task, full, band=(0.95, 1.05), progress=False).circuit
        assert whole.minimal
        assert 0.95 <= whole.faithfulness <= 1.05

    def test_every_seed_gives_the_same_circuit(
        self, model: cv.Model, task: cv.Task, whole: cv.Finding
    ) -> None:
        for seed in (1, 2):
            again = cv.find(model, task, start="whole", seed=seed, progress=False)
            assert again.circuit == whole.circuit

    def test_its_plan_repeats_it(self, model: cv.Model, task: cv.Task, whole: cv.Finding) -> None:
        assert whole.plan.steps == 0
        assert cv.find(model, task, plan=whole.plan, progress=False).circuit == whole.circuit
        assert "The whole model was trimmed on 4 pairs" in whole.summary

    def test_there_are_two_starts(self, model: cv.Model, task: cv.Task) -> None:
        with pytest.raises(OptionError, match="'thin' or from the 'whole' model, not 'half'"):
            cv.find(model, task, start="half", progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", ["thin", "whole"])
def test_a_time_that_is_too_short_is_told(model: cv.Model, task: cv.Task, start: Any) -> None:
    short = cv.find(model, task, within=0.001, start=start, progress=False)
    assert "A search takes at least some" in short.summary
    assert "and 0.001 s were given" in short.summary
    assert "the time was over, so some edges may still be dropped" in short.summary
    assert len(short.circuit) == model.graph.n_edges
    again = cv.find(model, task, plan=short.plan, progress=False)
    assert again.circuit == short.circuit
    assert "trimming ran out of its runs" in again.summary


def test_the_clock_ends_a_search_with_what_its_plan_repeats(
    model: cv.Model, task: cv.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that goes a second on each time that it is read."""
    for given in (20, 60, 150):
        ticks = itertools.count()
        monkeypatch.setattr(anytime.time, "monotonic", lambda ticks=ticks: float(next(ticks)))
        ended = cv.find(model, task, within=given, start="thin", progress=False)
        assert next(ticks) <= given + 10
        monkeypatch.undo()
        assert "the time was over" in ended.summary
        again = cv.find(model, task, plan=ended.plan, progress=False)
        assert again.circuit == ended.circuit
        assert again.plan == ended.plan


def test_the_time_before_an_interruption_counts_but_is_no_single_step(model: cv.Model, task: cv.Task) -> None:
    """The longest step so far is kept free at the end."""
    evaluator = Evaluator(task.prepare(model))
    evaluator.check_effect(level=0)
    for gone, is_over in ((80.0, False), (101.0, True)):
        clock = anytime.Clock(evaluator, 100.0, time.monotonic())
        saved = Saved(evaluator.table(), {"plan": asdict(PLAN), "gone": gone})
        assert taken_up(saved, evaluator, clock) == PLAN
        with pytest.raises(anytime.TimeIsUp) if is_over else contextlib.nullcontext():
            clock.check()


def test_where_the_time_is_enough_no_floor_is_told(finding: cv.Finding) -> None:
    assert "A search takes at least" not in finding.summary
