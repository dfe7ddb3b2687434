"""Edited models: what is refused, what is kept, and what two of them have to do with each other."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import DataError, ModelError, OptionError, UnsupportedModelError
from tests.rightness import CLEAN, CORRUPT, METRIC, drawn_circuit, images, micro, task_of
from tests.strategies import assert_close

DIRECTION = torch.linspace(-1, 1, 24, dtype=torch.float64)


def halved(x: Tensor) -> Tensor:
    return x / 2


# -- functions -------------------------------------------------------------------------------------


def in_place(x: Tensor) -> Tensor:
    return x.mul_(0)


def first_in_place(x: Tensor, at: Any) -> Tensor:
    assert at.kinds[0] == "cls"
    x[:, 0] = 0
    return x


@pytest.mark.parametrize(
    ("edit", "same"),
    [
        ({"m0": in_place}, {"m0": 0}),
        ({"resid1": first_in_place}, {"resid1@cls": 0}),
        ({"m0": np.float32(0)}, {"m0": 0}),
        ({"m0": torch.zeros(24, dtype=torch.long)}, {"m0": 0}),
        ({"m0": np.zeros((5, 24))}, {"m0": 0}),
        ({"m0@patch": np.zeros((4, 24))}, {"m0@patch": 0}),
        ({"a1.h0.scores@patch->cls": -torch.inf}, {"a1.h0.pattern@patch->cls": cv.knock_out()}),
        ({"a0.*": 0, "m*": 0}, {"a0.h0": 0, "a0.h1": 0, "m0": 0, "m1": 0}),
        ({"resid1": cv.add(DIRECTION, tokens="cls")}, {"resid1@cls": lambda x: x + DIRECTION}),
        ({"m1": lambda x: x.float()}, {"m1": lambda x: x.float().double()}),
    ],
)
def test_two_ways_to_say_the_same(edit: dict[str, Any], same: dict[str, Any]) -> None:
    model = cv.wrap(micro())
    assert_close(model.edit(edit)(CLEAN), model.edit(same)(CLEAN))
    assert_close(model(CLEAN), cv.wrap(micro())(CLEAN))  # which stays as it is


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"m0": lambda x: None}, "the function for m0 gave NoneType"),
        ({"m0": lambda x: x[:, :1]}, r"gave a tensor of \(2, 1, 24\) for \(2, 5, 24\)"),
        ({"m0": lambda x: x / 0}, "the function for m0 gave NaN or infinite numbers"),
        ({"a0.h1.scores": lambda x: x * torch.nan}, "the function for a0.h1.scores gave NaN"),
        ({"logits": lambda x: (x - x).log() * 0}, "the function for logits gave NaN"),
    ],
)
def test_functions_that_give_something_else_are_refused(edit: dict[str, Any], says: str) -> None:
    edited = cv.wrap(micro()).edit(edit)
    with pytest.raises(OptionError, match=says):
        edited(CLEAN)


def test_what_a_function_gives_where_nothing_is_changed_does_not_matter() -> None:
    def nowhere_but_patches(x: Tensor, at: Any) -> Tensor:
        return torch.where(at.mask, x, torch.nan)

    model = cv.wrap(micro())
    assert_close(model.edit({"m0@patch": nowhere_but_patches})(CLEAN), model(CLEAN))


def test_errors_of_a_function_are_its_own() -> None:
    with pytest.raises(ZeroDivisionError):
        cv.wrap(micro()).edit({"m0": lambda x: x / (1 // 0)})(CLEAN)


@pytest.mark.parametrize(
    ("edits", "says"),
    [
        ({}, "edits are a table of sites"),
        ([("m0", 0)], "edits are a table of sites"),
        ({3: 0}, "edits are named by sites"),
        ({"m0": "zero"}, "becomes a number, a tensor or a function, not str"),
        ({"m0": True}, "not bool"),
        ({"m0": float("nan")}, "the value for m0 is nan"),
        ({"m0": float("inf")}, "the value for m0 is inf"),
        ({"m0": torch.full((24,), torch.nan)}, "holds NaN"),
        ({"m0": torch.zeros(23)}, r"for each image, and the value is \(23,\)"),
        ({"resid1": cv.add(torch.ones(23))}, "the direction has 23 numbers"),
        ({"m0": cv.causal()}, "m0 is no pattern"),
        ({"a0.*.pattern": cv.causal}, r"call it: a0.h0.pattern becomes cv.causal\("),
        ({"m0@cls": cv.add(DIRECTION, tokens="cls")}, "names tokens, and so does its value"),
        ({"m0": torch.zeros(2, 1, 24)}, "is of one token, and 5 are changed"),
        ({"m0": torch.zeros(2, 5, 24), "m1": torch.zeros(3, 5, 24)}, "different numbers of images"),
    ],
)  # fmt: skip
def test_wrong_edits_are_refused(edits: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        cv.wrap(micro()).edit(edits)


# -- values for each image -------------------------------------------------------------------------


def test_values_for_each_image_hold_for_those_images_alone() -> None:
    model, four = cv.wrap(micro()), images(4)
    values = model.activations(images(4, seed=3), "m0", progress=False)["m0"]
    edited = model.edit({"m0": values})
    apart = torch.cat([model.edit({"m0": values[place]})(four[place : place + 1]) for place in range(4)])
    assert_close(edited(four), apart)
    task = cv.Task(four, images(4, seed=1), METRIC)
    assert_close(cv.run(edited, task, cv.Circuit.full(edited.graph)), apart)
    for method in ("eap", "local", "exact"):
        whole = cv.attribute(edited, task, method, progress=False)
        assert np.isfinite(whole.values).all()
        with pytest.raises(OptionError, match=r"for 4 images, and 2 are run|are for 4 images"):
            cv.attribute(edited, task, method, batch_size=2, progress=False)
    two = cv.Task(CLEAN, CORRUPT, METRIC)
    for call in (
        lambda: edited(CLEAN),
        lambda: edited(images(8)),
        lambda: edited.activations(images(8), "m1"),
        lambda: cv.attribute(edited, two),
        lambda: cv.logit_lens(edited, images(8)),
        lambda: cv.attention_patterns(edited, images(8)),
        lambda: cv.direct_logit_attribution(edited, images(8), 0),
    ):
        with pytest.raises(OptionError, match="for 4 images"):
            call()


# -- weights, copies, names ------------------------------------------------------------------------


def test_weights_that_change_are_seen() -> None:
    module = micro()
    model = cv.wrap(module).edit({"m0": halved})
    before, name = model(CLEAN), model.weights_hash
    with torch.no_grad():
        module.blocks[1].attn.qkv.weight.mul_(1.5)
    assert not torch.allclose(model(CLEAN), before)
    assert_close(cv.run(model, task_of(), cv.Circuit.full(model.graph)), model(CLEAN))
    assert_close(model(CLEAN), cv.wrap(copy.deepcopy(module)).edit({"m0": halved})(CLEAN))
    assert model.weights_hash != name


EDITS = {"m0": halved, "resid1": cv.add(DIRECTION), "a1.h0.pattern@patch->cls": cv.knock_out()}


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_copies_are_edited_too(copied: Any) -> None:
    model = cv.wrap(micro()).edit(EDITS)
    assert_close(copied(model)(CLEAN), model(CLEAN))
    assert copied(model).weights_hash == model.weights_hash


def test_a_function_that_cannot_be_pickled_is_named() -> None:
    model = cv.wrap(micro()).edit({"m0": lambda x: x})
    copy.deepcopy(model)
    with pytest.raises(OptionError, match="the function for m0 cannot be pickled"):
        pickle.dumps(model)


def test_hashes_tell_edits_apart() -> None:
    model, other = cv.wrap(micro()), DIRECTION.flip(0) + 1
    tables: list[dict[str, Any]] = [
        {"m0": 0}, {"m0": 1}, {"m1": 0}, {"m0@cls": 0}, {"m0@1": 0}, {"m0@2": 0}, {"m0": DIRECTION},
        {"m0": other}, {"m0": halved}, {"m0": lambda x: x / 3}, {"m0": in_place},
        {"resid1": cv.add(DIRECTION)}, {"resid1": cv.add(DIRECTION, 2)}, {"resid1": cv.add(other)},
        {"resid1@cls": cv.add(DIRECTION)}, {"resid1": cv.clamp(DIRECTION, 1)},
        {"resid1": cv.clamp(DIRECTION, None, 1)}, {"a0.h0.pattern": cv.causal()},
        {"a0.h0.pattern": cv.causal("first")}, {"a0.h0.pattern@1->2": 0}, {"a0.h0.pattern@2->1": 0},
        {"a0.h0.pattern": cv.knock_out()}, {"m0": 0, "m1": 0}, EDITS,
    ]  # fmt: skip
    hashes = [model.edit(table).weights_hash for table in tables]
    assert len({model.weights_hash, *hashes}) == len(tables) + 1
    assert [model.edit(table).weights_hash for table in tables] == hashes


SCRIPT = """
import torch
import circuitvit as cv
direction = torch.linspace(-1, 1, 64)
print(cv.load("catdog-tiny").edit(
    {"m0": lambda x, at: x / 2 + direction, "resid1": cv.add(direction, tokens="cls")}
).weights_hash)
"""


def test_the_same_edit_has_the_same_hash_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(SCRIPT, "<string>", "exec"), {})
    own = capsys.readouterr().out
    there = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, cwd=Path.cwd()
    ).stdout
    assert len(own.strip()) >= 16
    assert there == own


# -- together with the rest ------------------------------------------------------------------------


def test_edits_on_edits_are_edits_in_a_row() -> None:
    model = cv.wrap(micro())
    twice = model.edit(EDITS).edit({"m0": lambda x: x + 1, "m1@cls": 0})
    assert_close(twice(CLEAN), model.edit({**EDITS, "m0": lambda x: x / 2 + 1, "m1@cls": 0})(CLEAN))
    assert twice.sites().names == model.sites().names


@pytest.mark.parametrize("method", ["relp", "gim"])
def test_backward_rules(method: str) -> None:
    model = cv.wrap(micro())
    scores = cv.attribute(model.edit(EDITS | {"a1.h0.pattern": 0.2}), task_of(), "eap").values
    assert np.isfinite(scores).all()
    edited = model.edit({"m0": halved, "resid1": cv.add(DIRECTION)})
    assert np.isfinite(cv.attribute(edited, task_of(), method).values).all()
    with pytest.raises(UnsupportedModelError, match="edited scores, patterns or neurons"):
        cv.attribute(model.edit({"a1.h0.pattern": 0.2}), task_of(), method)


@pytest.mark.parametrize(
    ("ablation", "direction"),
    [(each, "noising") for each in ("patch", "zero", "mean", "mean-tokens", "resample", "noise")]
    + [("patch", "denoising")],
)
def test_every_ablation(ablation: str, direction: Any) -> None:
    """A constant on a stream belongs to no node: runs are those of a model that has it in its biases."""
    module = micro()
    edited = cv.wrap(module).edit({"resid1": cv.add(DIRECTION), "mid1@all": cv.add(DIRECTION, 2)})
    module = micro()
    with torch.no_grad():
        module.blocks[1].attn.proj.bias += 2 * DIRECTION
    model = cv.wrap(module).edit({"resid1": cv.add(DIRECTION)})
    task = task_of(ablation=ablation, direction=direction)
    for density in (0.0, 0.5, 0.9, 1.0):
        circuit = drawn_circuit(edited.graph, density)
        assert_close(cv.run(edited, task, circuit), cv.run(model, task, circuit), 1e-8)


def test_searches_and_tests() -> None:
    edited = cv.wrap(micro()).edit({"resid1": lambda x: 1.2 * x, "a0.h0": 0.1, "m1": halved})
    assert "resid1.edit" in edited.graph.nodes
    scored = cv.attribute(edited, task_of(), "exact", progress=False)
    task = cv.Task(images(8), images(8, seed=1), cv.kl_divergence())
    report = cv.verify(edited, task, scored.top(30), progress=False)
    assert report.headline.faithfulness is not None
    assert np.isfinite(cv.find(edited, task, progress=False).faithfulness)
    found = cv.direct_logit_attribution(edited, CLEAN, 0)
    total = found.by_token.sum(axis=(1, 2)) + found.constant_values.sum(axis=1)
    assert_close(torch.as_tensor(total), edited(CLEAN)[:, 0], 1e-5)


def test_gradients_by_images_and_by_directions() -> None:
    module = micro()
    ours, theirs = DIRECTION.clone().requires_grad_(), DIRECTION.clone().requires_grad_()
    seen, own = CLEAN.clone().requires_grad_(), CLEAN.clone().requires_grad_()
    logits = cv.wrap(module).edit({"resid1": cv.add(ours, tokens="cls"), "m1": halved})(seen, grad=True)
    where = torch.tensor([1.0, 0, 0, 0, 0], dtype=torch.float64)[:, None]
    module.blocks[1].register_forward_pre_hook(lambda part, inputs: (inputs[0] + theirs * where,))
    module.blocks[1].mlp.register_forward_hook(lambda part, inputs, output: output / 2)
    expected = module(own)
    found = torch.autograd.grad(logits.square().sum(), (ours, seen))
    for mine, true in zip(found, torch.autograd.grad(expected.square().sum(), (theirs, own)), strict=True):
        assert_close(mine, true)


def test_lower_precision_and_other_sizes() -> None:
    low = cv.wrap(micro().bfloat16()).edit({**EDITS, "a0.h0.pattern": cv.causal()})
    assert low(CLEAN.bfloat16()).dtype == torch.bfloat16
    resizable, wide = cv.wrap(micro(dynamic_img_size=True)), torch.randn(2, 3, 32, 64).double()
    edited = resizable.edit({"a*.pattern@patch->cls": cv.knock_out(), "m0@patch": 0, "m1": halved})
    assert edited(wide).shape == (2, 5)
    with pytest.raises(DataError, match="takes images of"):
        resizable.edit({"m0@1": 0})(wide)


def test_hooks_put_on_after_wrapping_are_refused() -> None:
    module = micro()
    model = cv.wrap(module)
    edited = model.edit({"m0": 0})
    for part in (module.blocks[0].mlp, model.module.blocks[1].attn):
        handle = part.register_forward_hook(lambda part, inputs, output: 2 * output)
        for each in (model, edited):
            for call in (
                lambda each=each: each(CLEAN),
                lambda each=each: each.activations(CLEAN, "m1"),
                lambda each=each: cv.run(each, task_of(), cv.Circuit.full(each.graph)),
                lambda each=each: cv.attribute(each, task_of()),
                lambda each=each: cv.logit_lens(each, CLEAN),
                lambda each=each: cv.attention_patterns(each, CLEAN),
            ):
                with pytest.raises(ModelError, match=r"has a hook of torch's.*model\.edit"):
                    call()
        handle.remove()
    model(CLEAN)


# -- what a hurried or learning user does --------------------------------------------------------


def test_a_direction_that_is_learned_is_added_as_it_is_now() -> None:
    model = cv.wrap(micro())
    direction = torch.zeros(24, dtype=torch.float64, requires_grad=True)
    edited = model.edit({"resid1": cv.add(direction, scale=2, tokens="cls")})
    before, step = edited.weights_hash, torch.optim.SGD([direction], lr=1.0)
    for _ in range(2):  # a graph that was made when the model was edited could be gone back through once
        step.zero_grad()
        edited(CLEAN, grad=True)[:, 0].sum().backward()
        step.step()
    now = model.edit({"resid1": cv.add(direction.detach(), scale=2, tokens="cls")})
    assert_close(edited(CLEAN), now(CLEAN))
    assert edited.weights_hash == now.weights_hash != before


FACTOR = 2.0


def by_a_global(x: Tensor) -> Tensor:
    return x * FACTOR


class Times:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_hashes_tell_apart_what_functions_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = cv.wrap(micro())

    def hash_of(value: Any) -> str:
        return model.edit({"m0": value}).weights_hash

    edited = model.edit({"m0": by_a_global})
    before = edited.weights_hash
    edited.activations(CLEAN, "m1", out=tmp_path / "acts", progress=False)
    monkeypatch.setitem(by_a_global.__globals__, "FACTOR", 3.0)
    assert edited.weights_hash != before
    with pytest.raises(cv.errors.FileError, match="something else"):  # and not what the file holds
        edited.activations(CLEAN, "m1", out=tmp_path / "acts", progress=False)
    assert hash_of(Times(2).apply) != hash_of(Times(3).apply)
    assert hash_of(Times(2).apply) == hash_of(Times(2).apply)
    assert hash_of(lambda x: next(each * 2 for each in [x])) != hash_of(
        lambda x: next(each * 3 for each in [x])
    )
    layer = torch.nn.Linear(24, 24).double()
    before = hash_of(layer)
    with torch.no_grad():
        layer.weight[0, 0] += 1
    assert hash_of(layer) != before


def test_what_has_a_default_is_not_told_where_it_is_called() -> None:
    model = cv.wrap(micro())
    assert_close(model.edit({"m0": lambda x, by=2: x / by})(CLEAN), model.edit({"m0": halved})(CLEAN))
    assert_close(model.edit({"m0": torch.nn.ReLU()})(CLEAN), model.edit({"m0": torch.relu})(CLEAN))
    for wrong in (lambda: 0, lambda x, at, more: x):
        with pytest.raises(OptionError, match="is called with x, or with x and at"):
            model.edit({"m0": wrong})


@pytest.mark.parametrize(
    "edit",
    [
        {"m0": torch.zeros(24, dtype=torch.complex64)},
        {"m0": torch.zeros(0, 17, 24)},
        {"m0": np.array(["a"])},
        {"a0.h0.scores": torch.tensor(float("nan"))},
        {"a0.h0.scores": torch.tensor(float("inf"))},
    ],
)
def test_values_that_are_no_numbers_are_refused(edit: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=r"the value for|becomes a number"):
        cv.wrap(micro()).edit(edit)


@pytest.mark.parametrize("bound", [float("nan"), float("inf"), "1", True])
def test_bounds_of_a_clamp_are_numbers(bound: Any) -> None:
    with pytest.raises(OptionError, match="low of a clamp must be a finite number"):
        cv.clamp(DIRECTION, low=bound)


@pytest.mark.parametrize(
    "name", ["m0.hidden[3]", "a0.h1[5]@cls", "resid1[2]@patch", "a1.h0<v>[0]", "a0.h0.z[1]", "logits[4]"]
)
def test_a_neuron_alone_is_what_a_function_of_all_of_them_changes(name: str) -> None:
    model = cv.wrap(micro())
    site, number, at = re.fullmatch(r"(.+)\[(\d+)\](.*)", name).groups()  # type: ignore[union-attr]

    def literal(x: Tensor) -> Tensor:
        x[..., int(number)] = 2 * x[..., int(number)] + 1
        return x

    expected = model.edit({site + at: literal})
    found = model.edit({name: lambda x: 2 * x + 1})
    assert_close(found(CLEAN), expected(CLEAN))
    assert_close(model.edit({name: 0.5}).edit({name: lambda x: x + 1})(CLEAN), model.edit({name: 1.5})(CLEAN))
    circuit = cv.Circuit.full(found.graph)
    assert_close(cv.run(found, cv.Task(CLEAN, CORRUPT, METRIC), circuit), expected(CLEAN))


def test_a_coordinate_is_steered_alone() -> None:
    model = cv.wrap(micro())
    push = torch.zeros(24, dtype=torch.float64)
    push[3] = 2.0
    whole = model.edit({"resid1": cv.add(push, tokens="cls")})
    alone = model.edit({"resid1[3]": cv.add(torch.ones(1, dtype=torch.float64), scale=2, tokens="cls")})
    assert_close(alone(CLEAN), whole(CLEAN))
    assert alone.weights_hash != model.edit({"resid1[4]": cv.add(torch.ones(1), 2, "cls")}).weights_hash
    for wrong, said in (("m0.hidden[48]", "there are 48"), ("a0.h0.pattern[3]", "has no neurons")):
        with pytest.raises(OptionError, match=said):
            model.edit({wrong: 0})


@pytest.mark.parametrize(("names", "tokens"), [(5, None), (None, None), ("m0", 1.5), ("m0", object()),
                                           ("m0", torch.zeros(17, dtype=torch.bool))])  # fmt: skip
def test_what_names_nothing_is_refused(names: Any, tokens: Any) -> None:
    with pytest.raises(OptionError):
        cv.wrap(micro()).activations(CLEAN, names, tokens=tokens, progress=False)


@pytest.mark.parametrize(
    ("function", "says"),
    [
        (lambda x: x + torch.randn_like(x), "gives something else each time"),
        (lambda x: x.mean(0, keepdim=True).expand_as(x), "mixes the images of a batch"),
        (lambda x: x.roll(1, 0), "mixes the images of a batch"),
    ],
)
def test_functions_whose_answer_is_not_of_their_image_alone_are_refused(function: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        cv.wrap(micro()).edit({"resid1": function})


def test_a_function_changes_no_mode() -> None:
    model = cv.wrap(micro())

    def off(x: Tensor) -> Tensor:
        doubled = x * 2
        torch.set_grad_enabled(False)
        return doubled

    edited = model.edit({"m0": off})
    assert torch.is_grad_enabled()
    assert edited(CLEAN.clone().requires_grad_(), grad=True).requires_grad
    assert torch.is_grad_enabled()


def test_a_function_through_which_no_gradient_goes_is_refused() -> None:
    model = cv.wrap(micro())
    for flat in (lambda x: x.detach() * 2, lambda x: (2 * x.data).clamp(max=1)):
        with pytest.raises(OptionError, match="lets no gradient through"):
            model.edit({"m0.hidden": flat})
    model.edit({"m0.hidden": lambda x: torch.zeros_like(x)})  # the same whatever is there
    model.edit({"m0.hidden": lambda x: x.round()})  # whose gradient is 0


@pytest.mark.parametrize("options", [{}, {"class_token": True, "reg_tokens": 2}])
def test_what_is_added_after_the_last_attention_is_added_to_the_tokens_that_are_left(
    options: dict[str, Any],
) -> None:
    model = cv.wrap(micro(**options))
    push = torch.linspace(-1, 1, 24, dtype=torch.float64)
    for site in ("mid1", "resid2"):
        for tokens in ("patch", "cls", "cls+patch"):
            edited = model.edit({site: cv.add(push, 2.0, tokens)})
            literal = model.edit({f"{site}@{tokens}": lambda x: x + 2 * push})
            assert_close(edited(CLEAN), literal(CLEAN))
            stream = edited.embed(CLEAN)
            for stage in edited.essential[1:-1]:
                stream = stage.add(stream, stage.write(stage.read(stream)))
            assert stream.shape[1] == edited.leading
            for ablation in ("patch", "mean", "zero"):
                task = task_of(ablation=ablation)
                whole = cv.run(edited, task, cv.Circuit.full(edited.graph))
                assert_close(whole, edited(CLEAN))
