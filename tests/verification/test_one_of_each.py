"""One door, one evaluator, one null, whatever is asked; and models without classes or of another origin."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import OptionError
from circuitvit.graph import Provenance
from circuitvit.models.timm_import import import_timm
from circuitvit.models.weights import VERSION
from circuitvit.testing import assert_faithful, assert_hypothesis, assert_minimal, assert_necessary
from circuitvit.verification import (
    AuditSettings,
    Falls,
    Flips,
    Hypothesis,
    Report,
    audit,
    check_hypotheses,
    flip_search,
    patching_map,
    robustness,
    stability,
    verify,
)
from tests.verification.cases import images, some_circuit, tiny_model, tiny_task

CLAIM = Hypothesis("all of it", "* -> logits", Falls(0.0))
QUICK = AuditSettings(n_random=19, n_others=20, n_paths=0, n_bootstrap=200)


@cache
def twin() -> cv.Model:
    """The same module wrapped once more: another model, of the same shape."""
    return cv.wrap(tiny_model().module, name="twin", classes=("cat", "dog", "fox"))


@cache
def featureless() -> tuple[cv.Model, cv.Task]:
    """A model with `num_classes=0`, whose logits are an embedding, and a metric of the task's own."""
    family = import_timm().models.vision_transformer.VisionTransformer
    module = family(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        scale = 1.0 if name.endswith("bias") else 2.0 / tensor.shape[-1] ** 0.5
        tensor.data = torch.randn(tensor.shape, generator=generator) * scale
    model = cv.wrap(module.double().eval(), name="featureless")
    direction = torch.randn(16, generator=generator, dtype=torch.float64)
    first, second = images(6, 1), images(6, 1001)
    along = [model(each.double()) @ direction for each in (first, second)]
    swap = (along[0] < along[1])[:, None, None, None]
    pairs = torch.where(swap, second, first), torch.where(swap, first, second)
    return model, cv.Task(*pairs, metric=lambda features: features @ direction)


# -- one door ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda task: verify(twin(), task, some_circuit(), progress=False),
        lambda task: verify(twin(), tiny_task(), some_circuit(), held_out=task, progress=False),
        lambda task: audit(twin(), task, some_circuit(), settings=QUICK, progress=False),
        lambda task: robustness(twin(), task, some_circuit()),
        lambda task: stability(twin(), task, lambda model, task: some_circuit(), n=1, progress=False),
        lambda task: patching_map(twin(), task, progress=False),
        lambda task: flip_search(twin(), task, progress=False),
        lambda task: CLAIM.test(twin(), task),
        lambda task: check_hypotheses(twin(), task, [Hypothesis("", "*", Falls(0), ablation="zero")]),
        lambda task: assert_faithful(twin(), task, some_circuit()),
        lambda task: assert_necessary(twin(), task, some_circuit()),
        lambda task: assert_minimal(twin(), task, some_circuit()),
        lambda task: assert_hypothesis(twin(), task, CLAIM),
    ],
)
def test_a_task_prepared_for_another_model_is_refused(ask: Any) -> None:
    with pytest.raises(OptionError, match="prepared for tiny, not for this twin"):
        ask(tiny_task().prepare(tiny_model()))


# -- one evaluator -------------------------------------------------------------------------------


