"""Compiled models compute what they claim, over the edges that they say, in a stream of constant length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.groundtruth import PARTS, PROGRAMS
from circuitvit.groundtruth.edges import largest_effects
from circuitvit.groundtruth.programs import N_PATCHES, images_of
from circuitvit.testing import active_edges

PLAIN = [(name, ()) for name in PROGRAMS]
WITH_A_PART = [(name, (part,)) for name in PROGRAMS for part in PARTS]
ALL_BUT_BACKUP = tuple(part for part in PARTS if part != "backup")

Grid = dict[str, np.ndarray]
"""For every pixel feature, whether it is on, `(patch,)`."""


def named(cases: list[tuple[str, tuple[str, ...]]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("name", "parts"), cases, ids=["+".join((a, *b)) for a, b in cases])


def task_of(found: cv.Compiled, n: int = 12, change: str | None = None, **options: object) -> cv.Task:
    metric = cv.logit_diff("yes", "no")
    return cv.Task(*found.pairs(n, change=change), metric=metric, **options)  # type: ignore[arg-type]


def streams(model: cv.Model, images: Tensor) -> list[Tensor]:
    """What each stage after the embedding reads, `(batch, token, d_model)`."""
    found = [model.embed(images)]
    for stage in model.layers:
        found.append(found[-1] + stage.total(stage.write(stage.read(found[-1]))))
    return found


# -- what they compute -----------------------------------------------------------------------------------


@named([*PLAIN, *WITH_A_PART, ("query", ALL_BUT_BACKUP)])
def test_clean_images_are_yes_and_corrupt_ones_no(name: str, parts: tuple[str, ...]) -> None:
    found = cv.compiled(name, parts=parts)
    for change in (None, *found.changes):
        clean, corrupt = found.pairs(24, change=change)
        assert (found.model(clean).argmax(dim=1) == 0).all()
        assert (found.model(corrupt).argmax(dim=1) == 1).all()


def coloured_cue(grid: Grid) -> bool:
    return bool(grid["colour"][grid["cue"]].all())


def spotted_red_square(grid: Grid) -> bool:
    return bool(grid["spotted"][grid["red"] & grid["square"]].all())


def coloured_shape_asked_for(grid: Grid) -> bool:
    shape = "round" if grid["asks-round"][grid["cue"]].all() else "square"
    return bool(grid["colour"][grid[shape]].all())


def coloured_after_the_cue(grid: Grid) -> bool:
    return bool(grid["colour"][(np.flatnonzero(grid["cue"])[0] + 1) % N_PATCHES])


def coloured_majority(grid: Grid) -> bool:
    return bool(grid["colour"].sum() > N_PATCHES / 2)


CLAIMS: dict[str, tuple[Callable[[Grid], bool], tuple[str, ...]]] = {
    "relay": (coloured_cue, ("cue",)),
    "key": (spotted_red_square, ()),
    "query": (coloured_shape_asked_for, ("cue", "round", "square")),
    "hop": (coloured_after_the_cue, ("cue",)),
    "count": (coloured_majority, ()),
}
"""For each program what it computes, and the features that exactly one patch must have, each another."""


def random_grid(name: str, features: tuple[str, ...], rng: np.random.Generator) -> Grid:
    """Random features, but for those that only make sense at one patch."""
    grid = {feature: rng.random(N_PATCHES) < rng.random() for feature in features}
    places = rng.permutation(N_PATCHES)
    for place, feature in zip(places, CLAIMS[name][1], strict=False):
        grid[feature] = np.arange(N_PATCHES) == place
    if name == "key":
        grid["red"] &= ~grid["square"]
        grid["red"][places[0]] = grid["square"][places[0]] = True
    return grid


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_compute_what_they_claim_on_any_image(name: str) -> None:
    """Not only on drawn pairs, where the levels are exact, but with any number of coloured patches."""
    found, rng = cv.compiled(name), np.random.default_rng(0)
    grids = [random_grid(name, found.program.pixels, rng) for _ in range(300)]
    stacked = np.stack([np.stack(list(grid.values())) for grid in grids])
    says = found.model(images_of(torch.from_numpy(stacked))).argmax(dim=1) == 0
    claims = [CLAIMS[name][0](grid) for grid in grids]
    assert says.tolist() == claims
    assert 30 < sum(claims) < 270


def test_each_program_has_a_claim_and_says_it_in_words() -> None:
    assert set(CLAIMS) == set(PROGRAMS)
    assert all(cv.compiled(name).program.claim for name in PROGRAMS)


# -- how they compute it ---------------------------------------------------------------------------------


@named([*PLAIN, *WITH_A_PART])
def test_every_state_has_mean_0_and_length_constant(name: str, parts: tuple[str, ...]) -> None:
    found = cv.compiled(name, parts=parts)
    for stream in streams(found.model, torch.cat(found.pairs(12))):
        assert float(stream.mean(dim=-1).abs().max()) < 1e-5
        assert float((stream.var(dim=-1, correction=0) - 1).abs().max()) < 1e-4


@pytest.mark.parametrize("name", PROGRAMS)
def test_rotation_changes_nothing_but_the_axes(name: str) -> None:
    plain, one, other = (
        cv.compiled(name, rotated=False),
        cv.compiled(name, seed=1),
        cv.compiled(name, seed=2),
    )
    images = torch.cat(plain.pairs(12))
    logits = plain.model(images)
    for rotated in (one, other):
        assert float((rotated.model(images) - logits).abs().max()) < 1e-4
        assert rotated.wired == plain.wired
        assert int((rotated.model.module.head.weight[0].abs() > 1e-6).sum()) == rotated.model.d_model
    assert int((plain.model.module.head.weight[0] != 0).sum()) == 2
    assert one.model.weights_hash != other.model.weights_hash


@named([*PLAIN, ("query", ALL_BUT_BACKUP)])
def test_decoys_attend_and_write_and_nobody_reads(name: str, parts: tuple[str, ...]) -> None:
    found = cv.compiled(name, parts=parts)
    clean, corrupt = found.pairs(6)
    bait = clean[:, found.program.pixels.index("bait"), ::2, ::2].flatten(1) > 0
    prefix = found.program.size.tokens - N_PATCHES
    effects = cv.attribute(found.model, task_of(found, 6), "exact", progress=False).to_dict()
    stages = [stage for stage in found.model.layers if stage.nodes.kind == "attention"]
    before = [streams(found.model, images)[::2] for images in (clean, corrupt)]
    seen = 0
    for place, (layer, stage) in enumerate(zip(found.program.layers, stages, strict=True)):
        reads = [stage.read(stream[place]) for stream in before]
        scores = reads[0][0] @ reads[0][1].transpose(-1, -2) * stage.attention.scale
        paid = scores.softmax(dim=-1)[..., prefix:] * bait[:, None, None, :]
        written = [stage.expand(stage.write(each)) for each in reads]
        for head, spec in enumerate(layer.heads):
            if not spec.into.startswith("decoy"):
                continue
            seen += 1
            assert float(paid[:, head].sum(dim=-1).min()) > 0.8
            assert float((written[0][head] - written[1][head]).abs().max()) > 0.1
            edges = [edge for edge in effects if f"a{place}.h{head}" in edge]
            assert max(abs(effects[edge]) for edge in edges) < 1e-4
    assert seen >= len(stages)


# -- what is known of them -------------------------------------------------------------------------------


@named([*PLAIN, *(("key", (part,)) for part in PARTS), ("query", ALL_BUT_BACKUP)])
def test_edges_are_active_only_where_something_is_wired(name: str, parts: tuple[str, ...]) -> None:
    """With a wide gap between the two: active effects are of order 1, all others are rounding."""
    found = cv.compiled(name, parts=parts)
    effects = largest_effects(task_of(found).prepare(found.model))
    active = effects > 1.0
    assert active.any()
    assert not (active & ~found.wired.kept).any()
    assert effects[~active].max() < 1e-4


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_wired_edge_is_active_on_some_pair(name: str) -> None:
    """What is read from positions is the same in both images of a pair, so there zeros take its place."""
    found = cv.compiled(name)
    active = active_edges(found.model, task_of(found))
    idle = found.wired - active
    assert set(idle) == ({"input->a0.h0<q>", "input->a0.h0<k>"} if name == "hop" else set())
    assert idle <= active_edges(found.model, task_of(found, ablation="zero"))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("relay", "colour", "input->a0.h0<v>, a0.h0->a1.h0<v>, a1.h0->logits"),
        ("relay", "cue", "input->a0.h0<k>, a0.h0->a1.h0<v>, a1.h0->logits"),
        ("key", "target", "input->m0, m0->a1.h0<k>, a1.h0->logits"),
        ("key", "spots", "input->a1.h0<v>, a1.h0->logits"),
        ("query", "question", "input->a0.h0<v>, a0.h0->a1.h0<q>, a1.h0->logits"),
        ("query", "cue", "input->a0.h0<k>, a0.h0->a1.h0<q>, a1.h0->logits"),
        ("query", "shapes", "input->a1.h0<k>, a1.h0->logits"),
        ("query", "colour", "input->a1.h0<v>, a1.h0->logits"),
        ("hop", "colour", "input->a0.h0<v>, a0.h0->a1.h0<v>, a1.h0->logits"),
        ("hop", "cue", "input->a1.h0<k>, a1.h0->logits"),
        ("count", "colour", "input->a0.h0<v>, a0.h0->m1, m1->logits"),
    ],
)
def test_the_change_decides_which_edges_are_active(name: str, change: str, expected: str) -> None:
    found = cv.compiled(name)
    assert set(active_edges(found.model, task_of(found, 4, change))) == set(expected.split(", "))


def test_all_changes_are_covered() -> None:
    assert {name: cv.compiled(name).changes for name in PROGRAMS} == {
        "relay": ("colour", "cue"),
        "key": ("target", "spots"),
        "query": ("question", "cue", "shapes", "colour"),
        "hop": ("colour", "cue"),
        "count": ("colour",),
    }


@named([*PLAIN, *WITH_A_PART, ("query", ALL_BUT_BACKUP)])
def test_every_feature_has_one_writer(name: str, parts: tuple[str, ...]) -> None:
    features = cv.compiled(name, parts=parts).program.features
    assert len(set(features)) == len(features)


# -- how they are asked for ------------------------------------------------------------------------------


def test_pairs_are_reproducible() -> None:
    found = cv.compiled("query")
    clean, corrupt = found.pairs(8, seed=3)
    fewer, _ = found.pairs(5, seed=3)
    assert torch.equal(fewer, clean[:5])
    assert torch.equal(found.pairs(8, seed=3)[1], corrupt)
    assert not torch.equal(found.pairs(8, seed=4)[0], clean)


def test_parts_are_a_set() -> None:
    one = cv.compiled("relay", parts=("register", "cancelling"))
    two = cv.compiled("relay", parts=["cancelling", "register", "cancelling"])
    assert one.name == two.name == "relay+cancelling+register"
    assert cv.compiled("relay", parts="register").name == "relay+register"
    assert one.model.weights_hash == two.model.weights_hash
    assert one.model.token_kinds(11)[:2] == ("cls", "reg")


def test_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(cv.CircuitViTError, match="unknown program 'relai': did you mean 'relay'"):
        cv.compiled("relai")
    with pytest.raises(cv.CircuitViTError, match="unknown part 'back-up': did you mean 'backup'"):
        cv.compiled("relay", parts=("back-up",))
    with pytest.raises(cv.CircuitViTError, match="unknown change of relay 'color': did you mean 'colour'"):
        cv.compiled("relay").pairs(2, change="color")
    with pytest.raises(cv.CircuitViTError, match="at least 1 pair"):
        cv.compiled("relay").pairs(0)
    with pytest.raises(cv.CircuitViTError, match="a backup or a gate, not both"):
        cv.compiled("relay", parts=("backup", "gate"))
    with pytest.raises(cv.CircuitViTError, match="a seed must be at least 0"):
        cv.compiled("relay", seed=-1)
