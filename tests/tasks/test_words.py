"""Words on pictures: where they are, what stays as it is, and what is refused by name."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvit as cv
from circuitvit.errors import DataError, FileError, NameNotFoundError, OptionError
from circuitvit.models import Model
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.lettering import PLACES, Box, Lettering, check_word
from circuitvit.tasks.word_files import write_pictures
from circuitvit.tasks.words import given, paste, write


@pytest.fixture(scope="module")
def model() -> Model:
    return cv.load("catdog-tiny")


def small(spec: InputSpec) -> Model:
    """A model of pictures of 48 x 48."""
    module = import_timm().models.VisionTransformer(
        img_size=48, patch_size=8, embed_dim=12, depth=1, num_heads=2, num_classes=3, in_chans=spec.size[0]
    )
    return cv.wrap(module.eval(), name="small", preprocessing=spec)


def photo(width: int = 120, height: int = 90, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


class TestPlaces:
    def test_named_places_are_where_they_say(self) -> None:
        for name, (across, down) in PLACES.items():
            (box,) = Lettering((name,), (0.2,)).lay((300, 200), ("dog",)).boxes
            middle = (box.left + box.right) / 600, (box.top + box.bottom) / 400
            for at, share in zip(middle, (across, down), strict=True):
                assert at < 1 / 3 if share == 0 else at > 2 / 3 if share == 1 else abs(at - 0.5) < 0.02
            assert box.left >= 0 <= box.top
            assert (box.right <= 300, box.bottom <= 200, box.bottom - box.top) == (True, True, 40)

    @pytest.mark.parametrize("name", ["Top-Left", "top_left", " top  left"])
    def test_names_may_be_written_in_any_way(self, name: str) -> None:
        assert Lettering((name,)).places == ("top left",)
        assert Lettering(("center",)) == Lettering(("middle",)) == Lettering(("centre",))

    def test_a_middle_is_kept_inside(self) -> None:
        lettering = Lettering(((0.5, 0.5), (1.0, 0.0)), (0.2, 0.1))
        middle, corner = lettering.lay((200, 100), ("dog",)).boxes
        assert (middle.left + middle.right) // 2 in (99, 100, 101)
        assert (middle.top + middle.bottom) // 2 == 50
        assert (corner.right, corner.top, corner.bottom - corner.top) == (200, 0, 10)

    def test_random_places_follow_the_seed_and_never_overlap(self) -> None:
        lettering = Lettering(("random",) * 3, (0.2,), seed=5)
        laid = [lettering.lay((300, 200), ("dog",), number).boxes for number in range(20)]
        assert laid == [lettering.lay((300, 200), ("dog",), number).boxes for number in range(20)]
        assert len(set(laid)) == 20
        assert not any(one.overlaps(other) for one, other, third in laid)
        assert not any(one.overlaps(third) or other.overlaps(third) for one, other, third in laid)
        assert Box(0, 0, 2, 2).overlaps(Box(1, 1, 3, 3))

    def test_a_word_that_is_too_long_is_made_smaller(self) -> None:
        fits = Lettering(sizes=(0.3,)).lay((300, 100), ("dog",))
        long = Lettering(sizes=(0.3,)).lay((300, 100), ("dog", "an animal that eats mice and meows"))
        assert (fits.shrunk, long.shrunk) == (False, True)
        assert long.boxes[0].right - long.boxes[0].left <= 300

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"places": ("botom",)}, "unknown place 'botom': did you mean 'bottom'"),
            ({"places": ((0.5, 1.5),)}, "shares of width and height"),
            ({"places": ()}, "no place for the word"),
            ({"sizes": (1.5,)}, "share of the picture's shorter side, not 1.5"),
            ({"sizes": (0.1, 0.2)}, "2 sizes for 1 places"),
            ({"look": "neon"}, "unknown look 'neon'"),
            ({"ink": "blck"}, "'blck' is no colour"),
            ({"ink": None}, "None is no colour"),
            ({"ink": "#ffffff"}, "cannot be seen on a plate in white"),
            ({"seed": "x"}, "the seed of random places must be a whole number, not 'x'"),
            ({"font": "no_such_font.ttf"}, "cannot write with the font no_such_font"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, wrong: dict[str, Any], message: str) -> None:
        with pytest.raises((OptionError, NameNotFoundError, FileError), match=message):
            Lettering(**wrong)

    def test_words_that_overlap_or_are_smudges_are_refused(self) -> None:
        with pytest.raises(OptionError, match="the word at 'centre' would overlap another one"):
            Lettering(("centre", "centre")).lay((200, 100), ("dog",))
        with pytest.raises(OptionError, match=r"letters of 4 pixels .* on a picture of 48 x 48: size=0.1 is"):
            Lettering(sizes=(0.1,)).lay((48, 48), ("dog",))
        with pytest.raises(OptionError, match="'an animal that eats mice and meows' is too long for it"):
            Lettering(sizes=(0.5,)).lay((48, 48), ("an animal that eats mice and meows",))


@pytest.mark.parametrize(
    ("word", "message"),
    [("", "an empty word"), ("  ", "an empty word"), ("a\nb", "no word of one line"), (7, "a word is a text"),
     ("dog 犬猫", "Pillow has no 犬, 猫"), (Path("nowhere.png"), "no image nowhere.png")],
)  # fmt: skip
def test_what_is_no_word_is_refused(word: Any, message: str) -> None:
    with pytest.raises((OptionError, DataError), match=message):
        check_word(word)


class TestPasted:
    @pytest.mark.parametrize("on", ["view", "picture"])
    @pytest.mark.parametrize("look", ["plate", "outline"])
    def test_outside_of_the_plate_not_a_pixel_differs(self, model: Model, on: Any, look: Any) -> None:
        signs = paste(model, photo(48, 48), "dog", neutral="sign", look=look, size=0.4, on=on, ink="navy")
        word, neutral, without = (signs.images(each).take(0, 1)[0] for each in ("word", "neutral", "without"))
        assert torch.equal(
            without, cv.tasks.images.as_images(photo(48, 48), model.preprocessing).take(0, 1)[0]
        )
        assert 100 < int(signs.mask.sum()) < 48 * 48 / 2
        for one in (word, neutral):
            differs = (one != without).any(dim=0)
            assert differs.any()
            assert not (differs & ~signs.mask[0]).any()
        assert (word != neutral).any()

    def test_on_the_view_a_picture_and_its_tensor_are_the_same(self, model: Model) -> None:
        picture = photo(48, 48)
        tensor = cv.tasks.images.as_images(picture, model.preprocessing).take(0, 1)
        view, own, whole = (
            paste(model, given, "dog", size=0.4, on=on).images().take(0, 1)
            for given, on in ((picture, "view"), (tensor, "picture"), (picture, "picture"))
        )
        assert torch.equal(view, own)
        assert torch.allclose(view, whole, atol=1.01 / 127.5)  # 8-bit pixels round the edges of letters

    def test_letters_are_black_on_white(self, model: Model) -> None:
        signs = paste(model, torch.zeros(1, 3, 48, 48), "dog", size=0.4)
        inside = signs.images().take(0, 1)[0][:, signs.mask[0]]
        assert (float(inside.min()), float(inside.max())) == (-1.0, 1.0)

    def test_a_word_that_is_cropped_away_is_said(self) -> None:
        model = small(InputSpec((3, 48, 48), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), crop_pct=0.875))
        wide = photo(400, 100)
        with pytest.raises(DataError, match=r"image 1: preprocessing crops the word away.*on='view'"):
            paste(model, [photo(100, 100), wide], "dog", place="left", on="picture")
        cut = paste(model, [photo(100, 100), wide], "dog", place=(0.4, 0.5), size=0.3, on="picture")
        assert cut.caveats == (
            "preprocessing cuts the word off in 1 of 2 images, first image 1: move it towards the middle, or "
            "paste with on='view'",
        )
        assert paste(model, [photo(), wide], "dog", place="left", size=0.3).caveats == ()

    def test_the_tokens_that_are_covered(self, model: Model) -> None:
        signs = paste(model, torch.zeros(2, 3, 48, 48), "mm", place="top left", size=8 / 48)
        assert (signs.boxes[0][0].left, signs.boxes[0][0].bottom) == (1, 9)
        assert torch.equal(signs.tokens(0.5).nonzero()[:, 1].unique(), torch.tensor([1, 2]))
        assert signs.groups().names == ("cls", "word", "patch")
        with pytest.raises(DataError, match="no patch belongs to 'word'"):
            signs.tokens(1.0)

    def test_a_camera_that_was_turned_and_a_grey_picture(self, model: Model, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        photo(90, 120, "L").transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
        photo(90, 120, "L").save(tmp_path / "upright.png")
        signs = paste(model, tmp_path, "dog", place="centre", size=0.3, on="picture")
        turned, upright = signs.images().take(0, 2)
        assert signs.names == ("turned.png", "upright.png")
        assert torch.equal(turned, upright)
        grey = small(InputSpec((1, 48, 48), (0.5,), (0.5,)))
        made = paste(grey, tmp_path, "dog", size=0.3, on="picture").images().take(0, 1)
        assert made.shape == (1, 1, 48, 48)

    def test_a_task_of_reading(self, model: Model) -> None:
        pictures = [photo(60, 60), photo(80, 50)]
        signs = paste(model, pictures, ["dog", "cat"], neutral="sign", size=0.3)
        task = signs.task(cv.logit_diff(cv.PerPair(("dog", "cat")), cv.PerPair(("cat", "dog"))))
        prepared = task.prepare(model)
        assert torch.equal(prepared.clean.take(0, 2), signs.images("word").take(0, 2))
        assert prepared.corrupt is not None
        assert torch.equal(prepared.corrupt.take(0, 2), signs.images("neutral").take(0, 2))
        assert prepared.pairing == "'dog', 'cat' written on each image, and 'sign' in its place"
        plain = signs.task("kl_divergence", against="without").prepare(model)
        assert plain.corrupt is not None
        assert torch.equal(plain.corrupt.take(1, 2), signs.images("without").take(1, 2))
        second = signs.select([1])
        assert (second.words, len(second)) == (("cat",), 1)
        assert torch.equal(second.images().take(0, 1), signs.images().take(1, 2))

    def test_words_are_counted_and_differ(self, model: Model) -> None:
        blank = torch.zeros(2, 3, 48, 48)
        with pytest.raises(OptionError, match="3 words for 2 images"):
            paste(model, blank, ["a", "b", "c"], size=0.3)
        with pytest.raises(OptionError, match="the neutral word of image 1 is the word itself"):
            paste(model, blank, ["cat", "dog"], neutral="dog", size=0.3)
        with pytest.raises(NameNotFoundError, match="unknown version of the images 'neutral'"):
            paste(model, blank, "dog", size=0.3).images("neutral")


def test_images_that_have_words_already(model: Model) -> None:
    signs = paste(model, torch.zeros(3, 3, 48, 48), ["dog", "cat", "dog"], neutral="sign", size=0.3)
    each = {version: signs.images(version).take(0, 3) for version in signs.versions}
    own = given(
        model, each["word"], each["without"], list(signs.words), neutral=each["neutral"], mask=signs.mask
    )  # type: ignore[arg-type]
    assert repr(own) == "GivenWords('dog', 'cat' (or a neutral word, or nothing) on 3 images)"
    for version in signs.versions:
        assert torch.equal(own.select([2, 0]).images(version).take(0, 2), each[version][[2, 0]])
    assert torch.equal(own.select([1]).tokens(), signs.tokens()[[1]])
    with pytest.raises(DataError, match=r"images with words are 3 of .* of the version 'without' 2 of"):
        given(model, each["word"], each["without"][:2], "dog", mask=signs.mask)
    with pytest.raises(DataError, match="boolean mask of 48 x 48 pixels"):
        given(model, each["word"], each["without"], "dog", mask=signs.mask[:, 1:])
    with pytest.raises(DataError, match="boolean mask of 48 x 48 pixels"):
        given(model, each["word"], each["without"], "dog", mask=None)  # type: ignore[arg-type]


def test_a_corruption_of_a_task(model: Model) -> None:
    blank = torch.zeros(2, 3, 48, 48)
    corrupt = partial(write, word="dog", preprocessing=model.preprocessing, size=0.3)
    prepared = cv.Task(blank, corrupt, metric="kl_divergence").prepare(model)
    assert prepared.corrupt is not None
    assert torch.equal(prepared.corrupt.take(1, 2), paste(model, blank, "dog", size=0.3).images().take(1, 2))


def test_photographed_words_and_the_folder_of_pairs(shared_data: Path, tmp_path: Path) -> None:
    dog, jet = (shared_data / "words" / f"sticker_{name}.png" for name in ("dog", "jet"))
    photographs = shared_data / "images" / "catdog"
    found = write_pictures(photographs, tmp_path, dog, neutral=jet, place=["top", "bottom right"], size=0.2)
    names = [sorted(path.name for path in folder.iterdir()) for folder in found.folders.values()]
    assert len(names) == 4
    assert all(each == names[0] for each in names)
    for name in names[0]:
        word, neutral, without, mask = (
            np.asarray(Image.open(tmp_path / folder / name))
            for folder in ("word", "neutral", "without", "mask")
        )
        assert (word[mask == 0] == without[mask == 0]).all()
        assert (neutral[mask == 0] == without[mask == 0]).all()
        assert (word[mask > 0] != neutral[mask > 0]).mean() > 0.3
    with pytest.raises(DataError, match="have one name, and would be one file"):
        write_pictures([tmp_path / "word" / names[0][0], tmp_path / "neutral" / names[0][0]], tmp_path, "dog")
