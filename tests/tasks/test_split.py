"""Discovery and held-out pairs: no image on both sides, nothing lost, nothing changed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, OptionError
from circuitvit.tasks import PerPair, PreparedTask, select_pairs, split
from circuitvit.tasks.images import Images
from tests.verification.cases import images, tiny_model, tiny_task


def task_of(clean: list[int], corrupt: list[int], **options: object) -> cv.Task:
    """Pairs of images from a pool of 30, which may repeat."""
    pool = images(30, seed=5)
    options = {"metric": cv.logit_diff(0, 1), **options}
    return cv.Task(pool[clean], pool[corrupt], **options)  # type: ignore[arg-type]


def pixels(prepared: PreparedTask) -> set[bytes]:
    sides = [each for each in (prepared.clean, prepared.corrupt) if each is not None]
    return {image.numpy().tobytes() for side in sides for image in all_of(side)}


def all_of(side: Images) -> torch.Tensor:
    return side.take(0, len(side))


pair_rows = st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), min_size=2, max_size=12)


@given(pair_rows, st.floats(0.05, 0.95), st.integers(0, 5))
def test_no_image_is_on_both_sides(rows: list[tuple[int, int]], share: float, seed: int) -> None:
    task = task_of([a for a, _ in rows], [b for _, b in rows])
    try:
        discovery, held_out = split(tiny_model(), task, share, seed=seed)
    except DataError:  # all that could be held out hangs together with too many others
        return
    assert not pixels(discovery) & pixels(held_out)
    assert sorted(discovery.clean.names + held_out.clean.names) == sorted(
        task.prepare(tiny_model()).clean.names
    )
    assert 1 <= len(held_out) <= max(1, round(share * len(rows)))


def test_pairs_of_their_own_images_give_the_share_asked_for() -> None:
    task = task_of(list(range(10)), list(range(10, 20)))
    for share, expected in ((0.3, 3), (0.01, 1), (0.99, 9)):
        assert len(split(tiny_model(), task, share).held_out) == expected
    sides = [split(tiny_model(), task, 0.5, seed=seed).held_out.clean.names for seed in (0, 0, 1)]
    assert sides[0] == sides[1] != sides[2]


def test_pairs_keep_their_images_names_and_classes() -> None:
    metric = cv.logit_diff(PerPair((0, 1, 2, 0)), PerPair((1, 2, 0, 2)))
    prepared = task_of([0, 1, 2, 3], [4, 5, 6, 7], metric=metric).prepare(tiny_model())
    chosen = select_pairs(prepared, [3, 1])
    assert chosen.clean.names == ("image 3", "image 1")
    assert torch.equal(all_of(chosen.clean), images(30, seed=5)[[3, 1]])
    assert chosen.metric.target is not None
    assert chosen.metric.target.nonzero()[:, 1].tolist() == [0, 1]
    full = cv.Circuit.full(prepared.graph)
    whole = cv.run(tiny_model(), prepared, full)
    assert torch.allclose(cv.run(tiny_model(), chosen, full), whole[[3, 1]])


def test_token_masks_of_each_image_go_with_it() -> None:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    masks[:2, :4, :4] = True
    masks[2:, 4:, 4:] = True
    groups = cv.TokenGroups.from_masks(tiny_model(), {"object": masks})
    prepared = task_of([0, 1, 2, 3], [4, 5, 6, 7], groups=groups).prepare(tiny_model())
    chosen = select_pairs(prepared, [2, 0])
    assert chosen.groups is not None
    assert torch.equal(chosen.groups.members, groups.members[[2, 0]])


def test_what_cannot_be_divided_is_refused() -> None:
    with pytest.raises(DataError, match=r"3 pairs cannot be divided.*3 hang together"):
        split(tiny_model(), task_of([0, 1, 2], [9, 9, 9]), 0.5)
    with pytest.raises(DataError, match="one pair cannot be divided"):
        split(tiny_model(), tiny_task(1), 0.5)
    for share in (0.0, 1.0, float("nan")):
        with pytest.raises(OptionError, match="between 0 and 1"):
            split(tiny_model(), tiny_task(4), share)
    with pytest.raises(OptionError, match="a seed must be at least 0"):
        split(tiny_model(), tiny_task(4), 0.5, seed=-1)


def test_both_sides_are_short_to_look_at() -> None:
    model, task = (
        cv.load("catdog-tiny"),
        cv.Task(*catdog_pairs(8, seed=0), metric=cv.logit_diff("cat", "dog")),
    )
    said = "PreparedTask({}, logit_diff(cat, dog), patch ablation, noising, for catdog-tiny)"
    found = split(model, task, held_out=0.25)
    assert [repr(side) for side in found] == [said.format("6 pairs"), said.format("2 pairs")]
