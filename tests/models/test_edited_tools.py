"""Every tool on an edited model: the answers for a module that has the edit in its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.engine import Replay, state
from circuitvit.errors import OptionError
from circuitvit.export.maps import maps_of
from circuitvit.pruning import MaskSettings
from tests.engine.test_state import Calls
from tests.families import made
from tests.models.test_edited_edges import STREAMS
from tests.reference.sites import with_stream_nodes
from tests.rightness import CLEAN, CORRUPT, drawn_circuit, formula, images, micro, task_of
from tests.strategies import assert_close

TASK = cv.Task(images(6), images(6, seed=1), cv.logit_diff(0, 1))


def halved(x: torch.Tensor) -> torch.Tensor:
    return x / 2


def edited() -> cv.Model:
    return cv.wrap(micro()).edit({"m0": halved})


def changed() -> cv.Model:
    """The same by its weights, to the last bit."""
    module = micro()
    with torch.no_grad():
        for tensor in module.blocks[0].mlp.fc2.parameters():
            tensor /= 2
    return cv.wrap(module)


def searched(model: cv.Model) -> list[Any]:
    learned = cv.learn_mask(model, TASK, 15, MaskSettings(steps=30, batch_size=2), progress=False)
    start = cv.attribute(model, TASK, "eap", progress=False).top(40)
    refined = cv.refine(model, TASK, start, max_runs=60, progress=False)
    return [
        sorted(found)
        for found in (cv.acdc(model, TASK, 0.002, progress=False), learned.circuit, refined.circuit)
    ]


def scored(model: cv.Model) -> list[Any]:
    return [
        cv.attribute(model, TASK, method, progress=False).values
        for method in ("eap", "eap-ig", "local", "exact")
    ]


def verified(model: cv.Model) -> list[Any]:
    report = cv.verify(model, TASK, drawn_circuit(model.graph, 0.8), n_random=3, progress=False)
    return [report.headline.faithfulness.value, report.headline.necessity.value]


def seen(model: cv.Model) -> list[Any]:
    lens, maps = cv.logit_lens(model, CLEAN), maps_of(model, TASK)
    side = maps.sides["clean"]
    heads = [map_ for head in side.heads.values() for map_ in (head.scores, head.weights)]
    return [lens.logits, lens.top, *heads, *side.writes.values()]


@pytest.mark.parametrize("tool", [searched, scored, verified, seen])
def test_tools_see_the_edit_as_they_would_see_it_in_the_weights(
    tool: Callable[[cv.Model], list[Any]],
) -> None:
    for found, expected in zip(tool(edited()), tool(changed()), strict=True):
        if isinstance(found, tuple | list):
            assert found == expected
            assert found
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_faithfulness_is_that_of_hooks() -> None:
    """Of all edges but one, of which one begins at an edited stream."""
    model, original = made("timm")
    table, changes = STREAMS
    with_edit, nodes = model.edit(table), with_stream_nodes(original, changes)
    with torch.no_grad():
        whole, nothing = (formula(nodes.run(each)).mean() for each in (CLEAN, CORRUPT))
    for edge in ("resid1.edit->m1", "a0.h0->resid2.edit", "m0->a1.h0<k>"):
        rest = cv.Circuit.from_edges(with_edit.graph, set(with_edit.graph.edges) - {edge})
        report = cv.verify(with_edit, task_of(), rest, n_random=0, progress=False)
        kept = formula(nodes.ablated(CLEAN, CORRUPT, edge)).mean()
        expected = float(((kept - nothing) / (whole - nothing)).detach())
        assert report.headline.faithfulness.value == pytest.approx(expected, abs=1e-8)


def test_a_search_goes_on_with_the_same_edit_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "EVERY", 0.0)
    path, table = tmp_path / "search.state", {"m0": halved, "resid1": cv.add(torch.ones(24))}
    expected = cv.acdc(cv.wrap(micro()).edit(table), TASK, 0.002, progress=False)
    with monkeypatch.context() as patch:
        Calls(patch, Replay, "__call__").last = 5
        with pytest.raises(KeyboardInterrupt):
            cv.acdc(cv.wrap(micro()).edit(table), TASK, 0.002, state=path, progress=False)
    for other in ({**table, "m0": 0.5}, {"m0": halved}, None):
        model = cv.wrap(micro()) if other is None else cv.wrap(micro()).edit(other)
        with pytest.raises(OptionError, match="another model"):
            cv.acdc(model, TASK, 0.002, state=path, progress=False)
    found = cv.acdc(cv.wrap(micro()).edit(table), TASK, 0.002, state=path, progress=False)
    assert sorted(found) == sorted(expected)
    assert not path.exists()


@pytest.mark.parametrize("tokens", ["pooled", "mean"])
def test_a_head_and_an_edit_in_either_order(tokens: Any) -> None:
    weight = torch.randn(3, 24, generator=torch.Generator().manual_seed(0)).double()
    model, table = cv.wrap(micro()), {"m1@0": halved, "resid1": lambda x: 1.1 * x}
    first = cv.with_head(model.edit(table), weight, tokens=tokens)
    last = cv.with_head(model, weight, tokens=tokens).edit(table)
    assert first(CLEAN).shape == (2, 3)
    assert_close(first(CLEAN), last(CLEAN))
    assert not torch.allclose(first(CLEAN), cv.with_head(model, weight, tokens=tokens)(CLEAN))
    assert first.weights_hash == last.weights_hash
    task = cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1))
    scores = [cv.attribute(each, task, "exact", progress=False).values for each in (first, last)]
    np.testing.assert_allclose(*scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ending", ["svg", "html", "graphml", "json"])
def test_circuits_of_edited_models_are_drawn(ending: str, tmp_path: Path) -> None:
    """With the nodes that edited streams are, and with maps."""
    model = cv.wrap(micro()).edit({"resid1": lambda x: 1.2 * x, "mid1": halved, "a0.h0": 0.1})
    circuit = cv.attribute(model, task_of(), "exact", progress=False).top(30)
    assert any("resid1.edit" in edge for edge in circuit)
    path = circuit.draw(tmp_path / f"circuit.{ending}", model=model, task=task_of())
    assert "resid1.edit" in path.read_text()


def test_maps_show_the_edited_pattern() -> None:
    model = cv.wrap(micro()).edit(
        {"a1.h0.pattern": cv.causal("first"), "a0.h1.scores@patch->cls": -torch.inf}
    )
    heads = maps_of(model, task_of()).sides["clean"].heads
    for name in ("a1.h0", "a0.h1"):
        expected = model.activations(CLEAN, f"{name}.pattern", progress=False)[f"{name}.pattern"][0]
        assert_close(torch.as_tensor(heads[name].pattern), expected, 1e-9)
    assert heads["a1.h0"].pattern[0, 1] < 1e-9
