"""Curves of several methods: each as if it stood alone, on pairs that no circuit has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, FileError, NameNotFoundError, OptionError
from circuitvit.export.difference import difference_of
from circuitvit.pruning.curves import FAMILIES, Curve, method_names
from circuitvit.pruning.learned import LearnedMask, Trace
from circuitvit.tasks import split
from circuitvit.views.comparison import Comparison, compare
from tests.pruning.test_find import images, small_module

SIZES = (0.05, 0.2, 0.5, 1.0)
SETTINGS = cv.FamilySettings(
    fractions=SIZES, mask=cv.MaskSettings(steps=60, batch_size=4), trained=(0.2, 0.5), progress=False
)


@pytest.fixture(scope="module")
def model() -> cv.Model:
    return cv.wrap(small_module())


@pytest.fixture(scope="module")
def task() -> cv.Task:
    return cv.Task(images(6, 1), images(6, 2), metric=cv.logit_diff(0, 1))


@pytest.fixture(scope="module")
def comparison(model: cv.Model, task: cv.Task) -> Comparison:
    return compare(model, task, method_names(), held_out=0.34, settings=SETTINGS)


def same(first: Curve, second: Curve) -> None:
    assert [(point.fraction, point.size) for point in first.points] == [
        (point.fraction, point.size) for point in second.points
    ]
    for one, other in zip(first.points, second.points, strict=True):
        assert one.faithfulness == pytest.approx(other.faithfulness, abs=1e-4)


@pytest.mark.parametrize("method", cv.METHODS)
def test_scores_of_discovery_pairs_are_judged_on_the_others(
    comparison: Comparison, model: cv.Model, task: cv.Task, method: str
) -> None:
    discovery, held_out = split(model, task, 0.34)
    scores = cv.attribute(model, discovery, method, progress=False)
    alone = cv.score_curve(model, held_out, scores, connected=True, fractions=SIZES, progress=False)
    same(comparison[method], alone)


def test_a_mask_is_trained_for_every_size(comparison: Comparison, model: cv.Model, task: cv.Task) -> None:
    discovery, held_out = split(model, task, 0.34)
    edges = [round(share * model.graph.n_edges) for share in (0.2, 0.5)]
    masks = [cv.learn_mask(model, discovery, size, SETTINGS.mask, progress=False) for size in edges]
    evaluator = Evaluator(held_out)
    points = {point.fraction: point for point in comparison["learned"].points}
    for share, size, mask in zip((0.2, 0.5), edges, masks, strict=True):
        assert points[share].size <= size
        if len(mask.circuit) <= size:
            assert points[share].size == len(mask.circuit)
            assert points[share].faithfulness == pytest.approx(evaluator.faithfulness(mask.circuit), abs=1e-4)
    assert points[0.05].size == 0
    assert points[1.0].faithfulness == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method", FAMILIES)
def test_no_family_gives_more_edges_than_asked_for(comparison: Comparison, method: str) -> None:
    curve = comparison[method]
    assert all(point.size <= round(point.fraction * curve.n_edges) for point in curve.points)


def test_a_mask_with_too_many_edges_keeps_its_most_open_ones(model: cv.Model) -> None:
    graph = model.graph
    openness = np.arange(float(np.prod(graph.shape))).reshape(graph.shape)
    mask = LearnedMask(cv.Circuit.full(graph), openness, Trace())
    assert mask.at_most(graph.n_edges) == mask.circuit
    for size in (1, 10, 40):
        lowest = np.sort(openness[graph.edge_mask])[-size]
        expected = cv.Circuit(graph, graph.edge_mask & (openness >= lowest))
        assert len(expected) == size
        assert mask.at_most(size) == expected.pruned()


def test_without_held_out_pairs_circuits_are_judged_where_they_were_made(
    model: cv.Model, task: cv.Task
) -> None:
    found = compare(model, task, ["eap"], settings=SETTINGS)
    assert not found.held_out
    scores = cv.attribute(model, task, "eap", progress=False)
    same(found["eap"], cv.score_curve(model, task, scores, connected=True, fractions=SIZES, progress=False))


def test_what_is_there_is_handed_over_after_each_method(model: cv.Model, task: cv.Task) -> None:
    seen: list[list[str]] = []

    def stop(found: Comparison) -> None:
        seen.append([each.method for each in found.curves])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(model, task, ["eap", "exact", "learned"], settings=SETTINGS, after_each=stop)
    assert seen == [["eap"], ["eap", "exact"]]


class TestFiles:
    def test_a_saved_comparison_is_gone_on_with(
        self, model: cv.Model, task: cv.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = compare(model, task, ["eap"], settings=SETTINGS)
        known = Comparison.load(first.save(tmp_path / "comparison.json"))
        assert known == first
        monkeypatch.setattr("circuitvit.views.comparison.family_curve", _only("exact"))
        both = compare(model, task, ["exact", "eap"], settings=SETTINGS, known=known)
        assert [each.method for each in both.curves] == ["exact", "eap"]
        assert both["eap"] == first["eap"]

    def test_curves_of_something_else_are_refused(self, model: cv.Model, task: cv.Task) -> None:
        known = compare(model, task, ["eap"], settings=SETTINGS)
        others = cv.Task(images(6, 1), images(6, 3), metric=cv.logit_diff(0, 1))
        different: list[tuple[cv.Task, dict[str, object]]] = [
            (others, {}),
            (task, {"held_out": 0.34}),
            (task, {"seed": 1}),
            (task.with_options(groups="kind"), {}),
            (task.with_options(ablation=cv.Noise(seed=1)), {}),
            (task.with_options(metric=lambda logits: logits[..., 0]), {}),
        ]
        for changed, options in different:
            with pytest.raises(OptionError, match="another model, another task"):
                compare(model, changed, ["eap"], settings=SETTINGS, known=known, **options)  # type: ignore[arg-type]

    def test_curves_of_noise_of_another_seed_are_refused(self, model: cv.Model, task: cv.Task) -> None:
        one, other = (task.with_options(ablation=cv.Noise(seed=seed)) for seed in (1, 2))
        known = compare(model, one, ["eap"], settings=SETTINGS)
        with pytest.raises(OptionError, match="another model, another task"):
            compare(model, other, ["eap"], settings=SETTINGS, known=known)

    def test_figures_stand_beside_the_points(self, comparison: Comparison, tmp_path: Path) -> None:
        content = json.loads(comparison.save(tmp_path / "comparison.json").read_text())
        assert next(iter(content)) == "schema"
        for written, each in zip(content["curves"], comparison.curves, strict=True):
            assert written["figures"]["cpr"] == each.curve.cpr
            assert written["figures"]["k_star"] == each.curve.k_star()

    def test_the_table_has_a_row_for_each_method(self, comparison: Comparison) -> None:
        text = comparison.to_markdown()
        for each in comparison.curves:
            assert f"| {each.method} | {each.curve.cpr:.3f} | {each.curve.cmd:.3f} |" in text

    def test_the_plot_names_every_method(self, comparison: Comparison, tmp_path: Path) -> None:
        svg = comparison.save(tmp_path / "comparison.svg").read_text()
        assert all(f">{each.method}<" in svg for each in comparison.curves)
        assert comparison.save(tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")

    def test_other_endings_and_other_files_are_refused(self, comparison: Comparison, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match=r"saved as \.json, \.csv"):
            comparison.save(tmp_path / "comparison.txt")
        (tmp_path / "other.json").write_text('{"schema": "circuitvit.report/1"}')
        with pytest.raises(FileError, match=r"holds a 'Report' .* not a 'Comparison'"):
            Comparison.load(tmp_path / "other.json")
        broken = comparison.to_dict()
        broken["curves"][0]["curve"]["points"][0].pop("size")
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(FileError, match=r"curves/0/curve/points/0: 'size' is a required"):
            Comparison.load(tmp_path / "broken.json")


class TestOtherModels:
    """A circuit found on one model runs on another of the same shape: comparisons of the two say so."""

    def circuit(self, model: cv.Model, task: cv.Task) -> cv.Circuit:
        return cv.attribute(model, task, progress=False).top(5)

    @pytest.fixture
    def other(self) -> cv.Model:
        module = small_module()
        with torch.no_grad():
            module.blocks[0].mlp.fc1.weight.mul_(1.5)
        return cv.wrap(module)

    def test_a_difference_and_an_assertion_name_them(
        self, model: cv.Model, task: cv.Task, other: cv.Model
    ) -> None:
        first, second = self.circuit(model, task), self.circuit(other, task)
        words = f"different weights of '{model.name}'"
        assert words in difference_of(first, second).counts
        larger = cv.Circuit.full(model.graph).with_provenance(second.provenance)
        with pytest.raises(AssertionError, match=words):
            cv.testing.assert_unchanged(first, larger)
        named = cv.wrap(small_module(), name="another")
        assert difference_of(first, self.circuit(named, task)).counts == difference_of(first, first).counts

    def test_circuits_of_one_model_say_nothing(self, model: cv.Model, task: cv.Task) -> None:
        first = self.circuit(model, task)
        assert "different" not in difference_of(first, first).counts
        assert "different" not in difference_of(first, cv.Circuit.full(model.graph)).counts

    def test_curves_of_another_model_are_refused_by_name(
        self, model: cv.Model, task: cv.Task, other: cv.Model
    ) -> None:
        known = compare(model, task, ["eap"], settings=SETTINGS)
        with pytest.raises(OptionError, match=f"different weights of '{model.name}'"):
            compare(other, task, ["eap"], settings=SETTINGS, known=known)


def test_mistakes_are_found_before_anything_runs(model: cv.Model, task: cv.Task) -> None:
    with pytest.raises(NameNotFoundError, match="learned"):
        compare(model, task, ["eap", "lerned"], settings=SETTINGS)
    with pytest.raises(OptionError, match="shares of all edges"):
        cv.FamilySettings(fractions=(0.1, 2.0))
    with pytest.raises(OptionError, match="at least two"):
        cv.FamilySettings(fractions=(0.1,))
    with pytest.raises(OptionError, match="shares of all edges"):
        cv.FamilySettings(trained=())
    same_images = cv.Task(images(2, 1), images(2, 1), metric=cv.logit_diff(0, 1))
    with pytest.raises(DataError, match="nothing for a circuit to explain"):
        compare(model, same_images, ["eap"], settings=SETTINGS)


def _only(allowed: str) -> object:
    from circuitvit.pruning.curves import family_curve

    def checked(method: str, *arguments: object) -> Curve:
        assert method == allowed, f"{method} was known"
        return family_curve(method, *arguments)  # type: ignore[arg-type]

    return checked
