"""Several models on one sheet: every figure as if the model stood alone; what differs in kind is refused."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import CircuitViTError, OptionError
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.views import ComparedModel, Depth
from tests.views.literal_vit import micro

SETTINGS: dict[str, Any] = {"within": 1.0, "n_random": 3, "labels": False, "progress": False}


def pictures(n: int, seed: int) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def models() -> dict[str, cv.Model]:
    return {"first <b>": micro(0)[0], "deeper": micro(1, depth=3)[0]}


def tasks(models: dict[str, cv.Model], n: int = 12) -> dict[str, cv.Task]:
    """The same pictures, each model with classes of its own: those whose logits tell the sides apart."""
    sides = pictures(n, 1) + 1.5, pictures(n, 2) - 1.5
    gaps = [model(sides[0]).mean(0) - model(sides[1]).mean(0) for model in models.values()]
    classes = [(int(gap.argmax()), int(gap.argmin())) for gap in gaps]
    return {
        name: cv.Task(*sides, metric=cv.logit_diff(*each)) for name, each in zip(models, classes, strict=True)
    }


@pytest.fixture(scope="module")
def sheet(models: dict[str, cv.Model]) -> cv.ModelSheet:
    methods = ["eap", "exact"]
    return cv.compare_models(models, tasks(models), held_out=0.5, methods=methods, edges=1000, **SETTINGS)


def test_every_figure_is_what_the_library_says_of_the_model_alone(
    models: dict[str, cv.Model], sheet: cv.ModelSheet
) -> None:
    for name, model in models.items():
        own, task = sheet[name], tasks(models)[name]
        discovery, held_out = cv.split(model, task, 0.5)
        report = cv.verify(model, discovery, own.circuit, held_out=held_out, n_random=3, progress=False)
        assert own.report.headline == report.headline
        assert own.circuit == cv.find(model, discovery, within=1.0, progress=False).circuit
        scores = [cv.attribute(model, discovery, each, progress=False).values for each in ("eap", "exact")]
        edges = model.graph.edge_mask
        rank = spearmanr(*(np.abs(each[edges]) for each in scores)).statistic
        assert own.rightness[0].measured == model.graph.n_edges
        assert own.rightness[0].spearman is not None
        assert own.rightness[0].spearman.value == pytest.approx(rank, abs=1e-6)


def test_a_method_that_is_exact_is_right(sheet: cv.ModelSheet) -> None:
    for model in sheet.models:
        for found in (model.rightness[1].spearman, model.rightness[1].pearson, model.rightness[1].signs):
            assert found is not None
            assert (found.value, found.low) == pytest.approx((1.0, 1.0))


def test_the_lens_ends_at_what_the_model_says(models: dict[str, cv.Model], sheet: cv.ModelSheet) -> None:
    for name, model in models.items():
        task, own = tasks(models)[name].prepare(model), sheet[name]
        assert [at.position for at in own.lens] == ["embedding", *(f"layer {n}" for n in range(own.layers))]
        assert [at.depth for at in own.lens] == pytest.approx(np.linspace(0, 1, own.layers + 1))
        assert task.corrupt is not None
        (target,), (foil,) = (mask[0].nonzero().flatten() for mask in (task.metric.target, task.metric.foil))  # type: ignore[index]
        clean, corrupt = (
            logits[:, target] - logits[:, foil]
            for logits in (model(side.take(0, 12)) for side in (task.clean, task.corrupt))
        )
        assert own.ability.gap.value == pytest.approx(float((clean - corrupt).mean()), rel=1e-4)
        assert own.ability.clean_right is not None
        assert own.ability.clean_right.value == pytest.approx(float((clean > 0).float().mean()))
        assert own.ability.told_apart == own.lens[-1].told_apart
        assert own.lens[-1].gap is not None
        assert own.lens[-1].gap.value == pytest.approx(1.0)


def test_what_tells_nothing_apart_is_at_chance(sheet: cv.ModelSheet) -> None:
    """Class tokens know nothing of the image before the first layer: ties, neither right nor wrong."""
    for model in sheet.models:
        start: Depth = model.lens[0]
        assert start.told_apart is not None
        assert start.told_apart.value == 0.5


def test_parts_are_counted(sheet: cv.ModelSheet) -> None:
    for model in sheet.models:
        used = {(use.among, use.part): (use.used, use.total) for use in model.uses}
        names, every = list(model.circuit), model.circuit.graph.edges
        for port, part in (("<q>", "queries"), ("<v>", "values"), ("->logits", "logits")):
            counts = tuple(sum(name.endswith(port) for name in each) for each in (names, every))
            assert used["inputs", part] == counts
        heads = {node for node in model.circuit.nodes if re.fullmatch(r"a\d+\.h\d+", node)}
        assert used["nodes", "heads"] == (len(heads), model.heads)
        assert sum(count for (among, _), (count, _) in used.items() if among == "inputs") == len(names)


def test_all_models_get_the_same_pairs_on_both_sides(sheet: cv.ModelSheet) -> None:
    sides = [
        [[pair.clean for pair in section.pairs] for section in (model.report.task, model.report.held_out)
         if section is not None]
        for model in sheet.models
    ]  # fmt: skip
    assert sides[0] == sides[1]
    assert not set(sides[0][0]) & set(sides[0][1])


def test_the_same_model_twice_is_a_control() -> None:
    model = micro(0)[0]
    alike = {"one": model, "other": model}
    sheet = cv.compare_models(
        [model, model], list(tasks(alike).values()), methods=["eap"], edges=20, **SETTINGS
    )
    one, two = sheet.models
    assert (one.name, two.name) == ("micro", "micro (2)")
    assert (one.report.headline, one.lens, one.uses) == (two.report.headline, two.lens, two.uses)
    assert sheet.overlaps == {("micro", "micro (2)"): 1.0}
    assert any("have the same weights" in text for text in sheet.caveats)
    assert any("judged on the pairs that they were found on" in text for text in sheet.caveats)


def test_features_are_compared_by_a_direction() -> None:
    model, sides = cv.with_head(micro(0)[0], None), (pictures(6, 1) + 1.5, pictures(6, 2) - 1.5)
    direction = model(sides[0]).mean(0) - model(sides[1]).mean(0)
    task = cv.Task(*sides, metric=cv.projection(direction))
    sheet = cv.compare_models([model, model], task, methods=[], **SETTINGS)
    assert all(each.ability.clean_right is None and each.ability.told_apart for each in sheet.models)
    assert "same top class" not in sheet.to_markdown()


def test_heads_are_labelled_from_the_images_of_both_sides() -> None:
    model = micro(0)[0]
    both = {"a": model, "b": model}
    few_, many = (tasks(both, n) for n in (3, 6))
    given: dict[str, Any] = {**SETTINGS, "methods": [], "n_random": 0, "labels": True}
    labels = cv.compare_models(both, many, **given)["a"].labels
    assert labels is not None
    images = torch.cat([many["a"].clean, many["a"].corrupt])  # type: ignore[list-item]
    assert np.array_equal(labels.shares, cv.text_span(model, images, phrases=1, progress=False).shares)
    sheet = cv.compare_models(both, few_, **given)
    assert sheet["a"].labels is None
    assert any(text.startswith("The heads of a have no labels: 6 images") for text in sheet.caveats)


def test_a_method_that_cannot_score_says_why() -> None:
    model = micro(0)[0]
    task = cv.Task(pictures(6, 1) + 1.5, pictures(6, 2) - 1.5, metric="kl_divergence")
    sheet = cv.compare_models({"a": model, "b": model}, task, methods=["eap"], edges=20, **SETTINGS)
    assert sheet["a"].rightness[0].spearman is None
    assert "eap cannot score a: kl_divergence is flat at the clean run, where eap takes its gradient." in (
        sheet.caveats
    )


# -- what there is already ------------------------------------------------------------------------------


def test_what_is_done_is_kept_and_taken_over(
    models: dict[str, cv.Model], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = importlib.import_module("circuitvit.views.models_compared")
    measured, measure = [], module._measured

    def counted(name: str, *rest: object) -> ComparedModel:
        measured.append(name)
        if measured == ["first <b>", "deeper"]:
            raise KeyboardInterrupt
        found: ComparedModel = measure(name, *rest)
        return found

    monkeypatch.setattr(module, "_measured", counted)
    given: dict[str, Any] = {"methods": [], **SETTINGS}
    kept: list[cv.ModelSheet] = []
    with pytest.raises(KeyboardInterrupt):
        cv.compare_models(models, tasks(models), after_each=kept.append, **given)
    known = cv.ModelSheet.load(kept[-1].save(tmp_path / "sheet.json"))
    assert [model.name for model in known.models] == ["first <b>"]
    sheet = cv.compare_models(models, tasks(models), known=known, **given)
    assert measured == ["first <b>", "deeper", "deeper"]
    assert [model.name for model in sheet.models] == list(models)
    cv.compare_models(models, tasks(models), known=sheet, **{**given, "n_random": 2})
    assert measured[3:] == list(models)  # with other settings nothing is taken over


# -- what cannot be compared ----------------------------------------------------------------------------


def seeing(spec: InputSpec, models: dict[str, cv.Model]) -> object:
    """Models one of which is given something else than the other."""
    changed = {**models, "deeper": replace(models["deeper"], preprocessing=spec)}
    return cv.compare_models(changed, few(), **SETTINGS)


def few() -> cv.Task:
    return cv.Task(pictures(3, 1), pictures(3, 2), metric=cv.logit_diff(0, 1))


def other(change: Callable[[dict[str, cv.Task]], object]) -> Callable[..., object]:
    def call(models: dict[str, cv.Model]) -> object:
        given = tasks(models)
        change(given)
        return cv.compare_models(models, given, **SETTINGS)

    return call


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: cv.compare_models(m["deeper"], tasks(m)), "one model, micro, cannot be compared"),
        (lambda m: cv.compare_models({"a": m["deeper"], "": m["deeper"]}, tasks(m)), "a model without"),
        (lambda m: cv.compare_models(m, tasks(m), methods="eap"), r"a list of names, such as \['eap'\]"),
        (lambda m: cv.compare_models([m["deeper"]], tasks(m)), "give two or more, not 1"),
        (lambda m: cv.compare_models([m["deeper"], "x"], tasks(m)), "'x' is no model of circuitvit"),
        (lambda m: cv.compare_models([m["deeper"]] * 9, tasks(m)), "room for 8 models, not for 9"),
        (lambda m: cv.compare_models(m, tasks(m), methods=["epa"]), "unknown method 'epa'"),
        (lambda m: cv.compare_models(m, tasks(m), edges=3), "edges to measure must be at least 10"),
        (lambda m: cv.compare_models(m, tasks(m), within="soon"), "duration"),
        (lambda m: cv.compare_models(m, {"deeper": tasks(m)["deeper"]}), "task names deeper; the models are"),
        (lambda m: cv.compare_models(m, "cats"), "task is a cv.Task for all models, or one for each"),
        (
            partial(seeing, ClipSpec((4, 3, 8, 8), (0.5,) * 3, (0.5,) * 3)),
            "first <b> sees images and deeper sees clips|deeper sees clips and first <b> sees images",
        ),
        (partial(seeing, InputSpec((3, 8, 8), (0.4,) * 3, (0.5,) * 3)), "prepare images differently"),
        (other(lambda given: given.update(deeper=few())), "are given other images"),
        (
            other(lambda given: given.update(deeper=given["deeper"].with_options(metric=cv.logit("cat")))),
            "deeper: .*'cat'",
        ),
        (
            other(lambda given: given.update(deeper=given["deeper"].with_options(ablation="mean"))),
            "first <b> has the ablation patch, deeper has mean",
        ),
        (
            other(lambda given: given.update(deeper=given["deeper"].with_options(metric=cv.logit(0)))),
            "has the metric logit_diff, deeper has logit",
        ),
        (
            other(lambda given: given.update(deeper=given["deeper"].with_options(direction="denoising"))),
            "deeper: circuits are searched in the clean run",
        ),
        (
            lambda m: cv.compare_models([cv.with_head(m["deeper"], None), m["deeper"]], tasks(m)["deeper"]),
            "micro with features has no classes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_by_name(
    models: dict[str, cv.Model], call: Callable[..., object], message: str
) -> None:
    with pytest.raises(CircuitViTError, match=message):
        call(models)


# -- the page -------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(sheet: cv.ModelSheet, tmp_path: Path) -> None:
    page = sheet.save(tmp_path / "sheet.html").read_text()
    assert "<script" not in page
    assert "first <b>" not in page
    assert "first &lt;b&gt;" in page
    assert not re.findall(r"(?:src|href)=|url\((?!#)|https?:", page)
    for model in sheet.models:
        assert str(model.report.headline.faithfulness) in page
    assert "| faithfulness |" in sheet.save(tmp_path / "sheet.md").read_text()
    with pytest.raises(OptionError, match=r"is saved as \.html"):
        sheet.save(tmp_path / "sheet.svg")
