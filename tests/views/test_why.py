"""Why an image was misread: by hooks and brute force, on compiled models, and on a fault that was planted."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import capture
from circuitvit.errors import CircuitViTError, DataError, NameNotFoundError, OptionError
from circuitvit.views.flipping import PatchedPair, flipping, margin
from tests.rightness import images, micro

MODEL = cv.load("catdog-tiny")
PAIRS = catdog_pairs(12, seed=0)
AMONG = {"cat": PAIRS.clean, "dog": PAIRS.corrupt}


# -- by hooks on the module itself -----------------------------------------------------------------


def parts(module: Any) -> dict[str, tuple[Any, slice]]:
    """By node, the layer whose input (of a head) or output (of an MLP) is its own, and where it is there."""
    found: dict[str, tuple[Any, slice]] = {}
    for layer, block in enumerate(module.blocks):
        width = block.attn.head_dim
        for head in range(block.attn.num_heads):
            found[f"a{layer}.h{head}"] = block.attn.proj, slice(head * width, (head + 1) * width)
        found[f"m{layer}"] = block.mlp, slice(None)
    return found


@torch.no_grad()
def hooked(module: Any, image: Tensor, other: Tensor, nodes: Sequence[str]) -> Tensor:
    """The logits on an image with nodes' outputs at the class token taken from another, by torch's hooks."""
    own = parts(module)

    def at_token(layer: Any, inputs: Any, output: Tensor) -> Tensor:
        return inputs[0] if layer in projections else output

    projections = [block.attn.proj for block in module.blocks]
    known: dict[str, Tensor] = {}

    def note(name: str) -> Any:
        layer, columns = own[name]

        def hook(_: Any, inputs: Any, output: Tensor) -> None:
            known[name] = at_token(layer, inputs, output)[:, 0, columns].clone()

        return layer.register_forward_hook(hook)

    handles = [note(name) for name in nodes]
    module(other)
    for handle in handles:
        handle.remove()

    def exchange(name: str) -> Any:
        layer, columns = own[name]
        if layer in projections:

            def before(_: Any, inputs: Any) -> Any:
                changed = inputs[0].clone()
                changed[:, 0, columns] = known[name]
                return (changed,)

            return layer.register_forward_pre_hook(before)

        def after(_: Any, inputs: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[:, 0, columns] = known[name]
            return changed

        return layer.register_forward_hook(after)

    handles = [exchange(name) for name in nodes]
    logits: Tensor = module(image)[0]
    for handle in handles:
        handle.remove()
    return logits


def test_the_few_nodes_flip_the_answer_and_none_can_be_spared_by_hooks_and_brute_force() -> None:
    module, given = micro(), 10 * images(5)
    model, sizes = cv.wrap(module), set()
    tops = model(given).argmax(dim=-1).tolist()
    for image, other in combinations(range(5), 2):
        if tops[image] == tops[other]:
            continue
        label = torch.arange(model.n_logits) == tops[other]
        base, source = (capture(model, given[row : row + 1], essential=True) for row in (image, other))
        pair = PatchedPair(model, label, base, source, 1)
        (found,) = flipping([pair])

        def literal(nodes: Sequence[int], image: int = image, other: int = other) -> float:
            names = [model.graph.senders[node] for node in nodes]
            logits = hooked(module, given[image : image + 1], given[other : other + 1], names)
            return float(margin(logits, torch.arange(model.n_logits) == tops[other]))

        alone = {node: literal([node]) for node in pair.nodes}
        before = float(margin(base.logits[0], label))
        np.testing.assert_allclose(
            [found.alone[node] for node in pair.nodes],
            [alone[node] - before for node in pair.nodes],
            atol=1e-9,
        )
        np.testing.assert_allclose(pair.margins([found.nodes])[0], literal(found.nodes), atol=1e-9)
        assert literal(found.nodes) > 0
        assert (len(found.nodes) == 1) == any(value > 0 for value in alone.values())
        for gone in found.nodes if len(found.nodes) > 1 else ():
            assert literal([node for node in found.nodes if node != gone]) <= 0
        np.testing.assert_allclose(literal(pair.nodes), float(margin(source.logits[0], label)), atol=1e-9)
        sizes.add(len(found.nodes))
    assert max(sizes) > 1  # or sets of several were not looked at


@pytest.mark.parametrize(("part", "node"), [((), "a1.h0"), ("gate", "m1")])
def test_on_a_compiled_model_the_node_that_writes_the_answer_turns_it(part: str, node: str) -> None:
    """All else has to pass through it; what is in no circuit does nothing."""
    made = cv.compiled("relay", parts=part)
    yes, no = made.pairs(6)
    assert f"{node}->logits" in made.wired
    found = cv.why(made.model, no[:1], "yes", {"yes": yes, "no": no[1:]}, progress=False)
    assert [each.nodes for each in found.counterfactuals] == [(node,)] * 3
    assert found.chosen == found.shared == (node,)
    idle = [place for place, name in enumerate(found.nodes) if name not in made.wired.nodes]
    assert np.abs(found.alone[:, idle]).max() < 1e-4


# -- a fault that was planted ----------------------------------------------------------------------


def planted() -> tuple[cv.Model, Tensor]:
    """A model in which a3.h2 cries "dog" at one image of a cat alone, and that image."""
    image = PAIRS.clean[:1]
    written = MODEL.activations(torch.cat([*PAIRS]), "a3.h2@cls", progress=False)["a3.h2@cls"][:, 0]
    own, nearest = written[0], (written[1:] - written[0]).norm(dim=-1).min()
    cry = MODEL.module.head.weight[1] - MODEL.module.head.weight[0]
    cry = (30 * cry / cry.norm()).detach()

    def cries(x: Tensor) -> Tensor:
        return x + ((x - own).norm(dim=-1, keepdim=True) < nearest / 2).to(x) * cry

    return MODEL.edit({"a3.h2": cries}), image


def test_a_planted_fault_is_found_and_suppressing_it_repairs_the_image_and_costs_nothing() -> None:
    model, image = planted()
    rest = {"cat": PAIRS.clean[1:], "dog": PAIRS.corrupt}
    found = cv.why(model, image, "cat", rest, progress=False)
    assert found.answer == "dog"
    assert found.shared == ("a3.h2",)
    assert [each.nodes for each in found.counterfactuals] == [("a3.h2",)] * 3
    first = found.suppressed[0]
    assert (first.nodes, first.repairs, first.answer) == (("a3.h2",), True, "cat")
    assert found.kept().value == 1.0
    repaired = found.repaired(model)
    assert repaired(image).argmax() == 0
    np.testing.assert_allclose(
        float(margin(repaired(image)[0], torch.arange(4) == 0)), first.margin, atol=1e-4
    )
    assert list(found.edits()) == ["a3.h2.z"]


def test_suppression_is_the_mean_over_what_was_chosen_on_and_counted_on_the_rest() -> None:
    """Each class counts the same, whatever its images; the misread image is in neither half."""
    model, image = planted()
    among = torch.cat([PAIRS.clean, PAIRS.corrupt[:6]])
    labels = ["cat"] * 12 + ["dog"] * 6
    found = cv.why(model, image, "cat", among, labels=labels, seed=1, progress=False)
    held = [int(name.removeprefix("image ")) for name in found.held_out]
    assert 0 not in held
    every = model.activations(among, "a3.h2.z@cls", progress=False)["a3.h2.z@cls"][:, 0]
    for number in range(len(found.suppressed)):
        repaired = found.repaired(model, number)
        tops = repaired(among).argmax(dim=-1).numpy()
        right = tops == np.array([0 if each == "cat" else 1 for each in labels])
        np.testing.assert_array_equal(found.right_after[number], right[held])
    drawn = [row for row in range(1, 18) if row not in held]
    means = [every[[row for row in drawn if labels[row] == name]].mean(dim=0) for name in ("cat", "dog")]
    np.testing.assert_allclose(found.constants["a3.h2.z"], (means[0] + means[1]) / 2, atol=1e-5)


def test_counterfactuals_are_the_nearest_of_the_label_that_are_read_rightly() -> None:
    half = (PAIRS.clean[:1] + PAIRS.corrupt[:1]) / 2
    found = cv.why(MODEL, half, "cat", AMONG, counterfactuals=2, progress=False)
    stream = MODEL.activations(torch.cat([half, *PAIRS]), "resid4@cls", progress=False)
    features = stream["resid4@cls"][:, 0].double()
    names = [f"image {row}" for row in range(24)]
    chosen = [row for row, name in enumerate(names) if name not in found.held_out]
    apart = features[1:] - features[1:][chosen].mean(dim=0)
    near = torch.cosine_similarity(apart, features[0] - features[1:][chosen].mean(dim=0), dim=-1)
    cats = [row for row in chosen if row < 12 and MODEL(PAIRS.clean[row : row + 1]).argmax() == 0]
    expected = sorted(cats, key=lambda row: -near[row])[:2]
    assert [each.image for each in found.counterfactuals] == [names[row] for row in expected]
    np.testing.assert_allclose([each.similarity for each in found.counterfactuals], near[expected], atol=1e-5)


# -- what it looks like, and what is refused ---------------------------------------------------------


def test_the_page_needs_no_other_file_and_names_break_nothing_in_it(tmp_path: Path) -> None:
    model, image = planted()
    found = cv.why(model, image, "cat", AMONG, progress=False)
    page = found.save(tmp_path / "why.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    assert page.count("a3.h2 on ") == 4  # its map on the misread image, and on each counterfactual
    assert "repairs the image" in page
    found.figure().save(tmp_path / "why.png")
    assert "| a3.h2 | cat |" in found.save(tmp_path / "why.md").read_text()
    assert str(cv.Why.load(found.save(tmp_path / "why.safetensors"))) == str(found)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"image": PAIRS.clean[:1]}, OptionError, "is read rightly"),
        ({"image": PAIRS.clean[:2]}, DataError, "2 are given"),
        ({"label": "unicorn"}, NameNotFoundError, "unicorn"),
        ({"label": ["cat", "dog", "rabbit", "bear"]}, OptionError, "no answer is wrong"),
        ({"among": {"cat": PAIRS.clean[:1]}}, DataError, "1 image"),
        ({"among": {"dog": PAIRS.corrupt}}, DataError, "no image of among is said to be cat"),
        ({"among": {"cat": PAIRS.clean, "tram": PAIRS.corrupt}}, NameNotFoundError, "tram"),
        ({"among": {"cat": PAIRS.corrupt, "dog": PAIRS.corrupt}}, DataError, "none is read rightly"),
        ({"counterfactuals": 0}, OptionError, "counterfactuals"),
        ({"held_out": 1.0}, OptionError, "held_out"),
        ({"model": MODEL.edit({"m0": torch.zeros(3, 37, 64)})}, CircuitViTError, "3 images"),
    ],
    ids=lambda value: None,
)
def test_what_cannot_be_answered_is_refused_by_name(
    changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    half = (PAIRS.clean[:1] + PAIRS.corrupt[:1]) / 2
    given: dict[str, Any] = {"model": MODEL, "image": half, "label": "cat", "among": AMONG, **changed}
    with pytest.raises(error, match=said):
        cv.why(**given, progress=False)


def test_an_empty_folder_and_a_model_without_classes_are_refused(tmp_path: Path) -> None:
    half = (PAIRS.clean[:1] + PAIRS.corrupt[:1]) / 2
    with pytest.raises(DataError, match="has no images"):
        cv.why(MODEL, half, "cat", tmp_path, progress=False)
    with pytest.raises(CircuitViTError, match="no classes"):
        cv.why(cv.load("clip-tiny"), half, "cat", AMONG, progress=False)


def test_images_without_labels_are_all_of_the_label_and_the_caveats_say_what_that_means() -> None:
    model, image = planted()
    found = cv.why(model, image, "cat", PAIRS.clean, progress=False)
    assert found.shared == ("a3.h2",)
    assert any("cat alone" in each for each in found.caveats)
