"""Steering: along the readout's own direction it is a straight line, and means are what they say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.views import Direction, difference_of_means
from tests.views.commands import run, save_pictures
from tests.views.literal_vit import micro

SCALES = (-1.5, 0.0, 1.0, 3.0)


def images(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.manual_seed(3))


def test_along_the_readouts_own_direction_the_logit_is_a_straight_line() -> None:
    """With a linear readout without a norm: scale times the squared length of the class's weights."""
    model, module = micro(final_norm=False)
    weight = module.head.weight.detach()[1]
    found = cv.steer(
        model, images(), weight, "resid2", scales=SCALES, tokens="cls", metric=cv.logit(1), progress=False
    )
    expected = np.outer(SCALES, np.full(6, float(weight.square().sum())))
    np.testing.assert_allclose(found.outcomes.values(), expected, atol=1e-4)
    drawn = found.control()
    assert drawn.shape == (5, 4)
    np.testing.assert_allclose(drawn[:, 1], 0, atol=1e-5)
    assert (np.abs(drawn[:, 3]) < expected[3, 0]).all(), "no other direction of the length does as much"


def test_a_clamp_holds_the_coordinate() -> None:
    model, module = micro(final_norm=False)
    weight, bias = module.head.weight.detach()[0], float(module.head.bias.detach()[0])
    found = cv.steer(
        model, images(), weight, "resid2", scales=SCALES, tokens="cls", how="clamp", controls=0,
        metric=cv.logit(0), progress=False,
    )  # fmt: skip
    expected = np.outer(SCALES, np.full(6, float(weight.square().sum()))) + bias
    np.testing.assert_allclose(found.outcomes.after, expected, atol=1e-4)
    assert any("no random directions" in caveat for caveat in found.caveats)
    with pytest.raises(OptionError, match="no random directions"):
        found.control()


def test_difference_of_means_leads_from_one_mean_to_the_other() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(7, seed=0)
    found = difference_of_means(model, pairs.clean, pairs.corrupt[:4], "resid2", tokens="patch", batch_size=2)
    cats, dogs = (
        model.activations(each, "resid2", tokens="patch", progress=False)["resid2"]
        for each in (pairs.clean, pairs.corrupt[:4])
    )
    expected = cats.mean(dim=(0, 1)) - dogs.mean(dim=(0, 1))
    torch.testing.assert_close(found.values, expected, atol=1e-5, rtol=1e-4)
    assert found.length == pytest.approx(float(expected.norm()), rel=1e-4)
    assert repr(found).startswith("Direction(resid2: 64 numbers, 1 = the distance between the means")
    steered = cv.steer(model, pairs.corrupt, found, scales=[1.0], controls=0, progress=False)
    by_hand = model.edit({"resid2": cv.add(expected, tokens="patch")})(pairs.corrupt)
    top = model(pairs.corrupt).argmax(dim=-1)
    np.testing.assert_allclose(
        steered.outcomes.after[0], by_hand.gather(1, top[:, None])[:, 0], atol=1e-3
    )  # the direction brings its own site and tokens


def test_dogs_are_steered_to_cats_by_the_means_and_not_by_random_directions(tmp_path: Path) -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(8, seed=0)
    more_cat = difference_of_means(model, pairs.clean, pairs.corrupt, "resid3", tokens="cls")
    task = cv.Task(pairs.corrupt, pairs.clean, metric=cv.logit_diff("cat", "dog"))
    one, again, other = (
        cv.steer(model, task, more_cat, seed=seed, batch_size=size, progress=False)
        for seed, size in ((0, None), (0, 3), (1, None))
    )
    assert one.estimate(2.0).value > one.estimate(1.0).value > one.control()[:, 4].max() + 1
    np.testing.assert_allclose(one.outcomes.after, again.outcomes.after, atol=1e-4)
    np.testing.assert_allclose(one.control(), again.control(), atol=1e-4)
    assert np.abs(one.control() - other.control()).max() > 1e-3
    figure = one.figure(of="flips")
    text = figure.save(tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("the direction", "random, same length", "resid3"))
    (drawn,) = (line for line in figure.axes[0].lines if line.get_label() == "the direction")
    points = dict(zip(*map(np.asarray, drawn.get_data()), strict=True))
    assert points == {0.0: 0.0} | {scale: one.estimate(scale, of="flips").value for scale in one.scales}
    assert repr(one).startswith("Steering(add at resid3; logit_diff(cat, dog): ")
    with pytest.raises(OptionError, match=r"no scale 7: there are -2, -1"):
        one.estimate(7)


