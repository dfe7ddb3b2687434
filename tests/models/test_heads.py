"""Linear heads put on a model: the model that came with this classifier says the same, to rounding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.errors import FileError, ModelError, NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.models import Head
from circuitvit.models.decompose import DRAWS
from circuitvit.tasks.classes import class_index
from circuitvit.views.attribution import attribution_of_task
from circuitvit.views.lens import logit_lens
from tests.models.test_hooked import hooked
from tests.reference.hooked import HookedModule
from tests.rightness import CLASSES, CLEAN, CORRUPT, METRIC, finished, micro, prove
from tests.strategies import Recipe, assert_close

WIDTH = 24
RECIPES = {
    "class-token": Recipe(depth=2, heads=2, classes=4, registers=1),
    "average": Recipe(depth=2, heads=2, classes=4, pool="avg"),
    "average-without-fc-norm": Recipe(depth=2, heads=2, classes=4, pool="avg", fc_norm=False),
    "maximum": Recipe(depth=2, heads=2, classes=4, pool="max", norm="rms"),
    "one-logit": Recipe(depth=2, heads=2, classes=1),
}


def bare(module: Any) -> Any:
    """The same module without its classifier."""
    without = copy.deepcopy(module)
    without.reset_classifier(0)
    return without


class Bent(nn.Module):
    """No norm that is known."""

    def forward(self, normed: Tensor) -> Tensor:
        return normed.tanh()


def drawn(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(model: cv.Model, recipe: Recipe, method: str) -> np.ndarray[Any, Any]:
    metric = cv.logit(0) if recipe.classes == 1 else METRIC
    task = cv.Task(recipe.images(3), recipe.images(3, 1), metric)
    return cv.attribute(model, task, method, progress=False).values


# -- the same as built in ------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_a_head_on_features_is_the_classifier_built_in(name: str) -> None:
    recipe = RECIPES[name]
    module = recipe.build()
    built_in, features = cv.wrap(module), cv.wrap(bare(module))
    put_on = cv.with_head(features, module.head.weight, module.head.bias)
    replaced = cv.with_head(built_in, module.head.weight, module.head.bias)
    for model in (put_on, replaced):
        assert_close(model(recipe.images(3)), module(recipe.images(3)), 1e-10)
        assert (model.leading, model.n_logits, model.has_classes) == (built_in.leading, recipe.classes, True)
        assert model.weights_hash == built_in.weights_hash
        for method in ("eap", "exact", "local", "eap-ig", "relp"):
            expected = scores(built_in, recipe, method)
            assert abs(scores(model, recipe, method) - expected).max() <= 1e-10 * abs(expected).max(), method


def test_the_features_of_a_distilled_model_are_the_mean_of_two_tokens() -> None:
    recipe = Recipe(depth=2, heads=2, classes=4, distilled=True)
    module = recipe.build()
    weight, bias = drawn(3, 12), drawn(3)
    expected = bare(module)(recipe.images(2)) @ weight.T + bias
    assert_close(cv.with_head(cv.wrap(bare(module)), weight, bias)(recipe.images(2)), expected, 1e-10)
    with pytest.raises(UnsupportedModelError, match=r"2 classifiers \(head, head_dist\).*tokens='cls'"):
        cv.with_head(cv.wrap(module), weight, bias)
    assert cv.with_head(cv.wrap(module), weight, bias, tokens="cls").leading == 1


@pytest.mark.parametrize("tokens", ["pooled", "cls", "mean"])
def test_edges_are_those_of_hooks_on_the_original(tokens: Any) -> None:
    module = micro(reg_tokens=2)
    weight, bias = drawn(CLASSES, WIDTH), drawn(CLASSES)
    chosen = {"pooled": lambda normed: normed[:, 0], "cls": lambda normed: normed[:, 0]}
    mean = chosen.get(tokens, lambda normed: normed[:, 3:].mean(dim=1))
    places = hooked(module)
    original = HookedModule(
        lambda images: mean(module.forward_features(images)) @ weight.T + bias,
        places.senders,
        places.receivers,
    )
    model = cv.with_head(cv.wrap(module), weight, bias, tokens=tokens)
    assert_close(model(CLEAN), original.run(CLEAN), 1e-10)
    prove(model, original, CLEAN, CORRUPT)


@pytest.mark.parametrize(("tokens", "leading"), [("pooled", None), ("cls", 1), ("mean", None)])
def test_tokens_that_are_said_to_be_unread_are(tokens: Any, leading: int | None) -> None:
    """The average of a model whose class token its own readout does not read."""
    recipe = Recipe(depth=1, heads=2, registers=1, pool="avg")
    model = cv.with_head(cv.wrap(recipe.build()), drawn(3, 12), tokens=tokens)
    assert model.leading == leading
    stream, readout = model.embed(recipe.images(2)), model.stages[-1]
    logits = readout.write((stream,))
    for token in range(stream.shape[1]):
        moved = stream.expand(DRAWS, *stream.shape).flatten(0, 1).clone()
        moved[:, token] += 10 * drawn(len(moved), stream.shape[2])
        changed = not torch.allclose(readout.write((moved,)), logits.repeat(DRAWS, 1))
        assert changed == (token == 0 if tokens == "cls" else token >= 2)


def clip_tower() -> tuple[Any, Any]:
    """CLIP's image tower, whose features are projected, and its features."""
    towers = pytest.importorskip("open_clip.transformer")
    module = finished(towers.VisionTransformer(
        image_size=32, patch_size=16, width=24, layers=2, heads=2, mlp_ratio=2, output_dim=10,
    ))  # fmt: skip
    return module, module


