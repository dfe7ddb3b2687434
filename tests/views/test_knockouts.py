"""Attention knock-outs: against raw weights written out, and on a compiled model whose one route is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import NameNotFoundError, OptionError
from circuitvit.views import segmentation_change
from tests.views.literal_vit import literal, micro

CLS, PATCH = torch.arange(5) == 0, torch.arange(5) > 0
KINDS = {"cls": CLS, "patch": PATCH}


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.manual_seed(seed))


def between(source: str, target: str) -> Tensor:
    return KINDS[target][:, None] & KINDS[source][None, :]


def test_renormalised_attention_is_that_of_scores_of_minus_infinity() -> None:
    model, module = micro()
    found = cv.knock_outs(model, images(), by="head", metric=cv.logit(1), progress=False)
    assert [place.name for place in found.places] == ["a0.h0", "a0.h1", "a1.h0", "a1.h1"]
    for pair, names in enumerate(found.pairs):
        for place, where in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
            logits = literal(module, images(), {where: between(*names)})
            np.testing.assert_allclose(found.outcomes.after[pair, place], logits[:, 1], atol=1e-4)
    plain = literal(module, images())
    np.testing.assert_allclose(found.outcomes.before, plain[:, 1], atol=1e-4)


def test_a_window_knocks_out_all_of_its_layers() -> None:
    model, module = micro()
    found = cv.knock_outs(
        model, images(), sources=["patch"], targets=["cls"], window=2, metric=cv.logit(0), progress=False
    )
    assert [place.name for place in found.places] == ["layers 0-1"]
    lost = {(layer, head): between("patch", "cls") for layer in range(2) for head in range(2)}
    logits = literal(module, images(), lost)
    np.testing.assert_allclose(found.outcomes.after[0, 0], logits[:, 0], atol=1e-4)
    divergence = cv.tasks.divergence(literal(module, images()), logits)
    assert found.outcomes.kl is not None
    np.testing.assert_allclose(found.outcomes.kl[0, 0], divergence, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("way", ["corrupt", "mean"])
def test_a_message_of_a_reference_run_stands_in(way: str, batch_size: int) -> None:
    """Also for groups that differ between images, and in batches."""
    model, module = micro()
    members = torch.tensor([[0, 1, 1, 2, 2], [0, 2, 1, 1, 2]] * 3)
    groups = cv.TokenGroups(("cls", "object", "rest"), members)
    corrupt = images(seed=1)
    task = cv.Task(images(), corrupt, metric=cv.logit(2), groups=groups)
    found = cv.knock_outs(
        model, task, sources=["object"], targets=["rest"], way=way, layers=[[0, 1]],  # type: ignore[arg-type]
        batch_size=batch_size, progress=False,
    )  # fmt: skip
    for row in range(6):
        one, other = images()[row : row + 1], corrupt[row : row + 1]
        seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        literal(module, other if way == "corrupt" else images().mean(dim=0, keepdim=True), seen=seen)
        lost = (members[row] == 2)[:, None] & (members[row] == 1)[None, :]
        every = {(layer, head): lost for layer in range(2) for head in range(2)}
        logits = literal(module, one, every, seen)
        assert found.outcomes.after[0, 0, row] == pytest.approx(float(logits[0, 2]), abs=1e-4)


@pytest.mark.parametrize("way", ["corrupt", "renormalise"])
def test_the_one_route_of_a_compiled_model_is_found_and_nothing_else(way: str) -> None:
    """The head a1.h0 looks for the mark of an MLP, and takes what stands there to the class token."""
    known = cv.compiled("key")
    task = cv.Task(*known.pairs(6), metric=cv.logit_diff("yes", "no"))
    found = cv.knock_outs(known.model, task, by="head", way=way, progress=False)  # type: ignore[arg-type]
    first, second = found.strongest(2)
    assert first[:3] == ("patch", "cls", "a1.h0")
    assert first[3].value < -5
    # renormalised, the head has more attention for the mark once it no longer looks at the class token, and
    # decoys that write something else move the last norm a little
    assert abs(second[3].value) < (1e-3 if way == "corrupt" else 0.5)  # against 12
    others = [place.name != "a1.h0" for place in found.places]
    assert np.abs(found.effects()[:, others]).max() < (1e-3 if way == "corrupt" else 0.05)


def test_attention_that_is_not_paid_is_no_loss() -> None:
    model = cv.load("catdog-tiny")
    deaf = model.edit({"a2.h1.pattern@patch->cls": cv.knock_out()})
    pairs = catdog_pairs(5, seed=0)
    found = cv.knock_outs(
        deaf, pairs.clean, sources=["patch"], targets=["cls"], by="head", layers=[2], progress=False
    )
    changes = np.abs(found.outcomes.values()).max(axis=-1)[0]
    assert changes[1] == pytest.approx(0, abs=1e-5)
    assert (changes[[2, 3]] > 1).all()


def test_causal_attention_is_a_knock_out_too() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(5, seed=0)
    found = cv.knock_outs(model, pairs.clean, way="causal-first", layers=[range(4), 2], progress=False)
    assert found.pairs == (("later tokens", "all"),)
    edited = model.edit({"a*.pattern": cv.causal("first")})
    np.testing.assert_allclose(found.outcomes.after[0, 0], edited(pairs.clean)[:, 0], atol=1e-4)
    assert "causal-first" in repr(found)


def test_estimates_figures_and_caveats(tmp_path: Path) -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(6, seed=0)
    task = cv.Task(pairs.clean, pairs.corrupt, metric=cv.logit_diff("cat", "dog"))
    found = cv.knock_outs(model, task, way="zero", progress=False)
    strongest = found.strongest(1)[0]
    effect = found.estimate(*strongest[:3])
    assert effect.low is not None
    assert effect.high is not None
    assert effect.low < effect.value < effect.high
    assert 0 <= found.estimate(*strongest[:3], of="flips").value <= 1
    assert any("plain 0" in caveat for caveat in found.caveats)
    assert any("no proof" in caveat for caveat in found.caveats)
    assert any("6 images only" in caveat for caveat in found.caveats)
    heads = cv.knock_outs(model, task, by="head", targets=["cls"], progress=False)
    for each, shape in ((found, (4, 4)), (heads, (4, 4))):
        figure = each.figure(of="kl")
        text = figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
        assert all(f"{source} → {target}" in text for source, target in each.pairs)
        drawn = figure.axes[0].images[0].get_array()
        assert np.shape(drawn) == shape
        expected = each.effects("kl") if each is found else each.effects("kl")[0].reshape(4, 4)
        np.testing.assert_array_equal(drawn, expected)
    with pytest.raises(NameNotFoundError, match="unknown pair"):
        found.estimate("patch", "dog", "layer 0")


def test_what_cannot_be_knocked_out_is_refused() -> None:
    model, clean = cv.load("catdog-tiny"), catdog_pairs(2, seed=0).clean
    for error, match, options in [
        (NameNotFoundError, "unknown way of knocking out 'mena'", {"way": "mena"}),
        (NameNotFoundError, "unknown token group", {"sources": ["reg"]}),
        (NameNotFoundError, "unknown kind of place", {"by": "neuron"}),
        (OptionError, "no attention in layer 7", {"layers": [7]}),
        (OptionError, "window of 9 layers", {"window": 9}),
        (OptionError, "leave out layers=", {"window": 2, "by": "head"}),
        (OptionError, "no corrupt images", {"way": "corrupt"}),
        (OptionError, "no sources and targets", {"way": "causal-last", "targets": ["cls"]}),
        (OptionError, "no layers are named", {"layers": []}),
    ]:
        with pytest.raises(error, match=match):
            cv.knock_outs(model, clean, progress=False, **options)
    with pytest.raises(OptionError, match="the task says what is measured"):
        cv.knock_outs(model, cv.Task(clean, ablation="zero"), metric="logit", progress=False)


def test_what_edits_do_to_outlines() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(5, seed=2)
    edits = {
        "same": model.edit({"m3": lambda x: x}),
        "blind": model.edit({"a*.pattern@patch->patch": cv.knock_out()}),
    }
    masks = np.indices((5, 48, 48))[1] > 20
    found = segmentation_change(model, edits, pairs.clean, masks, "cat", "dog")
    assert np.abs(found.values("same")).max() == 0
    own = cv.views.patch_evidence(edits["blind"], pairs.clean, "cat", "dog").score(masks, "mean")
    for of in ("average_precision", "iou_best", "iou_fixed"):
        expected = [getattr(b, of) - getattr(a, of) for a, b in zip(found.before, own, strict=True)]
        np.testing.assert_allclose(found.values("blind", of), expected)
    assert "blind" in repr(found)
    with pytest.raises(NameNotFoundError, match="unknown changed model"):
        found.estimate("causal")


def test_a_real_vit_needs_its_class_token_to_look_at_patches(shared_data: Path) -> None:
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = sorted((shared_data / "images" / "imagenet").glob("*.jpg"))[::100]
    found = cv.knock_outs(
        model, photos, sources=["patch"], targets=["cls"], layers=[range(12)], progress=False
    )
    assert found.estimate("patch", "cls", "layers 0-11", of="flips").value == 1
