"""Circuits taken home: modules against the engine's masked runs, in eager mode and exported."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import DataError, OptionError
from tests.families import FAMILIES, made
from tests.rightness import CLEAN, METRIC, drawn_circuit, images, micro
from tests.strategies import assert_close


@pytest.mark.parametrize(
    ("name", "ablation", "groups"),
    [
        ("timm, registers", "mean", "kind"),
        ("timm, parallel and fused", "zero", None),
        ("timm, gated and normed together", "mean-tokens", "kind"),
        ("timm, pool", "mean", None),
        ("transformers, timesformer", "mean", "kind"),
    ],
)
def test_a_module_gives_the_logits_of_masked_runs(name: str, ablation: str, groups: str | None) -> None:
    model, inputs = made(name)[0], FAMILIES[name].images(3)
    task = cv.Task(inputs, metric=METRIC, ablation=ablation, groups=groups).prepare(model)
    for seed, density in enumerate((0.95, 0.3)):
        circuit = drawn_circuit(task.graph, density, seed)
        module = cv.masked_module(model, circuit, task)
        assert_close(module(inputs), cv.run(model, task, circuit))
        assert_close(module(inputs[:1]), module(inputs)[:1])  # of the constants nothing is of its images


def test_edits_heads_and_finer_nodes_come_along() -> None:
    model = cv.refine_nodes(cv.wrap(micro(num_classes=0)), {"m0": cv.neurons([1, 2])})
    model = cv.with_head(model, torch.ones(3, 24).triu()).edit({"a1.h0.z@cls": 1, "m1": lambda x: x / 2})
    task = cv.Task(CLEAN, metric=METRIC, ablation="mean-tokens")
    circuit = drawn_circuit(model.graph, 0.7)
    assert_close(cv.masked_module(model, circuit, task)(CLEAN), cv.run(model, task, circuit))


def test_the_module_has_weights_of_its_own() -> None:
    module = micro()
    model, task = cv.wrap(module), cv.Task(CLEAN, metric=METRIC, ablation="zero")
    circuit = drawn_circuit(model.graph, 0.7)
    masked = cv.masked_module(model, circuit, task)
    before = masked(CLEAN)
    with torch.no_grad():
        module.blocks[0].attn.proj.weight.zero_()
    assert torch.equal(masked(CLEAN), before)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"corrupt": images(seed=1)}, "'patch' ablation carries something else for every image"),
        ({"ablation": cv.Noise()}, "'noise' ablation"),
        (
            {"ablation": "zero", "groups": cv.TokenGroups(("a", "b"), torch.tensor([[0, 0, 0, 1, 1]] * 2))},
            "groups differ from image to image",
        ),
    ],
)
def test_what_differs_from_image_to_image_is_refused(options: dict[str, Any], why: str) -> None:
    model, task = made("timm")[0], cv.Task(CLEAN, metric=METRIC, **options)
    with pytest.raises(OptionError, match=why):
        cv.masked_module(model, cv.Circuit.full(task.prepare(model).graph), task)


def exported() -> tuple[nn.Module, Tensor, Tensor, dict[str, Any]]:
    """A small module, images, its logits by the engine, and how its batches are of any size."""
    model = cv.wrap(micro(depth=1).float())
    task = cv.Task(images(4).float(), metric=METRIC, ablation="mean")
    circuit = drawn_circuit(model.graph, 0.6)
    batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},)}
    return cv.masked_module(model, circuit, task), images(4).float(), cv.run(model, task, circuit), batch


def test_it_can_be_exported_and_read_again() -> None:
    module, inputs, logits, batch = exported()
    room = io.BytesIO()
    torch.export.save(torch.export.export(module, (inputs[:2],), **batch), room)
    room.seek(0)
    assert_close(torch.export.load(room).module()(inputs), logits, 1e-5)
    assert_close(module(inputs), logits, 1e-5)
    with pytest.raises(OptionError, match="stays on the device"):
        module.double()
    for wrong in (inputs[0], inputs[:, :, 1:], inputs[:, :1]):
        with pytest.raises(DataError, match=r"takes \(batch, 3, .*constants are for the tokens of that size"):
            module(wrong)


def test_onnx_takes_it() -> None:
    pytest.importorskip("onnxscript", reason="onnx and onnxscript are not installed")
    from onnx.reference import ReferenceEvaluator

    module, inputs, logits, batch = exported()
    program = torch.onnx.export(module, (inputs[:2],), dynamo=True, verbose=False, **batch)
    (name,) = (each.name for each in program.model_proto.graph.input)  # type: ignore[union-attr]
    (found,) = ReferenceEvaluator(program.model_proto).run(None, {name: inputs.numpy()})
    assert_close(torch.from_numpy(np.asarray(found)), logits, 1e-5)
