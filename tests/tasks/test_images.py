"""Images: from files as people have them, good and bad, to exactly what timm would give the model."""

from __future__ import annotations

import io
import threading
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import CircuitViTError, DataError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.tasks import ahead
from circuitvit.tasks.ahead import in_turn
from circuitvit.tasks.image_files import decode_image, load_image, preprocess, read_image
from circuitvit.tasks.images import FileImages, TensorImages, as_images

HALF = (0.5, 0.5, 0.5)
SPEC = InputSpec((3, 32, 32), HALF, HALF)
RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def photograph(width: int = 60, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that JPEG keeps them and resizing matters."""
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def saved(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or photograph()).save(path, **options)
    return path


def pixel(image: Image.Image, x: int, y: int) -> tuple[int, ...]:
    value = image.getpixel((x, y))
    return value if isinstance(value, tuple) else (int(value or 0),)


class TestReadImage:
    """Whatever the file holds, it becomes 8-bit RGB or grey, upright and opaque."""

    @pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tiff", ".ppm"])
    def test_common_formats(self, tmp_path: Path, suffix: str) -> None:
        image = read_image(saved(tmp_path / f"picture{suffix}"))
        assert (image.mode, image.size) == ("RGB", (60, 40))

    @pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "LA", "RGBA", "I;16"])
    @pytest.mark.parametrize("channels", [1, 3])
    def test_every_colour_mode(self, tmp_path: Path, mode: str, channels: int) -> None:
        suffix = ".tiff" if mode in ("CMYK", "YCbCr") else ".png"
        path = saved(tmp_path / f"picture{suffix}", Image.new("L", (4, 4), 255).convert(mode))
        assert read_image(path, channels).mode == ("RGB" if channels == 3 else "L")

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_the_camera_was_held_any_way(self, tmp_path: Path, orientation: int) -> None:
        upright = Image.new("RGB", (60, 40), "black")
        upright.paste(RED, (0, 0, 20, 20))  # top left
        upright.paste(GREEN, (40, 0, 60, 20))  # top right
        undo = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90",
                7: "TRANSVERSE", 8: "ROTATE_270"}  # fmt: skip
        stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation > 1 else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = read_image(saved(tmp_path / "photo.png", stored, exif=exif))
        assert image.size == (60, 40)
        assert (pixel(image, 5, 5), pixel(image, 55, 5)) == (RED, GREEN)

    def test_transparent_pixels_become_white(self, tmp_path: Path) -> None:
        image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
        image.putpixel((1, 0), (0, 0, 0, 0))
        read = read_image(saved(tmp_path / "cut_out.png", image))
        assert (pixel(read, 0, 0), pixel(read, 1, 0)) == (RED, WHITE)
        assert pixel(read_image(tmp_path / "cut_out.png", 1), 1, 0) == (255,)

    def test_half_transparent_pixels_are_mixed_with_white(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "glass.png", Image.new("RGBA", (1, 1), (0, 0, 0, 51)))
        assert pixel(read_image(path), 0, 0) == (204, 204, 204)

    def test_a_transparent_palette_entry_becomes_white(self, tmp_path: Path) -> None:
        image = Image.new("P", (2, 1))
        image.putpalette([*RED, 0, 0, 255])
        image.putpixel((1, 0), 1)
        read = read_image(saved(tmp_path / "palette.png", image, transparency=1))
        assert (pixel(read, 0, 0), pixel(read, 1, 0)) == (RED, WHITE)

    @pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
    def test_16_bit_grey_is_scaled_not_clipped(self, tmp_path: Path, suffix: str) -> None:
        ramp = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
        read = read_image(saved(tmp_path / f"deep{suffix}", ramp), channels=1)
        assert np.asarray(read).tolist() == [[0, 100, 255]]

    def test_of_an_animation_the_first_frame(self, tmp_path: Path) -> None:
        frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
        path = saved(tmp_path / "film.gif", frames[0], save_all=True, append_images=frames[1:])
        assert pixel(read_image(path), 0, 0) == RED

    def test_floating_point_pixels_are_refused(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "depth.tiff", Image.new("F", (4, 4), 0.5))
        with pytest.raises(DataError, match=r"depth\.tiff.*8 or 16 bits"):
            read_image(path)

    def test_other_numbers_of_channels_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(OptionError, match="the model takes 4"):
            read_image(saved(tmp_path / "picture.png"), channels=4)


def cut(path: Path, keep: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return path


class TestUnreadableFiles:
    """Each is refused by its name, as one kind of error, whatever Pillow raises inside."""

    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"no image .*nowhere\.jpg: there is no such file"):
            read_image(tmp_path / "nowhere.jpg")

    def test_a_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is a folder, where an image file was expected"):
            read_image(tmp_path)

    @pytest.mark.parametrize(
        "content", [b"", b"Dear Sir or Madam", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n"]
    )
    def test_not_an_image(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "letter.jpg"
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"letter\.jpg"):
            read_image(path)

    @pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".gif", ".tiff", ".webp", ".ppm"])
    @pytest.mark.parametrize("keep", [0.02, 0.5, 0.9])
    def test_truncated(self, tmp_path: Path, suffix: str, keep: float) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = cut(saved(tmp_path / f"half{suffix}", Image.fromarray(noise)), keep)
        with pytest.raises(DataError, match=f"half{suffix}"):
            read_image(path)

    def test_damaged_anywhere_gives_an_image_or_our_own_error(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(0)
        for suffix in (".png", ".jpg", ".gif", ".tiff", ".webp"):
            whole = np.frombuffer(saved(tmp_path / f"whole{suffix}").read_bytes(), np.uint8)
            for attempt in range(20):
                broken = whole.copy()
                broken[rng.integers(0, min(len(broken), 400), 8)] = rng.integers(0, 256, 8)
                path = tmp_path / f"broken{attempt}{suffix}"
                path.write_bytes(broken.tobytes())
                try:
                    with warnings.catch_warnings():  # Pillow warns of damaged metadata
                        warnings.simplefilter("ignore")
                        load_image(path, SPEC)
                except CircuitViTError as error:
                    assert path.name in str(error)  # noqa: PT017 - most attempts give an image, and that is fine

    def test_a_decompression_bomb(self, tmp_path: Path) -> None:
        # 200 million black pixels in a file of a few hundred bytes: nobody's photograph.
        file = io.BytesIO()
        Image.new("1", (8, 8)).save(file, "png")
        data = bytearray(file.getvalue())
        data[16:24] = (20_000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path = tmp_path / "bomb.png"
        path.write_bytes(bytes(data))
        with pytest.raises(DataError, match=r"bomb\.png is absurdly large"):
            read_image(path)

    def test_a_picture_that_would_explode_when_resized(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "thread.png", Image.new("L", (60_000, 1)))
        with pytest.raises(DataError, match=r"thread\.png: 60000 x 1 pixels are too elongated"):
            load_image(path, InputSpec((3, 224, 224), HALF, HALF))
        with pytest.raises(DataError, match=r"thread\.png"):
            FileImages((path,), InputSpec((3, 224, 224), HALF, HALF)).check()


def timm_transform(**config: object) -> Callable[[Image.Image], Tensor]:
    """What timm itself would use for a model of this configuration."""
    timm = import_timm()
    model = timm.create_model("test_vit", pretrained=False, img_size=config["input_size"][-2:])  # type: ignore[index]
    model.pretrained_cfg.update(config)
    return timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)


class TestPreprocess:
    @pytest.mark.parametrize("size", [(3, 32, 32), (3, 32, 48), (3, 64, 32)])
    @pytest.mark.parametrize("picture", [(60, 40), (40, 60), (32, 32), (20, 16), (200, 30)])
    @pytest.mark.parametrize(
        ("interpolation", "crop_pct"), [("bicubic", 0.9), ("bilinear", 1.0), ("bicubic", 0.875)]
    )
    def test_equals_timms_own(
        self, size: tuple[int, int, int], picture: tuple[int, int], interpolation: str, crop_pct: float
    ) -> None:
        mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
        expected = timm_transform(
            input_size=size,
            mean=mean,
            std=std,
            interpolation=interpolation,
            crop_pct=crop_pct,
            crop_mode="center",
        )
        image = photograph(*picture)
        found = preprocess(image, InputSpec(size, mean, std, interpolation, crop_pct))
        assert found.shape == size
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected(image), rtol=0, atol=0)

    def test_one_channel(self) -> None:
        found = preprocess(Image.new("RGB", (8, 8), "white"), InputSpec((1, 8, 8), (0.5,), (0.25,)))
        torch.testing.assert_close(found, torch.full((1, 8, 8), 2.0))

    def test_pictures_of_any_mode_are_flattened_first(self) -> None:
        clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        assert preprocess(clear, SPEC).min() == 1  # white

    @pytest.mark.parametrize(
        ("spec", "complaint"),
        [
            (InputSpec((3, 8, 8), (0.5,), HALF), "mean"),
            (InputSpec((3, 8, 8), HALF, (0.5, 0.0, 0.5)), "std above 0"),
            (InputSpec((3, 8, 8), HALF, HALF, "bicubik"), "did you mean 'bicubic'"),
            (InputSpec((3, 8, 8), HALF, HALF, crop_pct=0.0), "crop_pct"),
            (InputSpec((3, 0, 8), HALF, HALF), "size"),
        ],
    )
    def test_impossible_preprocessing_is_refused(self, spec: InputSpec, complaint: str) -> None:
        with pytest.raises(OptionError, match=complaint):
            preprocess(photograph(), spec)

    def test_load_image_reads_and_preprocesses(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "picture.png")
        assert torch.equal(load_image(path, SPEC), preprocess(photograph(), SPEC))


class TestTensorImages:
    def test_a_batch(self) -> None:
        batch = torch.randn(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))
        images = TensorImages(batch)
        assert (len(images), images.shape) == (5, (3, 8, 6))
        assert images.names[0] == "image 0"
        assert torch.equal(images.take(1, 3), batch[1:3])
        assert torch.equal(images.take(3, 99), batch[3:])
        images.check()

    def test_a_single_image_becomes_a_batch_of_one(self) -> None:
        assert TensorImages(torch.zeros(3, 8, 6)).take(0, 1).shape == (1, 3, 8, 6)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
    def test_other_precisions_become_float32_without_gradients(self, dtype: torch.dtype) -> None:
        taken = TensorImages(torch.ones(2, 1, 4, 4, dtype=dtype, requires_grad=True)).take(0, 2)
        assert taken.dtype == torch.float32
        assert not taken.requires_grad

    @pytest.mark.parametrize(
        ("tensor", "complaint"),
        [
            (torch.zeros(8, 8), r"not of shape \(8, 8\)"),
            (torch.zeros(0, 3, 8, 8), "is empty"),
            (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "this one is uint8: scale and normalise"),
            (
                torch.zeros(2, 3, 8, 8).index_fill(0, torch.tensor(1), torch.nan),
                "in 1 of 2 images, first image 1",
            ),
            (torch.full((1, 3, 8, 8), 1e300, dtype=torch.float64), "infinite"),
        ],
    )
    def test_unusable_tensors_are_refused(self, tensor: Tensor, complaint: str) -> None:
        with pytest.raises(DataError, match=complaint):
            TensorImages(tensor)


class TestFileImages:
    def test_files_are_decoded_when_taken(self, tmp_path: Path) -> None:
        paths = [saved(tmp_path / f"{index}.png", photograph(seed=index)) for index in range(3)]
        images = FileImages(tuple(paths), SPEC)
        assert (len(images), images.shape, images.names) == (3, (3, 32, 32), ("0.png", "1.png", "2.png"))
        assert torch.equal(images.take(1, 3), torch.stack([load_image(path, SPEC) for path in paths[1:]]))
        assert images.take(3, 3).shape == (0, 3, 32, 32)
        assert repr(images) == "FileImages(3 files: 0.png, 1.png, 2.png)"

    def test_missing_files_are_noticed_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.png"):
            FileImages((saved(tmp_path / "here.png"), tmp_path / "gone.png"), SPEC)
        with pytest.raises(DataError, match="no images"):
            FileImages((), SPEC)

    def test_check_finds_the_damaged_file_before_long_work(self, tmp_path: Path) -> None:
        paths = saved(tmp_path / "a.png"), cut(saved(tmp_path / "b.png"), 0.5)
        images = FileImages(paths, SPEC)  # reading no pixel yet
        with pytest.raises(DataError, match=r"b\.png"):
            images.check(progress=False)


class TestPicturesAtHand:
    """They are taken as their files would be, whatever library they come from."""

    def test_every_way_of_holding_one_gives_what_its_file_gives(self, tmp_path: Path) -> None:
        path, picture = saved(tmp_path / "a.png"), photograph()
        pixels, wanted = np.asarray(picture), load_image(tmp_path / "a.png", SPEC)
        first = torch.from_numpy(np.moveaxis(pixels, 2, 0).copy())  # as torchvision reads it
        opened = Image.open(path)
        for source in (
            picture,
            opened,
            [picture],
            pixels,
            [pixels],
            pixels[None],
            first,
            [first],
            first[None],
        ):
            assert torch.equal(as_images(source, SPEC).take(0, 1)[0], wanted)
        assert as_images(opened, SPEC).names == ("a.png",)

    def test_several_keep_their_order_and_need_not_be_of_one_size_or_mode(self) -> None:
        grey, seen_through = photograph(seed=1).convert("L"), Image.new("RGBA", (9, 9), (0, 0, 0, 0))
        found = as_images([grey, np.asarray(photograph(seed=2)), np.asarray(grey), seen_through], SPEC)
        assert (len(found), found.names[2]) == (4, "image 2")
        assert torch.equal(found.take(0, 1), found.take(2, 3))
        assert found.take(3, 4).min() == 1.0  # transparent pixels become white
        found.check()

    def test_a_photograph_is_turned_upright_as_its_file_is(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = saved(tmp_path / "turned.jpg", exif=exif)
        assert torch.equal(as_images(Image.open(path), SPEC).take(0, 1)[0], load_image(path, SPEC))

    def test_where_colours_could_be_first_or_last_arrays_and_tensors_keep_their_habits(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 3), dtype=np.uint8)
        assert as_images(pixels, SPEC).pictures[0].size == (40, 3)  # type: ignore[attr-defined]
        assert as_images(torch.from_numpy(pixels), SPEC).pictures[0].size == (3, 40)  # type: ignore[attr-defined]

    def test_the_picture_that_cannot_be_used_is_named_before_long_work(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "cut.png")
        path.write_bytes(path.read_bytes()[:900])
        with pytest.raises(DataError, match=r"cannot use the image cut\.png: it cannot be decoded"):
            as_images([photograph(), Image.open(path)], SPEC).check()

    def test_a_list_of_preprocessed_tensors_is_a_batch(self) -> None:
        tensors = [torch.full((3, 8, 8), float(place)) for place in range(3)]
        assert torch.equal(as_images(tensors, SPEC).take(0, 3), torch.stack(tensors))
        assert torch.equal(
            as_images([each.numpy() for each in tensors], SPEC).take(0, 3), torch.stack(tensors)
        )

    def test_frames_are_a_clip_where_the_model_takes_clips(self) -> None:
        spec = ClipSpec((3, 16, 16), HALF, HALF, frames=4)
        frames = [photograph(seed=place) for place in range(8)]
        clip = as_images(np.stack([np.asarray(frame) for frame in frames]), spec)
        assert clip.take(0, 1).shape == (1, 4, 3, 16, 16)
        assert torch.equal(clip.take(0, 1)[0, -1], preprocess(frames[-1], spec))
        with pytest.raises(DataError, match="it has 2 frames, and the model takes 4"):
            as_images(frames[:2], spec)

    def test_frames_are_turned_upright_too(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        path = saved(tmp_path / "turned.jpg", exif=exif)
        clip = as_images([Image.open(path)] * 2, ClipSpec(SPEC.size, SPEC.mean, SPEC.std, frames=2))
        assert torch.equal(clip.take(0, 1)[0, 0], load_image(path, SPEC))

    def test_a_list_of_arrays_of_frames_is_that_many_clips(self) -> None:
        spec = ClipSpec((3, 16, 16), HALF, HALF, frames=4)
        clips = [
            np.stack([np.asarray(photograph(seed=4 * one + place)) for place in range(4)]) for one in (0, 1)
        ]
        found = as_images(clips, spec)
        assert len(found) == 2
        for place, each in enumerate(clips):
            assert torch.equal(found.take(place, place + 1), as_images(each, spec).take(0, 1))
        with pytest.raises(DataError, match="clip 1 of the list: it has 2 frames"):
            as_images([clips[0], clips[1][:2]], spec)


class TestAsImages:
    def test_tensors_and_arrays_are_preprocessed_already(self) -> None:
        array = np.linspace(0, 1, 3 * 4 * 4, dtype=np.float32).reshape(3, 4, 4)
        array.flags.writeable = False
        for source in (array, torch.from_numpy(array.copy()), array[None], TensorImages(torch.tensor(array))):
            assert torch.equal(as_images(source, SPEC).take(0, 1)[0], torch.tensor(array))
        assert torch.equal(as_images(array.astype(">f4"), SPEC).take(0, 1)[0], torch.tensor(array))
        assert as_images(array[:, ::-1], SPEC).take(0, 1)[0, 0, 0, 0] == array[0, -1, 0]

    def test_one_file_by_text_or_path(self, tmp_path: Path) -> None:
        odd = saved(tmp_path / "picture.png").rename(tmp_path / "picture.dat")  # an ending of no image
        for source in (odd, str(odd), [odd], (str(odd),)):
            assert as_images(source, SPEC).names == ("picture.dat",)

    def test_a_folder_gives_its_images_by_name(self, tmp_path: Path) -> None:
        for name in ("b.png", "a.JPG", "c.webp", ".hidden.png", "sub/d.png"):
            saved(tmp_path / name)
        (tmp_path / "notes.txt").write_text("not an image")
        assert as_images(tmp_path, SPEC).names == ("a.JPG", "b.png", "c.webp")

    def test_a_list_keeps_its_order(self, tmp_path: Path) -> None:
        paths = [saved(tmp_path / name) for name in ("b.png", "a.png")]
        assert as_images(paths, SPEC).names == ("b.png", "a.png")

    @pytest.mark.parametrize(
        ("source", "complaint"),
        [
            ([], "the list of paths is empty"),
            ("", "the list of paths is empty"),
            ("no/such/folder", "no image no/such/folder: there is no such file"),
            (
                torch.zeros(1, 32, 32, 3),
                "has its colours last.* float32: give pixels as uint8, from 0 to 255",
            ),
            (torch.zeros(1, 2, 32, 32), r"takes images of \(3, 32, 32\) \(channel, height, width\)"),
            (np.zeros((8, 8, 8), dtype=np.uint8), r"8-bit pixels are .* not of shape \(8, 8, 8\)"),
            (np.zeros((0, 8, 3), dtype=np.uint8), "no pixels"),
            (np.zeros((8, 8, 3), dtype=np.int64), "numbers are int64: give pixels as uint8"),
            (np.array(["a.png"]), "cannot take images from ndarray"),
            ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"must be alike.* \(3, 8, 8\)"),
            ([Image.new("RGB", (8, 8)), "b.png"], "a list of pictures holds a str too"),
            (Image.new("F", (8, 8)), "image 0: its pixels are numbers without a fixed range"),
            (None, "cannot take images from NoneType"),
            (Image.new("RGB", (0, 5)), "image 0: it has no pixels"),
            ([np.array(["a.png"])], "cannot take numbers of <U5"),
            (np.zeros((3, 32, 32), dtype=np.longdouble), "cannot take numbers of (float128|longdouble)"),
        ],
    )
    def test_other_things_are_refused(self, source: object, complaint: str) -> None:
        with pytest.raises(DataError, match=complaint):
            as_images(source, SPEC).check()  # type: ignore[arg-type]

    def test_a_folder_without_images_says_what_it_holds(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"has no images, which end in \.bmp, .*\.webp$"):
            as_images(tmp_path, SPEC)
        (tmp_path / "cats").mkdir()
        with pytest.raises(DataError, match=r"\(it holds the folder cats\)"):
            as_images(tmp_path, SPEC)
        (tmp_path / "cats").rmdir()
        for index in range(7):
            (tmp_path / f"notes{index}.txt").write_text("")
        with pytest.raises(DataError, match=r"it holds notes0\.txt, .*notes4\.txt and 2 more"):
            as_images(tmp_path, SPEC)


def test_real_photographs_of_all_kinds_are_read(shared_data: Path) -> None:
    spec = InputSpec((3, 224, 224), HALF, HALF, "bicubic", 0.9)
    photographs = sorted((shared_data / "images").rglob("*.jp*g"))[::10]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        images = FileImages(tuple(photographs), spec)
        images.check(progress=False)
        assert images.take(0, 4).shape == (4, 3, 224, 224)
        assert decode_image(shared_data / "images/catdog/prisma_crop_cat.png").mode in ("RGB", "RGBA")


class TestReadingAhead:
    """Files are decoded by threads and a batch ahead, and nobody can tell but by the clock."""

    def task(self, folder: Path, count: int = 7) -> cv.Task:
        for side in range(2):
            for place in range(count):
                saved(folder / f"{side}" / f"{place}.png", photograph(seed=count * side + place))
        return cv.Task(folder / "0", folder / "1", metric=cv.logit_diff("cat", "dog"))

    def test_the_batches_are_the_files_one_after_the_other(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ahead, "cores", lambda: 3)
        prepared = self.task(tmp_path).prepare(cv.load("catdog-tiny"))
        batches = list(prepared.batches(3))
        for side, taken in enumerate([[each.base for each in batches], [each.reference for each in batches]]):
            files = [load_image(tmp_path / f"{side}" / f"{place}.png", prepared.spec) for place in range(7)]
            assert torch.equal(torch.cat([each for each in taken if each is not None]), torch.stack(files))
        assert torch.cat([each.rows for each in batches]).tolist() == list(range(7))

    def test_the_next_batch_is_read_while_one_is_worked_on(self) -> None:
        begun, worked = threading.Event(), []

        class Slow(TensorImages):
            slow = True

            def take(self, start: int, stop: int) -> Tensor:
                if start == 2:
                    begun.set()
                return super().take(start, stop)

        images = Slow(torch.arange(4.0).reshape(4, 1, 1, 1))
        for part in in_turn(
            lambda rows: images.take(rows.start, rows.stop), [range(2), range(2, 4)], [images]
        ):
            assert begun.wait(10)  # also while the first batch is held
            worked += part.flatten().tolist()
        assert worked == [0, 1, 2, 3]

    def test_a_file_that_breaks_on_the_way_ends_the_work_with_its_name(self, tmp_path: Path) -> None:
        prepared = self.task(tmp_path).prepare(cv.load("catdog-tiny"))
        (tmp_path / "1" / "4.png").write_bytes(b"no picture any more")
        (tmp_path / "1" / "6.png").unlink()
        with pytest.raises(DataError, match=r"1/4\.png is not an image"):
            cv.attribute(prepared.model, prepared, "eap", batch_size=2, progress=False)
        assert not [each for each in threading.enumerate() if each.name.startswith("circuitvit-")]

    def test_work_that_is_given_up_leaves_no_thread(self, tmp_path: Path) -> None:
        batches = self.task(tmp_path).prepare(cv.load("catdog-tiny")).batches(2)
        next(batches)
        batches.close()
        assert not [each for each in threading.enumerate() if each.name.startswith("circuitvit-")]