def dino() -> tuple[Any, Any]:
    """DINOv2 of transformers, and its features."""
    kinds = pytest.importorskip("transformers")
    config = kinds.Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=32, patch_size=16
    )
    module = finished(kinds.Dinov2Model(config))
    return module, lambda images: module(images).pooler_output


@pytest.mark.parametrize("make", [clip_tower, dino])
def test_the_features_of_other_libraries_take_a_head(make: Any) -> None:
    module, features = make()
    model = cv.wrap(module)
    assert not model.has_classes
    weight, bias = drawn(3, model.n_logits), drawn(3)
    headed = cv.with_head(model, weight, bias)
    with torch.no_grad():
        assert_close(headed(CLEAN), features(CLEAN) @ weight.T + bias, 1e-10)
    clean, _ = attribution_of_task(headed, cv.Task(CLEAN, CORRUPT, METRIC))
    logits = headed(CLEAN)
    np.testing.assert_allclose(clean.total, logits[:, 0] - logits[:, 1], rtol=1e-9)
    unprojected = cv.with_head(model, drawn(3, WIDTH), tokens="mean")
    assert abs(cv.attribute(unprojected, cv.Task(CLEAN, CORRUPT, METRIC), "relp").values).max() > 0


def test_attention_pooling_stays_and_its_edges_too() -> None:
    module = micro(global_pool="map", class_token=False)
    model, weight = cv.wrap(module), drawn(3, WIDTH)
    without = copy.deepcopy(module)
    without.head = nn.Identity()
    headed = cv.with_head(model, weight)
    assert_close(headed(CLEAN), without(CLEAN) @ weight.T, 1e-10)
    assert headed.graph == model.graph
    with pytest.raises(UnsupportedModelError, match=r"pools by stages of its own.*leave out tokens"):
        cv.with_head(model, weight, tokens="mean")


# -- every method works on it --------------------------------------------------------------------


@pytest.mark.parametrize("tokens", ["pooled", "cls", "mean"])
def test_shares_of_direct_attribution_add_up(tokens: Any) -> None:
    model = cv.with_head(cv.wrap(micro(reg_tokens=1)), drawn(4, WIDTH), drawn(4), tokens=tokens)
    clean, corrupt = attribution_of_task(model, cv.Task(CLEAN, CORRUPT, METRIC))
    assert corrupt is not None
    for view, images in ((clean, CLEAN), (corrupt, CORRUPT)):
        logits = model(images)
        np.testing.assert_allclose(view.total, logits[:, 0] - logits[:, 1], rtol=1e-9)


def test_the_lens_ends_with_the_heads_own_logits() -> None:
    model = cv.with_head(cv.wrap(bare(micro())), drawn(3, WIDTH), drawn(3), classes=("a", "b", "c"))
    lens = logit_lens(model, CLEAN)
    np.testing.assert_allclose(lens.pooled[-1], model(CLEAN), rtol=1e-5)
    assert set(lens.labels.values()) <= {"a", "b", "c"}


def test_a_circuit_is_found_and_verified() -> None:
    model = cv.with_head(cv.wrap(bare(micro())), drawn(2, WIDTH), classes=("cat", "dog"))
    task = cv.Task(CLEAN[:1], CORRUPT[:1], cv.logit_diff("cat", "dog"))
    found = cv.find(model, task, plan=cv.Plan(0, 200, 2), progress=False)
    report = cv.verify(model, task, found.circuit, n_random=0, progress=False)
    assert 0.9 <= report.task.faithfulness.value <= 1.1
    assert report.task.agreement is not None