def test_what_cannot_be_steered_is_refused() -> None:
    model, clean = cv.load("catdog-tiny"), catdog_pairs(2, seed=0).clean
    good = torch.ones(64)
    for error, match, direction, site, options in [
        (OptionError, "does not say where", good, None, {}),
        (NameNotFoundError, "unknown site", good, "resid9", {}),
        (OptionError, "at one site", good, "a0.h0.pattern", {}),
        (OptionError, "at one site", good, "resid*", {}),
        (DataError, "the direction at resid1", torch.ones(5), "resid1", {}),
        (DataError, "the direction at resid1", torch.zeros(64), "resid1", {}),
        (OptionError, "no scales", good, "resid1", {"scales": []}),
        (OptionError, "scale must be", good, "resid1", {"scales": ["2"]}),
        (NameNotFoundError, "unknown way of steering", good, "resid1", {"how": "push"}),
        (OptionError, "no tokens are called", Direction(good, "resid1", "reg"), None, {}),
    ]:
        with pytest.raises(error, match=match):
            cv.steer(model, clean, direction, site, progress=False, **options)
    with pytest.raises(DataError, match="the same mean"):
        difference_of_means(model, clean, clean, "resid1")


def test_features_that_are_no_classes_have_a_metric_alone() -> None:
    model, _ = micro(num_classes=0)
    assert not model.has_classes
    found = cv.steer(
        model, images(), torch.arange(12.0), "resid1", metric=cv.similarity(), scales=[2.0], progress=False
    )
    assert found.estimate(2.0).value < -0.001
    with pytest.raises(OptionError, match="no classes, so there is no 'kl'"):
        found.estimate(2.0, of="kl")
    with pytest.raises(OptionError, match="has no classes"):
        cv.steer(model, images(), torch.ones(12), "resid1", progress=False)


# -- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, pairs = tmp_path_factory.mktemp("photos"), catdog_pairs(5, seed=0, preprocessed=False)
    for name, pictures in (("cats", pairs.clean), ("dogs", pairs.corrupt)):
        save_pictures(folder / name, pictures)
    return folder


def test_each_command_writes_its_picture(photos: Path, tmp_path: Path) -> None:
    cats, dogs = photos / "cats", photos / "dogs"
    vector = tmp_path / "direction.npy"
    np.save(vector, np.ones(64))
    for command, options, said in [
        ("knockouts", (cats, "--to", "cls", "--by", "head"), "patch -> cls"),
        ("tokens", (cats, "--token", "cls", "--token", "0.25", "--way", "mean"), "0.25"),
        ("steering", (dogs, "--site", "resid3", "--towards", cats, "--away", dogs), "+0.5"),
        ("steering", (dogs, "--site", "resid3", "--direction", vector, "--scale", "4"), "+4"),
    ]:
        out = tmp_path / f"{command}.png"
        assert said in run(command, "--model", "catdog-tiny", *options, "--out", out)
        assert out.read_bytes().startswith(b"\x89PNG")


def test_commands_refuse_what_they_cannot_do(photos: Path, tmp_path: Path) -> None:
    model = ("--model", "catdog-tiny", "--out", tmp_path / "view.png")
    with pytest.raises(OptionError, match="needs pairs"):
        run("knockouts", photos / "cats", *model, "--way", "corrupt")
    with pytest.raises(OptionError, match="give a direction"):
        run("steering", photos / "dogs", *model, "--site", "resid3")