@pytest.fixture
def evaluators(monkeypatch: pytest.MonkeyPatch) -> list[Evaluator]:
    """Every evaluator that is made, in order."""
    made: list[Evaluator] = []
    make = Evaluator.__init__

    def noted(self: Evaluator, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        self.options = options  # type: ignore[attr-defined]
        made.append(self)

    monkeypatch.setattr(Evaluator, "__init__", noted)
    return made


def test_verify_its_tests_and_the_baseline_of_robustness_share_their_runs(
    evaluators: list[Evaluator],
) -> None:
    task = tiny_task().prepare(tiny_model())
    report = verify(
        tiny_model(), task, some_circuit(), tests=QUICK, robust=True, memory=2**24, progress=False
    )
    assert [each.prepared is task for each in evaluators].count(True) == 1
    assert {each.options["memory"] for each in evaluators} == {2**24}  # type: ignore[attr-defined]
    # all, none, the circuit, its complement, and 19 random circuits; the rest is too small for any of its own
    assert evaluators[0].runs == 4 + 19
    assert report.robustness is not None
    assert report.robustness.rows[0].faithfulness == report.task.faithfulness


def test_claims_under_the_same_ablation_share_an_evaluator_and_one_is_held_at_a_time(
    evaluators: list[Evaluator],
) -> None:
    folder = images(2, 7)
    claims = [
        Hypothesis("1", "m0", Falls(0.0)),
        Hypothesis("2", "m0", Falls(0.0), ablation="zero"),
        Hypothesis("3", "m1 -> logits", Falls(0.0), ablation="patch"),  # the task's own
        Hypothesis("4", "m0", Falls(0.1), ablation="zero"),
        Hypothesis("5", "m0", Falls(0.1), ablation="mean"),
        Hypothesis("6", "m0", Falls(0.2), ablation="mean"),
        Hypothesis("7", "m0", Falls(0.2), clean=folder, corrupt=folder.flip(0)),
        Hypothesis("8", "m0", Falls(0.3), clean=folder, corrupt=folder.flip(0)),
    ]
    verdicts = check_hypotheses(tiny_model(), tiny_task(), claims, memory=2**24)
    assert [each.claim for each in verdicts] == [each.claim for each in claims]
    assert [each.prepared.ablation.name for each in evaluators] == ["patch", "zero", "mean", "patch", "patch"]
    runs = [each.runs for each in evaluators]
    assert runs[1] == runs[2] == runs[0] - 1  # two claims about one set of edges: the model, and without it
    assert {each.options["memory"] for each in evaluators} == {2**24}  # type: ignore[attr-defined]
    alone = [each.test(tiny_model(), tiny_task()) for each in claims]
    assert [each.effect for each in alone] == [each.effect for each in verdicts]


@pytest.mark.parametrize("room", ["hypotheses", "robustness", "verify"])
def test_an_evaluator_is_let_go_before_the_next_one_runs(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: set[int] = set()
    most: list[int] = []

    class Counted(Evaluator):
        def measure(self, *args: Any) -> Any:
            alive.add(id(self))  # it holds something from now on
            most.append(len(alive))
            return super().measure(*args)

        def __del__(self) -> None:
            alive.discard(id(self))

    for name in ("hypotheses", "robustness", "verify"):
        monkeypatch.setattr(sys.modules[f"circuitvit.verification.{name}"], "Evaluator", Counted)
    model, task, circuit = tiny_model(), tiny_task(), some_circuit()
    if room == "hypotheses":
        claims = [Hypothesis("", "m0", Falls(0.0), ablation=name) for name in ("patch", "zero", "mean")]
        check_hypotheses(model, task, claims)
    elif room == "robustness":
        robustness(model, task, circuit)
    else:
        verify(model, task, circuit, held_out=tiny_task(5, seed=9), tests=QUICK, robust=True, progress=False)
    assert set(most) == {1}


# -- one null ------------------------------------------------------------------------------------


def test_there_is_one_p_value_against_chance() -> None:
    report = verify(tiny_model(), tiny_task(), some_circuit(), tests=QUICK, progress=False)
    assert report.task.random is not None
    (sufficiency,) = [each for each in report.tests if each.claim == "sufficiency"]
    assert sufficiency.p_value == report.task.random.p_value
    assert sufficiency.details["as_good"] == report.task.random.as_good
    assert report.task.random.n == sufficiency.details["random"] == 19


@pytest.mark.parametrize("make", [cv.Circuit.full, cv.Circuit.empty])
def test_a_circuit_without_a_like_is_said_to_be_beyond_comparison(make: Any) -> None:
    report = verify(tiny_model(), tiny_task(), make(tiny_model().graph), n_random=19, progress=False)
    assert report.task.random is not None
    assert (report.task.random.same, report.task.random.p_value) == (19, 1.0)
    assert any("No other connected circuit was found" in text for text in report.warnings)


# -- models without classes ----------------------------------------------------------------------


def test_a_model_without_classes_is_judged_by_the_metric_of_the_task_alone() -> None:
    model, task = featureless()
    full = cv.Circuit.full(model.graph)
    kept = np.random.default_rng(0).random(model.graph.shape) < 0.6
    report = verify(
        model, task, cv.Circuit(model.graph, kept).pruned(), n_random=2, robust=True, progress=False
    )
    section = report.task
    assert (section.agreement, section.kl) == (None, None)
    assert {(pair.top_whole, pair.top_circuit, pair.top_complement, pair.kl) for pair in section.pairs} == {
        (None, None, None, None)
    }
    text = report.to_markdown()
    assert "top" not in text
    assert "KL" not in text
    assert "same top class" not in report._repr_html_()
    assert report.robustness is not None
    assert "metric" not in {row.kind for row in report.robustness.rows}
    whole = verify(model, task, full, n_random=0, progress=False).task
    assert whole.faithfulness.value == pytest.approx(1)
    assert whole.failures == ()


def test_a_report_without_classes_survives_json(tmp_path: Any) -> None:
    model, task = featureless()
    report = verify(model, task, cv.Circuit.full(model.graph), n_random=0, progress=False)
    assert Report.load(report.save(tmp_path / "report.json")) == report


def test_nothing_flips_without_classes() -> None:
    model, task = featureless()
    found = patching_map(model, task, "heads", "all", progress=False)
    assert (found.tops == -1).all()
    assert (found.flipped == 0).all()
    with pytest.raises(OptionError, match="featureless has no classes"):
        flip_search(model, task, progress=False)
    with pytest.raises(OptionError, match="featureless has no classes"):
        Hypothesis("", "m0", Flips(0)).test(model, task)


# -- circuits of another model -------------------------------------------------------------------

ELSEWHERE = Provenance(model="vit", weights=f"{VERSION}-{'0' * 64}")


def test_audit_and_verify_say_that_a_circuit_was_found_on_other_weights() -> None:
    moved = some_circuit().with_provenance(ELSEWHERE)
    verdicts = audit(tiny_model(), tiny_task(), moved, settings=QUICK, progress=False)
    assert all(f"found on other weights (vit, {VERSION}-000000000)" in each.reason for each in verdicts)
    assert "found on other weights (vit" in "".join(
        verify(tiny_model(), tiny_task(), moved, n_random=0, progress=False).warnings
    )
    at_home = some_circuit().with_provenance(Provenance("tiny", tiny_model().weights_hash))
    assert not any("found on" in each.reason for each in audit(
        tiny_model(), tiny_task(), at_home, settings=QUICK, progress=False
    ))  # fmt: skip


def test_a_name_that_differs_is_said_where_no_weights_are_known() -> None:
    moved = some_circuit().with_provenance(Provenance(model="mnist"))
    report = verify(tiny_model(), tiny_task(), moved, n_random=0, progress=False)
    assert any("found on another model (mnist) than" in text for text in report.warnings)


def test_stability_compared_with_a_circuit_of_another_model_is_said() -> None:
    here = some_circuit().with_provenance(Provenance("tiny", tiny_model().weights_hash))
    report = verify(tiny_model(), tiny_task(), here, n_random=0, progress=False)
    again = stability(tiny_model(), tiny_task(), lambda model, task: here, n=2, progress=False)
    assert report.with_findings(stability=again, circuit=here).warnings == report.warnings
    other = report.with_findings(stability=again, circuit=here.with_provenance(ELSEWHERE))
    assert "Stability compares circuits of different models: 'vit' and 'tiny'" in other.warnings[-1]
