"""Token groups: every token in exactly one, whatever the model's prefix and whatever the masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvit.errors import DataError, OptionError
from circuitvit.models import Model, wrap
from circuitvit.models.timm_import import import_timm
from circuitvit.tasks.groups import TokenGroups


def tiny_model(**options: Any) -> Model:
    """32 x 32 pixels in 4 x 4 patches of 8, unless told otherwise."""
    architecture: dict[str, Any] = {"img_size": 32, "patch_size": 8, "num_classes": 3, **options}
    vit = import_timm().models.vision_transformer.VisionTransformer(
        embed_dim=16, depth=1, num_heads=2, **architecture
    )
    return wrap(vit.eval(), name="tiny")


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def registers() -> Model:
    return tiny_model(reg_tokens=2)


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (32, 32)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


class TestTokenGroups:
    def test_single(self) -> None:
        groups = TokenGroups.single(5)
        assert (groups.names, groups.members.tolist(), groups.n_tokens) == (("all",), [0] * 5, 5)
        with pytest.raises(OptionError, match="at least one token"):
            TokenGroups.single(0)

    def test_it_shows_how_many_tokens_each_group_has(self) -> None:
        groups = TokenGroups(("cls", "patch"), torch.tensor([[0, 1, 1], [0, 1, 1]]))
        assert repr(groups) == "TokenGroups(cls: 2, patch: 4, in 2 images)"
        assert groups.n_tokens == 3

    @pytest.mark.parametrize("names", [(), (1, 2), ("a", "a"), ("a", ""), ("a b",), ("a@b",)])
    def test_bad_names_are_refused(self, names: Any) -> None:
        with pytest.raises(OptionError, match="token group"):
            TokenGroups(names, torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize(
        "members",
        [
            torch.zeros(3),
            torch.zeros(3, dtype=torch.int32),
            torch.tensor(0),
            torch.zeros(1, 1, 1, dtype=torch.int64),
            torch.zeros(0, dtype=torch.int64),
            torch.tensor([0, 2]),
            torch.tensor([-1, 0]),
            [0, 1],
        ],
    )
    def test_bad_members_are_refused(self, members: Any) -> None:
        with pytest.raises(OptionError, match="members"):
            TokenGroups(("a", "b"), members)


class TestByKind:
    @pytest.mark.parametrize(
        ("options", "names", "members"),
        [
            ({}, ("cls", "patch"), [0] + [1] * 16),
            ({"reg_tokens": 2}, ("cls", "reg", "patch"), [0, 1, 1] + [2] * 16),
            ({"class_token": False, "global_pool": "avg"}, ("patch",), [0] * 16),
            ({"class_token": False, "reg_tokens": 1, "global_pool": "avg"}, ("reg", "patch"), [0] + [1] * 16),
        ],
    )
    def test_only_the_kinds_that_there_are(
        self, options: dict[str, Any], names: tuple[str, ...], members: list[int]
    ) -> None:
        model = tiny_model(**options)
        n_tokens = model.embed(torch.zeros(1, 3, 32, 32)).shape[1]
        groups = TokenGroups.by_kind(model, n_tokens)
        assert groups.names == names
        assert groups.members.tolist() == members

    def test_there_must_be_patches(self, registers: Model) -> None:
        with pytest.raises(OptionError, match="3 tokens leave none for patches: the first are cls, reg, reg"):
            TokenGroups.by_kind(registers, 3)


class TestFromMasks:
    def test_patches_under_the_mask_are_its_group(self, registers: Model) -> None:
        groups = TokenGroups.from_masks(registers, {"dog": box(0, 16, 0, 8)})
        assert groups.names == ("cls", "reg", "dog", "patch")
        grid = torch.full((4, 4), 3)
        grid[:2, 0] = 2
        assert groups.members.tolist() == [0, 1, 1, *grid.flatten().tolist()]

    def test_tokens_are_numbered_as_the_model_cuts_them(self, model: Model) -> None:
        """Painting one patch must change the embedding of exactly the token that the mask selects."""
        plain = torch.zeros(1, 3, 32, 32)
        for row, column in ((0, 0), (0, 3), (2, 1), (3, 3)):
            mask = box(8 * row, 8 * row + 8, 8 * column, 8 * column + 8)
            painted = plain.masked_fill(mask, 1.0)
            changed = (model.embed(painted) != model.embed(plain)).any(dim=-1)[0]
            groups = TokenGroups.from_masks(model, {"spot": mask})
            assert torch.equal(groups.members == groups.names.index("spot"), changed)

    def test_half_a_patch_is_enough_unless_told_otherwise(self, model: Model) -> None:
        half, less = box(0, 4, 0, 8), box(0, 4, 0, 7)
        assert int((TokenGroups.from_masks(model, {"dog": half}).members == 1).sum()) == 1
        with pytest.raises(DataError, match="no patch belongs to 'dog': its mask covers none to 50%"):
            TokenGroups.from_masks(model, {"dog": less})
        assert int((TokenGroups.from_masks(model, {"dog": less}, threshold=0.4).members == 1).sum()) == 1

    def test_where_masks_overlap_the_first_wins(self, model: Model) -> None:
        cat, dog = box(0, 16, 0, 32), box(8, 32, 0, 32)
        for names in (("cat", "dog"), ("dog", "cat")):
            masks = {name: {"cat": cat, "dog": dog}[name] for name in names}
            groups = TokenGroups.from_masks(model, masks)
            assert groups.names == ("cls", *names)  # no patch is left over
            shared = groups.members[1:].reshape(4, 4)[1]
            assert (shared == 1).all()

    def test_a_mask_for_each_image(self, model: Model) -> None:
        dogs = torch.stack([box(0, 8, 0, 8), box(0, 0, 0, 0), box(0, 32, 0, 32)])
        groups = TokenGroups.from_masks(model, {"dog": dogs})
        assert groups.members.shape == (3, 17)
        assert (groups.members == 1).sum(dim=1).tolist() == [1, 0, 16]

    def test_masks_for_all_images_and_for_each_go_together(self, model: Model) -> None:
        dogs = torch.stack([box(8, 16, 0, 32), box(16, 24, 0, 32)])
        groups = TokenGroups.from_masks(model, {"sky": box(0, 8, 0, 32), "dog": dogs})
        rows = groups.members[:, 1:].reshape(2, 4, 4)[:, :, 0]
        assert rows.tolist() == [[1, 2, 3, 3], [1, 3, 2, 3]]

    def test_patches_need_not_be_square_nor_the_image(self) -> None:
        model = tiny_model(img_size=(16, 32), patch_size=(4, 16))
        groups = TokenGroups.from_masks(model, {"corner": box(0, 4, 16, 32, (16, 32))})
        assert groups.members.tolist() == [0, 2, 1, *[2] * 6]

    def test_models_for_any_size_take_masks_of_any_size(self) -> None:
        model = tiny_model(dynamic_img_size=True)
        groups = TokenGroups.from_masks(model, {"left": box(0, 16, 0, 24, (16, 48))})
        assert groups.n_tokens == model.embed(torch.zeros(1, 3, 16, 48)).shape[1] == 13
        with pytest.raises(DataError, match=r"takes no image of 20 x 48: .*divisible by patch size \(8\)"):
            TokenGroups.from_masks(model, {"left": box(0, 16, 0, 24, (20, 48))})

    @pytest.mark.parametrize(
        ("masks", "complaint"),
        [
            ({"dog": torch.ones(32, 32)}, "the mask 'dog' is float32 of shape"),
            ({"dog": torch.ones(1, 3, 32, 32, dtype=torch.bool)}, r"\(height, width\) or \(image, height"),
            ({"dog": box(0, 8, 0, 8, (64, 64))}, "tiny takes images of 32 x 32, not of 64 x 64"),
            ({"dog": box(0, 8, 0, 8), "cat": box(0, 8, 0, 8, (16, 16))}, "of one size"),
            (
                {"a": box(0, 32, 0, 32).expand(2, -1, -1), "b": box(0, 32, 0, 32).expand(3, -1, -1)},
                "one number of images",
            ),
            (
                {"a": box(0, 16, 0, 16), "b": box(0, 8, 0, 8)},
                "no patch belongs to 'b'.*earlier masks have them",
            ),
        ],
    )
    def test_masks_that_do_not_fit_are_refused(
        self, model: Model, masks: dict[str, Tensor], complaint: str
    ) -> None:
        with pytest.raises(DataError, match=complaint):
            TokenGroups.from_masks(model, masks)

    def test_a_model_whose_patches_do_not_divide_its_input(self) -> None:
        with pytest.raises(DataError, match="masks are 35 x 35, which 4 x 4 patches do not divide"):
            TokenGroups.from_masks(tiny_model(img_size=35), {"dog": box(0, 35, 0, 35, (35, 35))})

    @pytest.mark.parametrize(
        ("names", "threshold", "complaint"),
        [
            ((), 0.5, "use TokenGroups.by_kind"),
            (("cls",), 0.5, "a mask cannot be called 'cls'"),
            (("patch",), 0.5, "a mask cannot be called 'patch'"),
            (("my dog",), 0.5, "no spaces"),
            (("dog",), 0.0, "threshold"),
            (("dog",), 1.5, "threshold"),
        ],
    )
    def test_senseless_options_are_refused(
        self, model: Model, names: tuple[str, ...], threshold: float, complaint: str
    ) -> None:
        with pytest.raises(OptionError, match=complaint):
            TokenGroups.from_masks(model, dict.fromkeys(names, box(0, 8, 0, 8)), threshold)
