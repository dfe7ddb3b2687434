"""Clips: files of frames and videos, how their frames are chosen, and corruptions of time."""

from __future__ import annotations

import builtins
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import circuitvit as cv
from circuitvit.errors import CircuitViTError, DataError, FileError, OptionError
from circuitvit.models.zoo import ClipSpec, InputSpec
from circuitvit.tasks.clip_files import load_clip, sampled
from circuitvit.tasks.corruptions import CORRUPTIONS, blur, freeze, gaussian_noise, reverse, shuffle_frames
from circuitvit.tasks.images import FileClips, MadeImages, TensorImages, as_images

av = pytest.importorskip("av")

HALF = (0.5, 0.5, 0.5)
SPEC = ClipSpec((3, 16, 16), HALF, HALF, "bilinear", frames=4)
IMAGES = InputSpec((3, 16, 16), HALF, HALF)


def frames(count: int, side: int = 16) -> NDArray[np.uint8]:
    """Frames that get lighter, evenly grey: frame `i` is `10 i + 5`."""
    grey = (10 * np.arange(count) + 5).astype(np.uint8)
    return np.broadcast_to(grey[:, None, None, None], (count, side, side, 3)).copy()


def numbers(clip: torch.Tensor) -> list[int]:
    """Which of `frames` a preprocessed clip holds."""
    return [round(float((value * 0.5 + 0.5) * 255 - 5) / 10) for value in clip.mean(dim=(1, 2, 3))]


def array_file(path: Path, pixels: NDArray[Any], **others: NDArray[Any]) -> Path:
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        np.savez(path, frames=pixels, **others)
    return path


def video_file(path: Path, pixels: NDArray[np.uint8]) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
        stream.bit_rate = 10_000_000
        for image in pixels:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return path


# -- which frames -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "options", "expected"),
    [
        (4, {}, [0, 1, 2, 3]),
        (7, {}, [0, 2, 4, 6]),
        (100, {}, [0, 33, 66, 99]),
        (5, {"frames": 1}, [0]),
        (7, {"stride": 2}, [0, 2, 4, 6]),
        (11, {"stride": 2}, [2, 4, 6, 8]),
        (4, {"stride": 1}, [0, 1, 2, 3]),
        (2, {"repeat": True}, [0, 0, 1, 1]),
        (5, {"stride": 2, "repeat": True}, [0, 1, 3, 4]),
    ],
)
def test_frames_are_spread_evenly_or_taken_by_stride_out_of_the_middle(
    count: int, options: dict[str, Any], expected: list[int]
) -> None:
    spec = ClipSpec((3, 8, 8), HALF, HALF, **{"frames": 4, **options})
    assert sampled(count, spec) == expected


@pytest.mark.parametrize(
    ("count", "options", "complaint"),
    [
        (3, {}, r"it has 3 frames, and the model takes 4: give a longer one.*repeat=True"),
        (0, {"repeat": True}, "it has 0 frames"),
        (6, {"stride": 2}, "the model takes 4, every 2th of 7"),
        (6, {"stride": 0}, "a stride of at least 1"),
        (6, {"frames": 0}, "at least 1 frame"),
    ],
)
def test_too_few_frames_are_refused(count: int, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CircuitViTError, match=complaint):
        sampled(count, ClipSpec((3, 8, 8), HALF, HALF, **{"frames": 4, **options}))


# -- files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip.npy", "clip.npz", "clip.mp4", "clip.avi", "CLIP.MKV"])
def test_a_clip_is_read_from_arrays_and_videos(tmp_path: Path, name: str) -> None:
    write = array_file if name.endswith(("npy", "npz")) else video_file
    clip = load_clip(write(tmp_path / name, frames(10, side=32)), SPEC)
    assert clip.shape == SPEC.shape == (4, 3, 16, 16)
    assert clip.dtype == torch.float32
    assert numbers(clip) == [0, 3, 6, 9]


def test_grey_frames_are_frames(tmp_path: Path) -> None:
    grey = array_file(tmp_path / "grey.npy", frames(4)[..., 0])
    assert numbers(load_clip(grey, SPEC)) == [0, 1, 2, 3]
    column = array_file(tmp_path / "column.npy", frames(4)[..., :1])
    assert torch.equal(load_clip(grey, SPEC), load_clip(column, SPEC))


