"""Corruptions: new tensors that differ from the image inside the mask only, and exactly as described."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from circuitvit.errors import DataError, OptionError
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.corruptions import (
    blank,
    blur,
    complement,
    gaussian_noise,
    mean_colour,
    read_mask,
    shuffle_patches,
)
from circuitvit.tasks.image_files import load_image

Corruption = Callable[..., Tensor]
HALF = (0.5, 0.5, 0.5)

ALL: list[Corruption] = [
    blank,
    mean_colour,
    partial(blur, sigma=2.0),
    partial(shuffle_patches, patch_size=4, seed=0),
    partial(gaussian_noise, std=0.5, seed=0),
]
every_corruption = pytest.mark.parametrize(
    "corrupt", ALL, ids=["blank", "mean_colour", "blur", "shuffle_patches", "gaussian_noise"]
)


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def box(top: int, bottom: int, left: int, right: int, size: tuple[int, int] = (16, 16)) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


@every_corruption
class TestEveryCorruption:
    def test_changes_the_image_and_nothing_it_was_given(self, corrupt: Corruption) -> None:
        images = pictures(2, 3, 16, 16)
        before = images.clone()
        after = corrupt(images)
        assert torch.equal(images, before)
        assert after.shape == images.shape
        assert after.dtype == images.dtype
        assert (after != images).float().mean() > 0.9

    def test_pixels_outside_the_mask_stay(self, corrupt: Corruption) -> None:
        images, mask = pictures(2, 3, 16, 16), box(0, 9, 2, 16)
        after = corrupt(images, mask=mask)
        assert torch.equal(after[..., ~mask], images[..., ~mask])
        assert (after[..., mask] != images[..., mask]).any()

    def test_a_single_image_is_a_batch_of_one(self, corrupt: Corruption) -> None:
        image, mask = pictures(3, 16, 16), box(0, 8, 0, 16)
        assert torch.equal(corrupt(image), corrupt(image[None])[0])
        assert torch.equal(corrupt(image, mask=mask), corrupt(image[None], mask=mask[None])[0])

    def test_each_image_may_have_its_own_mask(self, corrupt: Corruption) -> None:
        images = pictures(2, 3, 16, 16)
        masks = torch.stack([box(0, 8, 0, 16), box(0, 16, 8, 16)])
        after = corrupt(images, mask=masks)
        for index in range(2):
            assert torch.equal(after[index][:, ~masks[index]], images[index][:, ~masks[index]])

    def test_what_follows_in_the_batch_does_not_matter(self, corrupt: Corruption) -> None:
        images = pictures(3, 3, 16, 16)
        torch.testing.assert_close(corrupt(images)[:2], corrupt(images[:2]))

    def test_the_same_call_gives_the_same_answer(self, corrupt: Corruption) -> None:
        images = pictures(2, 3, 16, 16)
        torch.manual_seed(1)
        first = corrupt(images)
        torch.manual_seed(2)  # nothing depends on the global random state
        assert torch.equal(first, corrupt(images))

    def test_heights_and_widths_may_differ(self, corrupt: Corruption) -> None:
        assert corrupt(pictures(1, 1, 8, 20)).shape == (1, 1, 8, 20)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_precision_is_kept(self, corrupt: Corruption, dtype: torch.dtype) -> None:
        assert corrupt(pictures(1, 3, 16, 16).to(dtype)).dtype == dtype

    @pytest.mark.parametrize(
        ("images", "mask", "complaint"),
        [
            (torch.zeros(16, 16), None, r"not of shape \(16, 16\)"),
            (torch.zeros(0, 3, 16, 16), None, "images are"),
            (torch.zeros(3, 16, 16, dtype=torch.uint8), None, "floating-point numbers, not uint8"),
            (torch.zeros(3, 16, 16), torch.ones(16, 16), "boolean, .* not float32: write mask > 0"),
            (torch.zeros(3, 16, 16), torch.ones(8, 8, dtype=torch.bool), r"\(8, 8\) does not fit"),
            (torch.zeros(3, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool), "does not fit"),
            (torch.zeros(3, 3, 16, 16), torch.ones(2, 16, 16, dtype=torch.bool), "does not fit"),
            (torch.zeros(3, 16, 16), torch.zeros(16, 16, dtype=torch.bool), "the mask selects no pixel"),
            (
                torch.zeros(2, 3, 16, 16),
                torch.stack([box(0, 16, 0, 16), box(0, 0, 0, 0)]),
                "the mask of image 1 selects no pixel",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused(
        self, corrupt: Corruption, images: Tensor, mask: Tensor | None, complaint: str
    ) -> None:
        with pytest.raises(DataError, match=complaint):
            corrupt(images, mask=mask)


class TestBlank:
    def test_one_value_or_one_for_each_channel(self) -> None:
        images = pictures(2, 3, 4, 4)
        assert torch.equal(blank(images), torch.zeros_like(images))
        assert (blank(images, value=-1.0) == -1).all()
        assert torch.equal(blank(images, value=(1.0, 2.0, 3.0))[0, :, 0, 0], torch.tensor([1.0, 2.0, 3.0]))

    def test_a_value_for_a_channel_that_is_not_there(self) -> None:
        with pytest.raises(OptionError, match="one for each of 3 channels"):
            blank(pictures(3, 4, 4), value=(1.0, 2.0))


class TestMeanColour:
    def test_the_region_has_its_own_mean_in_each_image(self) -> None:
        images, mask = pictures(2, 3, 16, 16), box(3, 7, 2, 12)
        after = mean_colour(images, mask)
        expected = images[..., mask].mean(dim=-1, keepdim=True).expand(-1, -1, int(mask.sum()))
        torch.testing.assert_close(after[..., mask], expected)


class TestBlur:
    @pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
    def test_equals_a_convolution_with_mirrored_borders(self, sigma: float) -> None:
        images = pictures(2, 3, 24, 20).double()
        radius = int(np.ceil(4 * sigma))
        weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1).double() / sigma) ** 2)
        kernel = torch.outer(weights, weights) / weights.sum() ** 2
        padded = F.pad(images.flatten(0, 1)[:, None], (radius,) * 4, mode="reflect")
        expected = F.conv2d(padded, kernel[None, None])[:, 0].unflatten(0, (2, 3))
        torch.testing.assert_close(blur(images, sigma=sigma), expected)

    @pytest.mark.parametrize("sigma", [0.1, 3.0, 1e6])
    @pytest.mark.parametrize("size", [1, 2, 5])
    def test_a_plain_picture_stays_plain_however_small(self, size: int, sigma: float) -> None:
        plain = torch.full((1, size, size), 0.7)
        torch.testing.assert_close(blur(plain, sigma=sigma), plain)

    def test_more_blur_leaves_less_detail(self) -> None:
        details = [float(blur(pictures(1, 32, 32), sigma=sigma).std()) for sigma in (0.5, 2.0, 8.0, 100.0)]
        assert details == sorted(details, reverse=True)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, float("nan"), float("inf")])
    def test_sigma_is_above_zero(self, sigma: float) -> None:
        with pytest.raises(OptionError, match="sigma"):
            blur(pictures(3, 4, 4), sigma=sigma)


def patch_colours(images: Tensor) -> Tensor:
    """(image, patch): the first pixel of each 4 x 4 patch."""
    return images[:, 0, ::4, ::4].flatten(1)


def numbered_patches(count: int = 1) -> Tensor:
    """Pictures of 4 x 4 patches, each of one colour: its number."""
    numbers = torch.arange(16.0).reshape(4, 4)
    return numbers.repeat_interleave(4, 0).repeat_interleave(4, 1).expand(count, 2, 16, 16).clone()


class TestShufflePatches:
    def test_every_patch_moves_whole(self) -> None:
        for seed in range(20):
            after = shuffle_patches(numbered_patches(), 4, seed)
            numbers = patch_colours(after)[0]
            assert sorted(numbers.tolist()) == list(range(16))
            assert (numbers != torch.arange(16)).all()
            assert torch.equal(
                after, numbers.reshape(4, 4).repeat_interleave(4, 0).repeat_interleave(4, 1).expand_as(after)
            )

    def test_pixels_within_a_patch_keep_their_places(self) -> None:
        image = pictures(3, 8, 8)
        after = shuffle_patches(image, 4, seed=0)
        whole = {image[:, y : y + 4, x : x + 4].flatten().numpy().tobytes() for y in (0, 4) for x in (0, 4)}
        moved = {after[:, y : y + 4, x : x + 4].flatten().numpy().tobytes() for y in (0, 4) for x in (0, 4)}
        assert whole == moved

    def test_only_patches_wholly_inside_the_mask_take_part(self) -> None:
        mask = box(0, 9, 0, 9)  # patches 0, 1, 4 and 5, and a rim of others
        numbers = patch_colours(shuffle_patches(numbered_patches(), 4, 0, mask))[0].tolist()
        assert {number for place, number in enumerate(numbers) if place != number} == {0, 1, 4, 5}

    def test_each_image_and_each_seed_has_its_own_order(self) -> None:
        orders = [patch_colours(shuffle_patches(numbered_patches(2), 4, seed)) for seed in (0, 1)]
        assert not torch.equal(orders[0][0], orders[0][1])
        assert not torch.equal(orders[0], orders[1])

    def test_two_patches_change_places(self) -> None:
        assert patch_colours(shuffle_patches(numbered_patches(), 4, 0, box(0, 4, 0, 8)))[0, :2].tolist() == [
            1,
            0,
        ]

    def test_one_patch_cannot_be_shuffled(self) -> None:
        masks = torch.stack([box(0, 8, 0, 8), box(0, 7, 0, 7)])
        with pytest.raises(DataError, match="image 1 has 1 patches of 4 x 4 that may move"):
            shuffle_patches(numbered_patches(2), 4, 0, masks)

    @pytest.mark.parametrize("patch_size", [0, 3, 5, 32])
    def test_patches_must_divide_the_picture(self, patch_size: int) -> None:
        with pytest.raises(OptionError, match="do not divide a 16 x 16 picture"):
            shuffle_patches(numbered_patches(), patch_size, 0)


class TestGaussianNoise:
    def test_its_strength_is_std(self) -> None:
        noise = gaussian_noise(torch.zeros(4, 3, 64, 64), std=0.3, seed=5)
        assert float(noise.std()) == pytest.approx(0.3, rel=0.02)
        assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)

    def test_each_image_and_each_seed_has_its_own(self) -> None:
        first, second = (gaussian_noise(torch.zeros(2, 3, 8, 8), 1.0, seed) for seed in (0, 1))
        assert not torch.equal(first[0], first[1])
        assert not torch.equal(first, second)

    @pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
    def test_std_is_above_zero(self, std: float) -> None:
        with pytest.raises(OptionError, match="std"):
            gaussian_noise(pictures(3, 4, 4), std, 0)


class TestComplement:
    def test_with_its_mask_it_covers_every_pixel_once(self) -> None:
        mask = box(2, 5, 1, 9)
        assert torch.equal(complement(mask) ^ mask, torch.ones(16, 16, dtype=torch.bool))

    def test_labels_are_not_a_mask(self) -> None:
        with pytest.raises(DataError, match="write mask > 0"):
            complement(torch.zeros(4, 4, dtype=torch.uint8))


SPEC = InputSpec((3, 16, 16), HALF, HALF)


def label_file(path: Path, labels: np.ndarray[tuple[int, int], np.dtype[np.uint8]], mode: str = "L") -> Path:
    image = Image.fromarray(labels)
    if mode == "P":
        image = Image.new("P", image.size)
        image.putdata(labels.flatten().tolist())
        image.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])  # colours mean nothing, numbers do
    image.save(path)
    return path


class TestReadMask:
    @pytest.mark.parametrize("mode", ["L", "P"])
    def test_the_pixels_of_one_label_or_several(self, tmp_path: Path, mode: str) -> None:
        labels = np.zeros((16, 16), dtype=np.uint8)
        labels[:, :5], labels[:, 5:8] = 1, 2
        path = label_file(tmp_path / "labels.png", labels, mode)
        assert torch.equal(read_mask(path, 1, SPEC), torch.tensor(labels == 1))
        assert torch.equal(read_mask(path, [1, 2], SPEC), torch.tensor(labels > 0))
        assert torch.equal(read_mask(path, 0, SPEC), complement(read_mask(path, {1, 2}, SPEC)))

    def test_one_bit_drawings(self, tmp_path: Path) -> None:
        image = Image.fromarray(np.uint8([[0, 255]])).resize((16, 16), Image.Resampling.NEAREST).convert("1")
        image.save(tmp_path / "drawing.png")
        assert torch.equal(read_mask(tmp_path / "drawing.png", 1, SPEC), box(0, 16, 8, 16))

    @pytest.mark.parametrize("size", [(16, 16), (24, 16), (16, 24)])
    @pytest.mark.parametrize("picture", [(64, 48), (40, 90), (97, 61)])
    @pytest.mark.parametrize("crop_pct", [1.0, 0.8])
    def test_it_lies_where_the_preprocessed_picture_has_the_object(
        self, tmp_path: Path, size: tuple[int, int], picture: tuple[int, int], crop_pct: float
    ) -> None:
        """A white disc on black: after preprocessing, the mask must be where the picture is white."""
        width, height = picture
        y, x = np.mgrid[:height, :width]
        disc = ((x - 0.4 * width) ** 2 + (y - 0.6 * height) ** 2 < (0.25 * min(picture)) ** 2).astype(
            np.uint8
        )
        Image.fromarray(disc * 255).save(tmp_path / "picture.png")
        spec = InputSpec((3, *size), (0.0,) * 3, (1.0,) * 3, "bilinear", crop_pct)
        white = load_image(tmp_path / "picture.png", spec)[0]
        mask = read_mask(label_file(tmp_path / "labels.png", disc), 1, spec)
        assert mask.shape == size
        assert mask.dtype == torch.bool
        assert mask[white > 0.95].all()
        assert not mask[white < 0.05].any()

    def test_a_label_that_is_not_there(self, tmp_path: Path) -> None:
        path = label_file(tmp_path / "labels.png", np.uint8([[0, 1], [1, 255]]))
        with pytest.raises(
            DataError, match=r"no pixel of .*labels\.png has the value 2; there are 0, 1, 255"
        ):
            read_mask(path, 2, SPEC)

    def test_a_label_that_is_cropped_away(self, tmp_path: Path) -> None:
        labels = np.zeros((16, 64), dtype=np.uint8)
        labels[:, :8] = 1
        with pytest.raises(DataError, match=r"labels\.png with the value 1 are cropped away"):
            read_mask(label_file(tmp_path / "labels.png", labels), 1, SPEC)

    def test_photographs_and_missing_files_are_refused(self, tmp_path: Path) -> None:
        Image.new("RGB", (16, 16)).save(tmp_path / "photo.png")
        with pytest.raises(DataError, match=r"photo\.png holds colours \(RGB\)"):
            read_mask(tmp_path / "photo.png", 1, SPEC)
        with pytest.raises(DataError, match="no such file"):
            read_mask(tmp_path / "none.png", 1, SPEC)

    def test_real_pets_and_their_masks(self, shared_data: Path) -> None:
        spec = InputSpec((3, 224, 224), HALF, HALF, "bicubic", 0.9)
        folder = shared_data / "images/pets_masks"
        for path in sorted((folder / "masks").glob("*.png")):
            image = load_image(folder / "images" / f"{path.stem}.jpg", spec)
            cat, rest = read_mask(path, 1, spec), read_mask(path, [0, 255], spec)
            assert torch.equal(cat, complement(rest))
            assert torch.equal(blank(image, cat)[:, rest], image[:, rest])
