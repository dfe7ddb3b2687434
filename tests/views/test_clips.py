"""Views of clips: a strip of frames on paper, a grid with time in the data, and heads that go along time."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvit as cv
from circuitvit import views
from circuitvit.errors import OptionError
from circuitvit.export.maps import maps_of, picture_on, thumbnails
from circuitvit.export.picture import thumb_size
from circuitvit.export.sheet import Sheet
from circuitvit.models import Model, registry
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks.corruptions import reverse
from circuitvit.views.position import describe, templates

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "video_circuit.py"
example: dict[str, Any] = runpy.run_path(str(EXAMPLE))
CLIPS = example["moving_squares"](3, seed=0)  # (clip, 8, 3, 16, 16)
GRID = (4, 4, 4)


@pytest.fixture(scope="module")
def model() -> Model:
    before = dict(registry.FAMILIES)
    cv.register(example["TubeletViT"], example["TubeletFamily"]())
    torch.manual_seed(0)
    module = example["TubeletViT"](8, 16, (2, 4, 4), width=16, depth=2, heads=2, hidden=16, classes=3)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    registry.FAMILIES.update(before)
    return cv.wrap(module.eval(), classes=["right", "left", "still"])


# -- the sheet --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "across", "shape"),
    [
        ((6, 7), 1, (6, 7)),
        ((1, 6, 7), 1, (6, 7)),
        ((2, 3, 3), 2, (3, 6)),
        ((5, 16, 16), 5, (16, 80)),
        ((8, 14, 14), 8, (14, 112)),
        ((16, 14, 14), 8, (28, 112)),
        ((10, 2, 2), 5, (4, 10)),
        ((11, 2, 2), 11, (2, 22)),
        ((32, 16, 16), 8, (64, 128)),
    ],
)
def test_frames_lie_side_by_side_in_equal_lines(
    grid: tuple[int, ...], across: int, shape: tuple[int, int]
) -> None:
    sheet = Sheet(grid)
    assert (sheet.across, sheet.shape) == (across, shape)
    numbers = np.arange(np.prod(grid)).reshape(grid)
    laid = sheet.lay(numbers)
    assert laid.shape == shape
    np.testing.assert_array_equal(laid.ravel(), sheet.order)
    for patch in (0, 1, int(np.prod(grid)) - 1, int(np.prod(grid)) // 2):
        assert laid[sheet.place(patch)] == patch
    rows, columns = grid[-2:]
    for frame in range(sheet.frames):
        top, left = rows * (frame // across), columns * (frame % across)
        one = laid[top : top + rows, left : left + columns]
        np.testing.assert_array_equal(one, numbers.reshape(-1, rows, columns)[frame])


def test_the_frame_in_the_middle_of_a_slice_is_shown() -> None:
    assert Sheet((4, 1, 1)).shown(8) == [1, 3, 5, 7]
    assert Sheet((5, 16, 16)).shown(42) == [4, 12, 21, 29, 37]
    assert Sheet((3, 2, 2)).shown(3) == [0, 1, 2]


def test_a_clip_is_pictured_as_a_strip() -> None:
    spec = InputSpec((3, 2, 2), (0.0,) * 3, (1.0,) * 3)
    clip = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 2, 2)
    strip = picture_on(Sheet((4, 1, 1)), clip, spec)
    assert strip.shape == (2, 8, 3)
    assert strip[0, ::2, 0].tolist() == [0, 85, 170, 255]
    assert thumb_size(Sheet((5, 16, 16)).shape) == (138.0, 27.6)


# -- views ------------------------------------------------------------------------------------------


def test_data_have_time_and_figures_have_strips(model: Model, tmp_path: Path) -> None:
    lens = views.logit_lens(model, CLIPS)
    assert lens.subjects.grid == GRID
    assert lens.subjects.pictures.shape == (3, 16, 64, 3)
    assert lens.top_on_grid().shape == (3, *GRID)
    assert (lens.top_on_grid()[1, 2] == lens.top[-1, 1].reshape(GRID)[2]).all()
    table = lens.table(1)
    assert (len(table), len(table[0])) == (4, 16)
    assert table[3][2 * 4 + 1] == lens.labels[int(lens.top_on_grid()[1, 2, 3, 1])]
    assert len(lens.to_text(0).splitlines()) == 4
    assert lens.to_html(0).count("<td") == 16 * 4 * len(lens.positions)
    shares = views.direct_logit_attribution(model, CLIPS, "right", "left")
    np.testing.assert_allclose(shares.total, shares.logit_difference, atol=1e-4)
    assert shares.by_patch.shape == (3, len(shares.senders), *GRID)
    evidence = views.patch_evidence(model, CLIPS, "right", "left")
    assert repr(evidence).endswith("3 maps of 4 x 4 x 4 patches)")
    assert evidence.upsampled().shape == (3, 4, 16, 16)
    for name, figure in (
        ("lens", lens.figure(1)),
        ("curve", lens.curve_figure()),
        ("attribution", shares.figure(1)),
        ("no-heads", shares.figure(heads=0)),
        ("evidence", evidence.figure()),
        ("coarse", evidence.figure(smooth=False, picture=False)),
    ):
        width, height = Image.open(figure.save(tmp_path / f"{name}.png")).size
        assert min(width, height) > 200, name
        assert max(width, height) < 4000, name


def test_masks_of_a_clip_have_frames(model: Model) -> None:
    evidence = views.patch_evidence(model, CLIPS, "right", "left")
    masks = np.zeros((3, 4, 16, 16), dtype=bool)
    masks[:, 1, :8] = True
    assert all(0 < score.prevalence < 1 for score in evidence.score(masks))
    with pytest.raises(cv.errors.DataError, match=r"masks of shape \(3, 16, 16\) for maps of"):
        evidence.score(masks[:, 0])
    with pytest.raises(OptionError, match="cannot be drawn"):
        evidence.figure(masks=masks)


def test_a_query_is_a_patch_in_time(model: Model, tmp_path: Path) -> None:
    view = views.attention_patterns(model, CLIPS, layer=0)
    assert view.token((2, 1, 3)) == 2 * 16 + 1 * 4 + 3
    assert view.maps((2, 1, 3)).shape == (3, 2, *GRID)
    assert view.subjects.token_name(39) == "patch (2, 1, 3)"
    with pytest.raises(OptionError, match=r"no patch \(4, 0, 0\): the grid has 4 frames, 4 rows, 4 columns"):
        view.token((4, 0, 0))
    with pytest.raises(OptionError, match=r"no patch \(1, 3\)"):
        view.token((1, 3))
    assert "patch (2, 1, 3)" in view.figure(query=(2, 1, 3)).save(tmp_path / "a.svg").read_text("utf-8")


# -- heads along time -------------------------------------------------------------------------------


def looks(name: str) -> views.Subjects | Any:
    """A pattern that rests on a shape alone, and what the statistics call it."""
    kinds = ("cls", *("patch",) * 64)
    cells = templates(GRID, kinds)[name].astype(float)
    cells[cells.sum(axis=1) == 0] = 1.0  # queries at the border, which it leaves without a key
    pattern = cells / cells.sum(axis=1, keepdims=True)
    subjects = views.subjects.Subjects(("a",), np.zeros((1, 1, 1, 3), dtype=np.uint8), GRID, kinds)
    return describe(pattern, pattern**2, 8, subjects)["name"]


@pytest.mark.parametrize(
    "name",
    [
        "same place", "frame", "before", "after", "in 2", "in -2", "previous frame", "next frame", "past",
        "frame step 2", "future", "first frame", "last frame", "self", "row", "column", "above", "neighbours",
        "corners", "edge left", "cls",
    ],
)  # fmt: skip
def test_a_head_along_time_is_named(name: str) -> None:
    assert looks(name) == name


def test_shapes_of_a_frame_stay_in_the_frame() -> None:
    found = templates(GRID, ("patch",) * 64)
    at = np.ravel_multi_index
    assert found["above"][at((2, 1, 1), GRID), at((2, 0, 1), GRID)]
    assert found["above"].sum() == 4 * 12
    assert found["before"][at((2, 1, 1), GRID), at((1, 1, 1), GRID)]
    assert found["before"].sum() == 3 * 16
    assert found["corner top left"].sum() == 64 * 4  # at all times
    assert found["past"][at((2, 0, 0), GRID)].sum() == 32


def test_position_heads_of_clips(model: Model, tmp_path: Path) -> None:
    view = views.position_heads(model, CLIPS)
    assert all(head.share <= 1 for head in view.heads)
    text = view.figure(at_least=-10.0).save(tmp_path / "positions.svg").read_text(encoding="utf-8")
    assert sum(f"{head.name}" in text for head in view.heads) >= 2


# -- groups, diagrams -------------------------------------------------------------------------------


def test_edges_are_told_apart_by_frame(model: Model) -> None:
    groups = cv.TokenGroups.by_frame(model, 64)
    assert groups.names == ("frame0", "frame1", "frame2", "frame3")
    assert groups.members.reshape(GRID)[2].unique().tolist() == [2]
    task = cv.Task(CLIPS, reverse, cv.logit_diff("right", "left"), groups="frame")
    whole = cv.Task(CLIPS, reverse, cv.logit_diff("right", "left"))
    scores, sums = (cv.attribute(model, each, "eap", progress=False) for each in (task, whole))
    np.testing.assert_allclose(
        scores.values.sum(axis=2), sums.values[:, :, 0], atol=1e-4 * np.abs(sums.values).max()
    )
    with pytest.raises(OptionError, match="sees images, which have no frames"):
        cv.TokenGroups.by_frame(cv.load("catdog-tiny"), 37)
    with pytest.raises(OptionError, match="groups is 'kind' or 'frame'"):
        cv.Task(CLIPS, reverse, groups="frames")


def test_masks_hold_in_all_frames(model: Model) -> None:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:4, :8] = True
    groups = cv.TokenGroups.from_masks(model, {"top": mask})
    members = groups.members.reshape(GRID)
    assert (members == members[:1]).all()
    assert (members[0] == groups.names.index("top")).sum() == 2


def test_maps_lie_on_the_sheet(model: Model, tmp_path: Path) -> None:
    task = cv.Task(CLIPS, reverse, cv.logit_diff("right", "left"), groups="frame")
    maps = maps_of(model, task, pair=1)
    assert maps.grid == (4, 16)
    assert maps.groups[:16] == tuple(frame for frame in range(4) for _ in range(4))
    side = maps.sides["clean"]
    assert side.image.shape == (16, 64, 3)
    stage, stream = model.stages[1], model.embed(CLIPS[1:2])
    pattern = stage.pattern(stage.read(stream))[0, 0].detach().double().numpy()
    order = Sheet(GRID).order
    np.testing.assert_allclose(side.heads["a0.h0"].pattern, pattern[order][:, order], atol=1e-6)
    sizes = {pixels.shape for pixels in thumbnails(maps).values()}
    assert sizes == {(69, 276, 3)}  # 138 x 34.5, twice
    circuit = cv.attribute(model, task, "eap", progress=False).connected(12)
    for ending in ("svg", "png", "html"):
        path = circuit.draw(tmp_path / f"c.{ending}", model=model, task=task, thumbnails=True)
        assert path.stat().st_size > 2000


def test_top_patches_of_clips_lie_in_their_frames(model: Model) -> None:
    """A patch of a clip has a frame, and its surroundings stay within that."""
    found = views.top_images(model, CLIPS, "m0", by="patch", count=3, rows=("top",))
    assert all(
        len(place) == 3 for place in (found.subjects.place(int(at)) for at in found.picks("m0").tokens)
    )
    picks = found.picks("m0")
    assert picks.maps is not None
    assert picks.maps.shape == (3, *GRID)
    for values, value, token in zip(picks.maps, picks.values, picks.tokens, strict=True):
        assert values[found.subjects.place(int(token))] == value
    lefts = [int(left) % 4 for left in re.findall(r'<figure><svg viewBox="(\d+) \d+ 4 4"', found.to_html())]
    assert lefts == [0, 0, 0]


def test_clips_are_visualised_frame_by_frame(model: Model, tmp_path: Path) -> None:
    made = views.feature_visualisation(
        model, "logits", unit="left", reference=CLIPS, count=2, steps=15, progress=False
    )
    assert made.images.shape == (2, 8, 3, 16, 16)
    assert made.values.min() > made.reference.max()
    assert made.pictures.shape[2] > made.pictures.shape[1]
    text = made.figure().save(tmp_path / "strips.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("left", "step", "objective", "reference"))