def test_every_frame_is_preprocessed_like_an_image(tmp_path: Path) -> None:
    from PIL import Image

    from circuitvit.tasks.image_files import preprocess

    pixels = np.random.default_rng(0).integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
    clip = load_clip(array_file(tmp_path / "clip.npz", pixels), SPEC)
    assert torch.equal(clip[2], preprocess(Image.fromarray(pixels[2]), SPEC))


@pytest.mark.parametrize(
    ("pixels", "complaint"),
    [
        (frames(4).astype(np.float32) / 255, r"its array is float32.*frames are uint8"),
        (frames(4)[0], r"of shape \(16, 16, 3\)|has 16 frames"),
        (np.zeros((4, 3, 16, 16), dtype=np.uint8), r"\(4, 3, 16, 16\)"),
        (np.zeros((4, 0, 16, 3), dtype=np.uint8), "is empty"),
        (frames(3), "it has 3 frames, and the model takes 4"),
    ],
)
def test_arrays_that_are_no_frames_are_refused(tmp_path: Path, pixels: NDArray[Any], complaint: str) -> None:
    if pixels.ndim == 3:
        pixels = pixels.astype(np.uint16)
    with pytest.raises(DataError, match=rf"cannot use the clip .*clip\.npy: .*({complaint})"):
        load_clip(array_file(tmp_path / "clip.npy", pixels), SPEC)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    several = array_file(tmp_path / "several.npz", frames(4), other=frames(4))
    with pytest.raises(DataError, match=r"several\.npz: it holds 2 arrays \(frames, other\)"):
        load_clip(several, SPEC)
    for name in ("broken.npy", "broken.npz"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 no array")
        with pytest.raises(DataError, match=rf"{name}: it is no array that numpy can read"):
            load_clip(tmp_path / name, SPEC)
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"objects\.npy: it is no array"):
        load_clip(objects, SPEC)
    whole = video_file(tmp_path / "whole.mp4", frames(10, side=32)).read_bytes()
    for name, content in (
        ("text.mp4", b"no video"),
        ("cut.mp4", whole[: len(whole) // 3]),
        ("empty.mp4", b""),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"cannot use the clip .*{name}"):
            load_clip(tmp_path / name, SPEC)
    with pytest.raises(DataError, match="there is no such file"):
        load_clip(tmp_path / "nowhere.mp4", SPEC)


def test_without_av_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = video_file(tmp_path / "clip.mp4", frames(10, side=32)), builtins.__import__

    def without(name: str, *others: Any, **options: Any) -> Any:
        if name == "av":
            raise ImportError("No module named 'av'")
        return real(name, *others, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FileError, match=r"pip install circuitvit\[video\]"):
        load_clip(path, SPEC)


# -- as inputs --------------------------------------------------------------------------------------


def test_a_folder_of_clips_is_listed_and_images_in_it_are_not(tmp_path: Path) -> None:
    for name in ("b.npy", "a.npz"):
        array_file(tmp_path / name, frames(4))
    (tmp_path / "c.png").write_bytes(b"")
    found = as_images(tmp_path, SPEC)
    assert isinstance(found, FileClips)
    assert found.names == ("a.npz", "b.npy")
    assert found.shape == (4, 3, 16, 16)
    assert found.take(0, 2).shape == (2, 4, 3, 16, 16)
    assert repr(found) == "FileClips(2 files: a.npz, b.npy)"
    found.check()


def test_images_and_clips_are_not_taken_for_each_other(tmp_path: Path) -> None:
    clip = array_file(tmp_path / "clip.npz", frames(4))
    with pytest.raises(DataError, match=r"clip\.npz is a clip, and the model takes images"):
        as_images(clip, IMAGES)
    with pytest.raises(DataError, match=r"photo\.jpg is an image, and the model takes clips"):
        as_images("photo.jpg", SPEC)
    with pytest.raises(DataError, match=r"has no clips, which end in \.avi"):
        as_images(_folder(tmp_path / "empty"), SPEC)
    with pytest.raises(DataError, match=r"images of shape \(3, 16, 16\).*the model takes clips of"):
        as_images(torch.zeros(4, 3, 16, 16), SPEC)
    with pytest.raises(DataError, match=r"clips of shape \(4, 3, 16, 16\).*the model takes images of"):
        as_images(torch.zeros(1, 4, 3, 16, 16), IMAGES)
    with pytest.raises(DataError, match=r"clips of shape \(8, 3, 16, 16\)"):
        as_images(torch.zeros(1, 8, 3, 16, 16), SPEC)


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


# -- corruptions ------------------------------------------------------------------------------------

CLIPS = torch.arange(2 * 6 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 6, 3, 4, 4)


def test_reversed_clips_run_backwards() -> None:
    assert torch.equal(reverse(CLIPS)[:, 0], CLIPS[:, 5])
    assert torch.equal(reverse(reverse(CLIPS)), CLIPS)


@pytest.mark.parametrize("span", [1, 2, 3])
def test_shuffled_frames_all_move_and_none_is_lost(span: int) -> None:
    shuffled = shuffle_frames(CLIPS, seed=3, span=span)
    order = [int((CLIPS[0] == frame).flatten(1).all(dim=1).nonzero()) for frame in shuffled[0]]
    assert sorted(order) == list(range(6))
    assert all(place != frame for place, frame in enumerate(order))
    assert torch.equal(shuffled[1], CLIPS[1, order])  # alike for all clips
    for first in range(0, 6, span):
        assert order[first : first + span] == list(range(order[first], order[first] + span))
    assert torch.equal(shuffled, shuffle_frames(CLIPS, seed=3, span=span))


def test_frames_after_the_last_whole_span_stay() -> None:
    shuffled = shuffle_frames(CLIPS[:, :5], span=2)
    assert torch.equal(shuffled, torch.cat([CLIPS[:, 2:4], CLIPS[:, :2], CLIPS[:, 4:5]], dim=1))


def test_frozen_clips_show_one_frame() -> None:
    assert torch.equal(freeze(CLIPS)[:, 4], CLIPS[:, 0])
    assert torch.equal(freeze(CLIPS, -1)[:, 0], CLIPS[:, 5])
    frozen = freeze(CLIPS)
    frozen[0, 0] = 0.0
    assert (CLIPS[0, 0] != 0.0).any()  # a copy of its own


def test_corruptions_of_images_take_clips_frame_by_frame() -> None:
    by_frame = torch.stack([blur(clip, sigma=1.0) for clip in CLIPS])
    torch.testing.assert_close(blur(CLIPS, sigma=1.0), by_frame)
    noised = gaussian_noise(CLIPS, std=1.0, seed=0) - CLIPS
    assert torch.allclose(
        noised.flatten(0, 1), gaussian_noise(CLIPS.flatten(0, 1), 1.0, 0) - CLIPS.flatten(0, 1)
    )


@pytest.mark.parametrize("change", [reverse, shuffle_frames, freeze])
def test_images_have_no_time_to_change(change: Any) -> None:
    for images in (CLIPS[0], CLIPS[0, 0]):  # a clip alone might as well be a batch of images
        with pytest.raises(DataError, match=r"clips are \(clip, time, channel, height, width\)"):
            change(images)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(OptionError, match="a span is at least 1"):
        shuffle_frames(CLIPS, span=0)
    with pytest.raises(DataError, match="to shuffle takes two"):
        shuffle_frames(CLIPS, span=4)
    with pytest.raises(OptionError, match="there is no frame 6"):
        freeze(CLIPS, 6)


def test_a_task_makes_its_own_counterfactuals() -> None:
    model = cv.load("catdog-tiny")
    images = torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    change = partial(blur, sigma=3.0)
    task = cv.Task(images, change, cv.logit_diff("cat", "dog"))
    made = task.prepare(model).corrupt
    assert isinstance(made, MadeImages)
    assert made.names == ("image 0", "image 1", "image 2")
    torch.testing.assert_close(made.take(1, 3), blur(images, sigma=3.0)[1:])
    assert "corrupt made by blur" in repr(task)
    found, expected = (
        cv.attribute(model, each, "eap", progress=False).values
        for each in (task, cv.Task(images, blur(images, sigma=3.0), cv.logit_diff("cat", "dog")))
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_function_that_makes_no_counterfactuals_is_refused() -> None:
    images = TensorImages(torch.ones(2, 3, 8, 8))
    for change, complaint in (
        (lambda image: image[..., :4], "gives one of its shape"),
        (lambda image: None, "gives NoneType"),
        (lambda image: image / 0.0, "NaN or infinite"),
    ):
        with pytest.raises(DataError, match=complaint):
            MadeImages(images, change).check()
    MadeImages(images, lambda image: image.zero_()).check()
    assert torch.equal(images.tensor, torch.ones(2, 3, 8, 8))  # changed in place, it changes a copy


def test_named_corruptions_need_nothing_but_the_clips() -> None:
    assert {"reverse", "shuffle", "freeze"} < set(CORRUPTIONS)
    for change in CORRUPTIONS.values():
        assert change(CLIPS).shape == CLIPS.shape
