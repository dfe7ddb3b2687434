"""Locally exact scores: the literal definition, the closed forms of the stages, and what must hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import circuitvit as cv
from circuitvit.engine import batch_runs, gradients, output_gradients
from circuitvit.errors import DataError, OptionError
from circuitvit.models import Stage
from tests.reference import literal_scores
from tests.strategies import Case, Recipe, assert_close, assert_same_scores, cases


@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_scores_are_those_of_the_definition(case: Case) -> None:
    expected = literal_scores.local(case.literal, case.base, case.reference, case.formula, case.token_groups)
    found = cv.attribute(case.model, case.task(), "local", progress=False)
    assert found.direction == case.direction
    assert_same_scores(found.to_dict(), expected)


@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_the_shortcuts_of_the_stages_answer_like_the_literal_default(case: Case) -> None:
    prepared = case.task().prepare(case.model)
    generator = torch.Generator().manual_seed(case.seed)
    for run in batch_runs(prepared, batch_size=2):
        found = gradients(case.model, run.base.compacts[0], run.metric)
        for index, d_compact in enumerate(output_gradients(found)):
            stage = case.model.essential[index]
            if stage.is_source:
                continue
            stream = found.capture.stream(index)
            streams = stream + torch.randn((3, *stream.shape), generator=generator, dtype=stream.dtype)
            given = (found.reads[index], found.d_reads[index], d_compact, stream, streams)
            assert_close(stage.local_effects(*given), Stage.local_effects(stage, *given), 1e-9)


@given(cases(smooth=True))
def test_the_gradient_at_every_output_is_that_of_the_whole_model(case: Case) -> None:
    """Held against one backward pass through the stages, in which the outputs are kept."""
    model, base = case.model, case.base
    source, *layers, readout = model.essential
    compacts = [source.write(source.read(base)).detach().requires_grad_()]
    stream = source.total(compacts[0])
    for layer in layers:
        compacts.append(layer.write(layer.read(stream)))
        stream = layer.add(stream, compacts[-1])
    case.formula(readout.write(readout.read(stream))).sum().backward(inputs=[compacts[0]], retain_graph=True)
    logits = readout.write(readout.read(stream))
    expected = torch.autograd.grad(case.formula(logits).sum(), compacts)
    found = output_gradients(gradients(model, compacts[0].detach(), case.formula))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, 1e-9)


@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_edges_into_the_logits_are_exact(case: Case) -> None:
    local = cv.attribute(case.model, case.task(), "local", progress=False).to_dict()
    exact = cv.attribute(case.model, case.task(), "exact", progress=False).to_dict()
    into = [name for name in local if "->logits" in name]
    assert_same_scores({name: local[name] for name in into}, {name: exact[name] for name in into})


def test_saturated_attention_is_seen_where_the_gradient_is_blind() -> None:
    """Queries a hundred times too large: the softmax is flat, but what moves it far has an effect."""
    case = Case(Recipe(depth=2, heads=2, width=4, seed=1), n_pairs=2)
    with torch.no_grad():
        for block in case.module.blocks:
            block.attn.qkv.weight[: block.attn.qkv.weight.shape[0] // 3] *= 100
    eap, local, exact = (
        cv.attribute(case.model, case.task(), method, progress=False) for method in ("eap", "local", "exact")
    )
    queries = [name for name in exact.graph.edges if "->a1" in name and "<q>" in name]
    largest = max(queries, key=lambda name: abs(exact[name]))
    assert abs(eap[largest]) < 1e-9 * abs(exact[largest])
    assert local[largest] == pytest.approx(exact[largest], rel=0.05)


def test_what_has_no_gradient_is_refused() -> None:
    case = Case(Recipe(depth=1))
    with pytest.raises(OptionError, match=r"local needs the metric's gradient"):
        cv.attribute(case.model, case.task(metric=cv.accuracy(0)), "local", progress=False)
    with pytest.raises(OptionError, match="flat at the clean run"):
        cv.attribute(case.model, case.task(metric=cv.kl_divergence()), "local", progress=False)
    with pytest.raises(DataError):
        cv.attribute(
            case.model, cv.Task(case.clean, case.clean, cv.logit_diff(0, 1)), "local", progress=False
        )