def test_one_logit_is_no_choice_between_classes() -> None:
    """The KL of a single logit is 0 whatever happens: nothing may go by it."""
    model = cv.with_head(cv.wrap(bare(micro())), drawn(1, WIDTH), classes=("cat",))
    task = cv.Task(CLEAN[:1], CORRUPT[:1], cv.logit("cat"))
    assert (model.has_classes, model.chooses) == (True, False)
    report = cv.verify(model, task, cv.Circuit.full(model.graph), n_random=0, progress=False)
    assert (report.task.agreement, report.task.kl) == (None, None)
    with pytest.raises(OptionError, match="divergence='metric'"):
        cv.acdc(model, task, tau=0.01, progress=False)
    assert len(cv.acdc(model, task, tau=0.01, divergence="metric", progress=False)) > 0


def test_scores_do_not_depend_on_the_batch_size() -> None:
    model = cv.with_head(cv.wrap(micro()), drawn(2, WIDTH), tokens="mean")
    task = cv.Task(CLEAN, CORRUPT, METRIC)
    one, two = (cv.attribute(model, task, "eap", batch_size=n, progress=False).values for n in (1, 2))
    np.testing.assert_allclose(one, two, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_head_takes_the_models_precision(dtype: torch.dtype) -> None:
    module = micro().to(dtype)
    model = cv.with_head(cv.wrap(module), drawn(2, WIDTH), drawn(2), tokens="mean")
    assert model.head is not None
    assert model.head.weight is not None
    assert model.head.weight.dtype == model(CLEAN.to(dtype)).dtype == dtype
    wide = cv.with_head(cv.wrap(micro()), drawn(2, WIDTH), drawn(2), tokens="mean")
    expected = wide(CLEAN)
    assert_close(model(CLEAN.to(dtype)).double(), expected, 200 * torch.finfo(dtype).eps)


# -- weights -------------------------------------------------------------------------------------


def test_edits_of_head_and_module_are_noticed() -> None:
    module, weight = bare(micro()), drawn(2, WIDTH)
    features = cv.wrap(module)
    model = cv.with_head(features, weight, drawn(2))
    task = cv.Task(CLEAN, CORRUPT, METRIC)
    before, hashed = cv.attribute(model, task, "eap", progress=False).values, model.weights_hash
    assert hashed != features.weights_hash
    weight.data.mul_(2)
    np.testing.assert_allclose(cv.attribute(model, task, "eap", progress=False).values, 2 * before)
    assert model.weights_hash != hashed
    module.blocks[0].attn.qkv.weight.data.mul_(-0.5)
    fresh = cv.with_head(cv.wrap(module), weight, drawn(2))
    found, expected = (cv.attribute(each, task, "eap", progress=False).values for each in (model, fresh))
    np.testing.assert_allclose(found, expected, atol=1e-12)
    module.blocks[0].norm1 = nn.LayerNorm(WIDTH).double()
    with pytest.raises(ModelError, match="wrap the module again"):
        cv.attribute(model, task, "eap", progress=False)


def test_the_hash_tells_heads_and_what_they_read_apart() -> None:
    module = micro()
    model, weight = cv.wrap(module), drawn(2, WIDTH)
    heads = [cv.with_head(model, weight, tokens=tokens) for tokens in ("pooled", "mean")]
    heads += [cv.with_head(model, 2 * weight), cv.with_head(model, 2 * weight, tokens="mean")]
    heads += [cv.with_head(model, None), cv.with_head(model, None, tokens="mean")]
    assert len({model.weights_hash, *(each.weights_hash for each in heads)}) == 7
    module.norm = Bent().eval()
    heads = [cv.with_head(cv.wrap(bare(module)), factor * weight) for factor in (1, 2)]
    assert heads[0].weights_hash != heads[1].weights_hash


def test_the_model_stays_as_it_was_and_a_copy_stands_alone() -> None:
    module = micro()
    model = cv.wrap(module)
    logits = model(CLEAN)
    put_on = cv.with_head(model, drawn(2, WIDTH))
    assert_close(model(CLEAN), logits, 0)
    copied = copy.deepcopy(put_on)
    expected = put_on(CLEAN)
    with torch.no_grad():
        module.blocks[0].mlp.fc1.weight.mul_(2)
        put_on.head.weight.mul_(2)
    assert_close(copied(CLEAN), expected, 0)
    with torch.no_grad():
        copied.head.weight.mul_(3)
    assert_close(copied(CLEAN), 3 * expected, 1e-12)


def test_without_a_weight_the_outputs_are_the_features() -> None:
    module = micro(reg_tokens=1)
    features = cv.with_head(cv.wrap(module), None, tokens="mean")
    assert (features.n_logits, features.has_classes) == (WIDTH, False)
    assert_close(features(CLEAN), module.forward_features(CLEAN)[:, 2:].mean(dim=1), 1e-12)


# -- files ---------------------------------------------------------------------------------------


def test_a_head_is_saved_and_put_on_again(tmp_path: Path) -> None:
    features = cv.wrap(bare(micro()))
    model = cv.with_head(features, drawn(2, WIDTH), drawn(2), classes=("a cat", "Größe"), tokens="mean")
    assert model.head is not None
    model.head.save(tmp_path / "head.safetensors")
    again = cv.with_head(features, tmp_path / "head.safetensors")
    assert again.weights_hash == model.weights_hash
    assert (again.classes, again.name) == (model.classes, model.name)
    assert torch.equal(again(CLEAN), model(CLEAN))
    circuit = cv.Circuit.full(model.graph)
    cv.verify(again, cv.Task(CLEAN[:1], CORRUPT[:1], METRIC), circuit, n_random=0, progress=False)


def test_files_that_are_no_heads(tmp_path: Path) -> None:
    features, path = cv.wrap(bare(micro())), tmp_path / "head.safetensors"
    with pytest.raises(FileError, match="there is no such file"):
        cv.with_head(features, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(FileError, match="no head, or a damaged one"):
        cv.with_head(features, path)
    weight = drawn(2, WIDTH)
    for tensors, said in (
        ({"weight": weight}, None),
        ({"other": weight}, {"head": "{}"}),
        ({"weight": weight}, {"head": '{"schema": "circuitvit.head/2"}'}),
        ({"weight": weight}, {"head": '{"schema": "circuitvit.head/1", "tokens": "all", "classes": null}'}),
        ({"weight": weight}, {"head": '{"schema": "circuitvit.head/1", "tokens": "cls", "classes": ["a"]}'}),
        ({"weight": weight * torch.nan}, {"head": '{"schema": "circuitvit.head/1", "tokens": "cls", '
                                                  '"classes": null}'}),
    ):  # fmt: skip
        save_file(tensors, path, said)
        with pytest.raises(FileError, match="head"):
            cv.with_head(features, path)


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": drawn(2, 5)}, r"a head on 5 features, and \w+ has 24 \(pooled\)"),
        ({"weight": drawn(WIDTH)}, r"is \(class, width\), not \(24,\)"),
        ({"weight": drawn(2, WIDTH), "bias": drawn(3)}, "3.*for 2 logits"),
        ({"weight": drawn(2, WIDTH), "classes": ("one",)}, "1 class names for a head with 2 logits"),
        ({"weight": drawn(2, WIDTH).long()}, "real numbers"),
        ({"weight": [["a"]]}, "real numbers|array of numbers"),
        ({"weight": None, "classes": ("one",)}, "no bias, no scale and no classes"),
        ({"weight": Head(drawn(2, WIDTH)), "classes": ("a", "b")}, "says its bias, classes and tokens"),
    ],
)
def test_heads_that_do_not_fit(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        cv.with_head(cv.wrap(bare(micro())), **arguments)


def test_what_cannot_have_this_head() -> None:
    weight = drawn(2, WIDTH)
    model = cv.wrap(bare(micro()))
    with pytest.raises(ModelError, match="NaN"):
        cv.with_head(model, weight * torch.nan)
    with pytest.raises(NameNotFoundError, match="cls, mean"):
        cv.with_head(model, weight, tokens="registers")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="has a head put on already"):
        cv.with_head(cv.with_head(model, weight), weight)
    without_token = cv.wrap(micro(class_token=False, global_pool="avg"))
    with pytest.raises(OptionError, match="no class token"):
        cv.with_head(without_token, weight, tokens="cls")
    module = micro()
    module.norm = Bent().eval()
    with pytest.raises(UnsupportedModelError, match="num_classes=0"):
        cv.with_head(cv.wrap(module), weight)
    features = cv.with_head(cv.wrap(bare(module)), weight)  # as it is, it runs
    assert_close(features(CLEAN), bare(module)(CLEAN) @ weight.T, 1e-12)


def test_classes_of_one_name_are_told_apart_by_index() -> None:
    model = cv.with_head(cv.wrap(bare(micro())), drawn(3, WIDTH), classes=("cat", "cat", "dog"))
    with pytest.raises(OptionError, match=r"several classes are called 'cat'.*give the index"):
        class_index(model, "cat")
    prepared = cv.Task(CLEAN, CORRUPT, cv.logit_diff(0, 1)).prepare(model)
    assert prepared.metric.label == "logit_diff(cat (class 0), cat (class 1))"
