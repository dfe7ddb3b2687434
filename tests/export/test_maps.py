"""What nodes do on an image: the arrays behind thumbnails and the page."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.errors import DataError
from circuitvit.export.maps import Maps, heat, maps_of, thumbnails
from circuitvit.export.page import packed_maps
from circuitvit.models import Model
from tests.export.test_draw import toy_task

MODEL = cv.load("catdog-tiny")


@pytest.fixture(scope="module")
def maps() -> Maps:
    return maps_of(MODEL, toy_task())


def test_patterns_are_those_of_the_model(maps: Maps) -> None:
    """A head's output is its pattern times its values, so the pattern must give the model's own output."""
    task = toy_task().prepare(MODEL)
    images = task.clean.take(0, 1)
    stage = MODEL.stages[1]
    reads = stage.read(MODEL.embed(images))
    outputs = stage.write(reads)[0]
    for head, name in enumerate(stage.nodes.senders):
        pattern = torch.tensor(maps.sides["clean"].heads[name].pattern, dtype=torch.float32)
        assert torch.allclose(pattern @ reads[2][0, head], outputs[head], atol=1e-5)
        assert torch.allclose(pattern.sum(dim=1), torch.ones(len(pattern)))


def test_weights_are_the_sizes_of_what_a_token_alone_would_write(maps: Maps) -> None:
    stage = MODEL.stages[1]
    value = stage.read(MODEL.embed(toy_task().prepare(MODEL).clean.take(0, 1)))[2]
    name = stage.nodes.senders[1]
    alone = torch.zeros_like(value)
    alone[0, 1, 4] = value[0, 1, 4]
    written = stage.expand(alone)[1, 0, 4].norm().item()
    assert maps.sides["clean"].heads[name].weights[4] == pytest.approx(written, rel=1e-4)


def test_both_images_are_there_in_their_own_colours(maps: Maps) -> None:
    assert list(maps.sides) == ["clean", "corrupt"]
    assert maps.grid == (6, 6)
    tensor = toy_task().prepare(MODEL).clean.take(0, 1)[0]
    mean, std = (
        torch.tensor(each)[:, None, None] for each in (MODEL.preprocessing.mean, MODEL.preprocessing.std)
    )
    expected = (255 * (tensor * std + mean)).clip(0, 255).permute(1, 2, 0)
    assert np.abs(maps.sides["clean"].image - expected.numpy()).max() < 1


def test_only_wanted_nodes_are_kept() -> None:
    maps = maps_of(MODEL, toy_task(), nodes=["a1.h2", "m0", "logits"])
    assert maps.nodes == ("a1.h2", "m0")


def test_without_a_class_token_the_row_is_an_average(maps: Maps) -> None:
    head = maps.sides["clean"].heads["a1.h2"]
    assert np.allclose(head.row(of_class_token=True), head.pattern[0])
    assert np.allclose(head.row(of_class_token=False), head.pattern.mean(axis=0))


def test_where_patterns_get_too_large_the_strongest_heads_keep_theirs(
    maps: Maps, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = ["a2.h1", "logits", "a0.h0", "a1.h1"]
    whole = packed_maps(maps, order)["sides"]["clean"]["full"]
    assert list(whole) == ["a2.h1", "a0.h0", "a1.h1"]
    both = sum(len(side["full"]["a2.h1"]) for side in packed_maps(maps, order)["sides"].values())
    monkeypatch.setattr("circuitvit.export.page.FULL_BYTES", both + 10)
    assert list(packed_maps(maps, order)["sides"]["corrupt"]["full"]) == ["a2.h1"]


def test_heat_is_dull_where_attention_is_even_and_bright_where_it_is_not(maps: Maps) -> None:
    blank = np.zeros((8, 8, 3), dtype=np.uint8)
    even = heat(blank, np.full((2, 2), 0.25), least_end=0.75)
    peak = heat(blank, np.array([[1.0, 0.0], [0.0, 0.0]]), least_end=0.75)
    assert even.max() < peak.max()
    assert set(thumbnails(maps)) == set(maps.nodes)
    assert {small.shape for small in thumbnails(maps, "corrupt").values()} == {(92, 92, 3)}


def test_images_that_are_no_rectangle_of_patches_are_refused() -> None:
    def grid(patches: int, height: int, width: int) -> tuple[int, ...]:
        """The grid of a model whose family cannot tell."""
        unknown = SimpleNamespace(grid=lambda module, height, width: None)
        model = SimpleNamespace(
            name="toy",
            preprocessing=SimpleNamespace(shape=(3, height, width)),
            family=unknown,
            module=None,
            prefix=("cls",),
            tokens_at=lambda height, width: patches + 1,
        )
        return Model.grid_at(model, height, width)  # type: ignore[arg-type]

    assert grid(196, 224, 224) == (14, 14)
    assert grid(12, 30, 40) == (3, 4)
    with pytest.raises(DataError, match="form no grid"):
        grid(7, 30, 30)
