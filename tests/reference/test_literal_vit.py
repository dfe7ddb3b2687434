"""The literal model is worth comparing with: it gives timm's own logits, and its masks do what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

from circuitvit.models.timm_import import import_timm
from tests.reference.literal_acdc import pruned
from tests.reference.literal_module import ModuleViT
from tests.reference.literal_scores import path
from tests.reference.literal_vit import Groups, LiteralViT
from tests.strategies import Case, Recipe, assert_close, cases, recipes, scramble


@given(recipes())
def test_the_literal_model_gives_timms_own_logits(recipe: Recipe) -> None:
    module, images = recipe.build(), recipe.images(2)
    with torch.no_grad():
        assert_close(LiteralViT(module).run(images).logits, module(images))


@pytest.mark.parametrize("size", [(6, 6), (2, 8)])
def test_also_on_images_of_another_size(size: tuple[int, int]) -> None:
    module = Recipe(dynamic=True, registers=1).build()
    images = torch.randn(2, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(LiteralViT(module).run(images).logits, module(images))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_base_patch16_clip_224"]
)
def test_also_for_timms_own_configurations(name: str) -> None:
    module = import_timm().create_model(name, img_size=32, embed_dim=24, depth=2, num_heads=3, num_classes=5)
    module = module.double().eval()
    scramble(module, seed=0)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert_close(LiteralViT(module).run(images).logits, module(images))


@given(cases(ablations=("patch",)))
def test_with_every_edge_kept_it_is_the_base_run_and_with_none_the_reference_run(case: Case) -> None:
    every = case.literal.run(case.base, case.reference, lambda _: True, case.token_groups)
    nothing = case.literal.run(case.base, case.reference, lambda _: False, case.token_groups)
    assert_close(every.logits, case.literal.run(case.base).logits, 1e-12)
    assert_close(nothing.logits, case.literal.run(case.paired).logits, 1e-12)


def test_one_ablated_edge_changes_what_its_receiver_hears_and_nothing_before() -> None:
    case = Case(Recipe(depth=2, heads=2))
    whole = case.literal.run(case.base)
    cut = case.literal.run(case.base, case.reference, lambda name: name != "a0.h1->a1.h0<k>")
    heard = {name for name in whole.inputs if not torch.equal(whole.inputs[name], cut.inputs[name])}
    assert heard == {"a1.h0<k>", "m1", "logits"}
    change = case.reference["a0.h1"] - whole.outputs["a0.h1"]
    assert_close(cut.inputs["a1.h0<k>"] - whole.inputs["a1.h0<k>"], change)


def test_an_edge_of_a_token_group_changes_the_tokens_of_that_group_only() -> None:
    case = Case(Recipe(depth=1))
    groups = Groups(("cls", "patch"), torch.tensor([0, 1, 1, 1, 1]))
    whole = case.literal.run(case.base)
    cut = case.literal.run(case.base, case.reference, lambda name: name != "input->m0@patch", groups)
    difference = (cut.inputs["m0"] - whole.inputs["m0"]).abs().amax(dim=(0, 2))
    assert difference[0] < 1e-12
    assert difference[1:].min() > 0


def test_dead_edges_are_pruned_token_group_by_token_group() -> None:
    case = Case(Recipe(depth=2))
    groups = Groups(("cls", "patch"), torch.tensor([0, 1, 1, 1, 1]))

    def alive(*kept: str) -> set[str]:
        return pruned(
            case.literal, {name: name in kept for _, _, _, name in case.literal.edges(groups)}, groups
        )

    assert alive("input->m0@cls", "m0->logits@patch") == set()  # an MLP keeps tokens apart
    assert alive("input->m0@cls", "m0->logits@cls") == {"input->m0@cls", "m0->logits@cls"}
    assert alive("input->a0.h0<q>@cls", "a0.h0->logits@patch") == set()  # so do queries
    assert alive("input->a0.h0<v>@cls", "a0.h0->logits@patch") == {
        "input->a0.h0<v>@cls",
        "a0.h0->logits@patch",
    }
    assert alive("m0->m1@cls", "m1->logits@cls") == set()  # nothing of the input arrives


def test_paths_of_integration_weigh_one_in_all() -> None:
    for rule in ("midpoint", "gauss-legendre", "left"):
        for steps in (1, 2, 5):
            places = path(steps, rule)
            assert sum(weight for _, weight in places) == pytest.approx(1)
            assert all(0 <= place < 1 for place, _ in places)
    assert path(2, "midpoint") == [(0.25, 0.5), (0.75, 0.5)]
    assert path(2, "left") == [(0.0, 0.5), (0.5, 0.5)]
    thirds = [place for place, _ in path(2, "gauss-legendre")]
    assert thirds == pytest.approx([0.5 - 3**-0.5 / 2, 0.5 + 3**-0.5 / 2])


@given(recipes())
def test_from_the_modules_own_parts_it_is_the_same_model(recipe: Recipe) -> None:
    module, images = recipe.build(), recipe.images(2)
    formulas, parts = LiteralViT(module), ModuleViT(module)
    reference = {name: output.flip(0) for name, output in formulas.run(images).outputs.items()}
    with torch.no_grad():
        for kept in (None, lambda name: len(name) % 2 == 0):
            found = parts.run(images, reference, kept)
            expected = formulas.run(images, reference, kept)
            assert_close(found.logits, expected.logits)
            for name, output in expected.outputs.items():
                assert_close(found.outputs[name], output)
