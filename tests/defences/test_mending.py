"""Mend against models in which a cue's path was planted, and its first-order effects against differences."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.defences.choosing import Watched
from circuitvit.defences.mended import BEFORE, Mended
from circuitvit.defences.removable import removable
from circuitvit.errors import DataError, NameNotFoundError, OptionError, UnsupportedModelError
from circuitvit.groundtruth.compiler import CLASSES, assemble
from circuitvit.groundtruth.programs import (
    BALLAST,
    SIDE,
    SOFT,
    Head,
    Layer,
    Program,
    Scene,
    Size,
    Unit,
    draw,
    images_of,
    look_for,
    shares,
    with_decoys,
)
from circuitvit.models import Model
from circuitvit.models.zoo import InputSpec
from circuitvit.tasks import prepare

METRIC = cv.logit_diff("yes", "no")


def program(through_neurons: bool = False) -> Program:
    """The cue patch's colour by way of `a0.h0` and `a1.h0`, and a shortcut: how much grass there is, `a0.h1`.

    Args:
        through_neurons: whether the shortcut goes by way of `m1` too.
    """
    size = Size(gap=SOFT, ballast=BALLAST)
    takes = Head(look_for(size, "cue"), "colour", "seen", shares(size, 3))
    grass = Head((), "grass", "outdoors", (3 / size.tokens, 6 / size.tokens))
    passes = Head((), "seen", "answer", (0.0, 1.0))
    units = (Unit("all", ("outdoors",), "vote"),) if through_neurons else ()
    scene = Scene(
        {"cue": (0,), "colour": (0, 2, 3), "grass": (0, 1, 2, 3, 4, 5)},
        {"colour": {"colour": (1, 2, 3)}, "grass": {"grass": (0, 1, 2)}},
    )
    return Program(
        claim="the cue patch is coloured, or there is much grass",
        size=size,
        scenes=(scene,),
        layers=(Layer((takes, grass)), Layer((passes,), units)),
        readout={"answer": 1.0, "vote" if through_neurons else "outdoors": 1.5},
        carrier=(1, passes),
    )


@cache
def planted(through_neurons: bool = False) -> tuple[Model, Program]:
    made = with_decoys(program(through_neurons), 3)
    channels = len(made.pixels)
    spec = InputSpec((channels, SIDE, SIDE), (0.5,) * channels, (0.5,) * channels, "nearest")
    return cv.wrap(assemble(made, 0).float(), classes=CLASSES, preprocessing=spec), made


def pairs(made: Program, change: str, count: int = 24, seed: int = 0) -> tuple[Tensor, Tensor]:
    clean, corrupt = draw(made.scenes, change, count, seed)
    return images_of(clean), images_of(corrupt)


def tasks(made: Program) -> tuple[cv.Task, cv.Task]:
    return tuple(  # type: ignore[return-value]
        cv.Task(*pairs(made, change, seed=seed), METRIC) for change, seed in (("grass", 0), ("colour", 1))
    )


@cache
def mended() -> Mended:
    model, made = planted()
    unwanted, wanted = tasks(made)
    return cv.mend(model, unwanted, {"colour": wanted}, progress=False)


def test_the_planted_path_is_removed_and_nothing_else() -> None:
    found = mended()
    assert found.chosen == ("a0.h1.z",)
    (cue, colour), at = found.behaviours, found.methods.index("circuit")
    assert np.abs(cue.effect[at] / cue.effect[0]).max() < 0.01  # but for a norm, nothing is left of the one
    assert np.abs(colour.effect[at] / colour.effect[0] - 1).max() < 0.05  # and all of the other
    assert found.cost(at) == 0
    assert found.best == "circuit"
    assert (cue.chosen_on, len(cue.pairs)) == (12, 12)


def test_other_rows_are_judged_by_the_same_rules() -> None:
    found = mended()
    assert found.methods[:4] == (BEFORE, "circuit", "contrast", "projection")
    assert found.row("contrast").removed == ("a0.h1.z",)  # it writes to the answer directly
    # along the direction in which grass moves the stream lies what a decoy writes, which the colour moves too
    assert (found.row("projection").removed, found.row("projection").tried) == ((), 1)
    assert [found.row(name).folds for name in ("circuit", "contrast", "projection")] == [True, True, False]
    drawn = [row for row in found.rows if row.method.startswith("random")]
    assert len(drawn) == 5
    assert all(row.kinds == ("head",) and row.removed != found.chosen for row in drawn)
    assert any("dyslexify is left out" in caveat for caveat in found.caveats)


def test_a_path_by_way_of_neurons_is_cut_there_and_is_none_that_heads_write_directly() -> None:
    model, made = planted(through_neurons=True)
    unwanted, wanted = tasks(made)
    found = cv.mend(
        model, unwanted, wanted, units=["neurons"], methods=["circuit", "contrast"], progress=False
    )
    assert found.chosen
    assert all(site.startswith("m1.hidden") for site in found.chosen)
    assert np.abs(found.behaviours[0].effect[1]).max() < 0.05
    assert any("contrast is left out" in caveat for caveat in found.caveats)


def test_nothing_is_removed_where_the_cue_is_not_heeded_or_costs_too_much() -> None:
    model, made = planted()
    unwanted, wanted = tasks(made)
    same = cv.Task(*(pairs(made, "grass")[0],) * 2, METRIC)
    idle = cv.mend(model, same, wanted, methods=["circuit"], progress=False)
    assert idle.chosen == ()
    assert idle.best == BEFORE
    assert "no more than chance would" in idle.caveats[0]
    itself = cv.mend(model, unwanted, unwanted, methods=["circuit"], progress=False)
    assert itself.chosen == ()
    assert "removes nothing" in repr(itself)


def test_what_an_edited_node_writes_stays_as_it_is() -> None:
    model, made = planted()
    unwanted, wanted = tasks(made)
    edited = model.edit({"a0.h1": lambda written: 1.0 * written})
    found = cv.mend(edited, unwanted, wanted, methods=["circuit"], progress=False)
    assert "a0.h1.z" not in found.chosen
    assert found.caveats[0] == "edited in what they write, and left so: a0.h1"
    everything = {site.node: 0 for site in model.all_sites if site.kind == "z"}
    with pytest.raises(UnsupportedModelError, match=r"that may be removed \(a0.h0, a0.h1, .* is edited"):
        cv.mend(model.edit(everything), unwanted, wanted, units=["heads"], progress=False)


def test_the_model_and_the_file(tmp_path: Path) -> None:
    found, (model, _) = mended(), planted()
    images = pairs(planted()[1], "grass", 3)[0]
    assert torch.equal(found.model(images), model.edit(found.edits())(images))
    assert torch.allclose(found.to_module()(images), found.model(images), atol=1e-5)
    again = Mended.load(found.save(tmp_path / "found.json"))
    assert again.table() == found.table()
    assert torch.equal(again.applied(model)(images), found.model(images))
    with pytest.raises(OptionError, match="a file holds no model"):
        again.model  # noqa: B018
    with pytest.raises(OptionError, match="other weights"):
        again.applied(cv.load("catdog-tiny"))


def test_effects_to_first_order_are_slopes() -> None:
    model = cv.load("catdog-tiny")
    task = prepare(model, cv.Task(*catdog_pairs(4, seed=3), cv.logit_diff("cat", "dog")))
    nodes = removable(model, ["heads", "neurons", "MLPs"], [task.clean, task.corrupt], "mean", None, False)  # type: ignore[list-item]
    watched = Watched("species", task)
    found = watched.to_first_order(nodes, model, 3)  # in batches that are not full
    for name in ("a3.h1.z", "a1.h2.z", "m3.hidden[5]", "m1.hidden[70]", "m2"):
        value, step = nodes.removal([name])[name], 1e-2

        def moved(x: Tensor, by: float, value: object = value) -> Tensor:
            return x + by * (value - x)  # type: ignore[operator,no-any-return]

        ends = [
            watched.share(watched.seen(model.edit({name: lambda x, by=by: moved(x, by)})))
            for by in (-step, step)
        ]
        assert found[nodes.numbers[name]] == pytest.approx(
            (ends[1] - ends[0]) / (2 * step), rel=2e-2, abs=2e-4
        )


def test_groups_and_labels_are_counted() -> None:
    model, made = planted()
    clean, corrupt = pairs(made, "grass")
    labels = cv.PerPair(("yes",) * 24 + ("no",) * 24)
    others = cv.PerPair(("no",) * 24 + ("yes",) * 24)
    both = torch.cat([clean, pairs(made, "colour", seed=1)[1]])  # the second half is without colour, on grass
    wanted = cv.Task(both, metric=cv.logit_diff(labels, others), ablation="mean")
    groups = ["coloured on grass"] * 24 + ["plain on grass"] * 24
    found = cv.mend(
        model, cv.Task(clean, corrupt, METRIC), {"colour": wanted}, groups={"colour": groups},
        methods=["circuit", "random"], progress=False,
    )  # fmt: skip
    seen = found.behaviours[1]
    assert found.chosen == ("a0.h1.z",)
    assert seen.worst(0)[0] == "plain on grass"  # type: ignore[index]
    assert seen.worst(0)[1].value == 0  # type: ignore[index]
    assert seen.worst(1)[1].value == 1  # type: ignore[index]
    assert found.best == "circuit"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_loss": 1.5}, OptionError, "max_loss is a share"),
        ({"max_loss": None}, OptionError, "max_loss is a share"),
        ({"groups": ["a"] * 24}, OptionError, "groups are given by the name of a wanted behaviour"),
        ({"methods": ["random"]}, OptionError, "the first is the one"),
        ({"methods": ["circus"]}, NameNotFoundError, "circuit"),
        ({"units": ["edges"]}, NameNotFoundError, "kind of nodes"),
        ({"constant": "median"}, NameNotFoundError, "constant"),
        ({"groups": {"shape": []}}, NameNotFoundError, "behaviour to have groups"),
        ({"groups": {"keep": ["a"]}}, DataError, "1 groups of keep for 24 pairs"),
        ({"region": "grass"}, OptionError, "no token groups"),
        ({"methods": ["dyslexify"]}, OptionError, "region= names a token group"),
    ],
)
def test_what_makes_no_sense_is_refused(
    options: dict[str, object], error: type[Exception], message: str
) -> None:
    model, made = planted()
    unwanted, wanted = tasks(made)
    with pytest.raises(error, match=message):
        cv.mend(model, unwanted, wanted, progress=False, **options)  # type: ignore[arg-type]


def test_tasks_that_say_too_little_are_refused() -> None:
    model, made = planted()
    unwanted, wanted = tasks(made)
    alone = cv.Task(pairs(made, "grass")[0], metric=METRIC, ablation="mean")
    with pytest.raises(DataError, match="needs corrupt images"):
        cv.mend(model, alone, wanted)
    with pytest.raises(OptionError, match="what is to be kept"):
        cv.mend(model, unwanted, {})
    right = cv.Task(*pairs(made, "grass"), cv.accuracy("yes"))
    with pytest.raises(OptionError, match="has no gradient"):
        cv.mend(model, right, wanted)
