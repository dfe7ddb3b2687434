"""Over training: a circuit planted at a known step is found there, and chance is not taken for a change."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.groundtruth.compiler import assemble
from circuitvit.verification import Estimate
from circuitvit.views import Across
from circuitvit.views.over_training import sharp_p

STEPS = (0, 40, 90, 160, 250)
FORMED = 90


@cache
def relay() -> cv.Compiled:
    """The answer reaches the MLP of the last layer over either of two heads, `a1.h0` and `a1.h1`."""
    return cv.compiled("relay", parts="backup")


@cache
def checkpoint(step: int) -> cv.Model:
    """One of the two heads writes, from step 90 on the other, and every weight is off by two percent."""
    module: Any = assemble(relay().program, seed=0)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        by_head = module.blocks[1].attn.proj.weight.unflatten(1, (module.blocks[1].attn.num_heads, -1))
        by_head[:, int(step >= FORMED)] = 0
        for weights in module.parameters():
            spread = 0.02 * weights.std() if weights.numel() > 1 else 0
            weights += spread * torch.randn(weights.shape, generator=generator).double()
    spec = relay().model.preprocessing
    return cv.wrap(module.float(), name=f"step {step}", classes=("yes", "no"), preprocessing=spec)


def planted(steps: tuple[int, ...] = STEPS) -> dict[int, cv.Model]:
    return {step: checkpoint(step) for step in steps}


def task(n: int = 12) -> cv.Task:
    return cv.Task(*relay().pairs(n, seed=3), metric=cv.logit_diff("yes", "no"))


THROUGH_FIRST = ("input->a0.h0<k>", "input->a0.h0<v>", "a0.h0->a1.h0<v>", "a1.h0->m1", "m1->logits")


@cache
def found() -> Across:
    return cv.across(planted(), task(), THROUGH_FIRST, progress=False)


def test_a_planted_circuit_forms_at_its_step_although_the_behaviour_is_there_all_along() -> None:
    assert found().formed == (FORMED, 40, FORMED)
    assert all(0.9 < each.value < 1.1 for each in found().behaviour)
    carried = [each.value for each in found().faithfulness if each is not None]
    assert carried == pytest.approx([0, 0, 1, 1, 1], abs=0.05)
    assert not found().leaps()


def test_the_edges_of_both_paths_change_there_and_no_others() -> None:
    jumps = found().jumps()
    assert {(each["after"], each["by"]) for each in jumps} == {(40, FORMED)}
    came = {each["edge"] for each in jumps if float(each["change"] or 0) > 0.9}
    went = {each["edge"] for each in jumps if float(each["change"] or 0) < -0.9}
    assert came == {"a0.h0->a1.h0<v>", "a1.h0->m1"}
    assert went == {"a0.h0->a1.h1<v>", "a1.h1->m1"}
    assert len(jumps) == len(came | went)


def test_all_figures_are_those_that_diff_gives_of_two_checkpoints() -> None:
    two = cv.diff(checkpoint(250), checkpoint(160), task(), THROUGH_FIRST, progress=False)
    place = STEPS.index(160)
    assert two.new is not None
    assert two.old is not None
    assert found().edges == two.edges
    np.testing.assert_allclose(found().effects[[-1, place]], [two.old, two.new], atol=1e-6)
    assert found().behaviour[place] == two.behaviour
    assert found().faithfulness[place] == two.faithfulness_new


@pytest.mark.parametrize("method", ["local", "eap"])
def test_estimates_of_edges_are_those_of_attribute(method: str) -> None:
    steps = (0, 40, FORMED)
    some = cv.across(planted(steps), task(5), THROUGH_FIRST, method=method, edges=6, progress=False)
    own = [cv.attribute(checkpoint(step), task(5), method, progress=False) for step in steps]
    values = [[-scores[name] / some.effect for name in some.edges] for scores in own]
    np.testing.assert_allclose(some.effects, values, atol=1e-5)
    assert len(some.edges) < found().circuit.graph.n_edges
    assert {*THROUGH_FIRST, "a1.h1->m1"} <= set(some.edges)  # which is nothing in the last checkpoint


# -- the test for sharp changes --------------------------------------------------------------------

Draw = Callable[[np.random.Generator], Any]
AT = (0, 41, 165, 372, 661, 1033, 1488, 2025, 2645, 3347, 4132, 5000)
PAIRS, EDGES = 16, 40


def noise(rng: np.random.Generator) -> Any:
    """Of pairs, half of it alike in all edges of a checkpoint."""
    return 0.2 * (rng.normal(size=(len(AT), PAIRS, EDGES)) + rng.normal(size=(len(AT), PAIRS, 1)))


def still(rng: np.random.Generator, effect: Any) -> Any:
    """What differs between pairs stays."""
    return noise(rng) + rng.normal(size=(1, PAIRS, EDGES))


def steady(rng: np.random.Generator, effect: Any) -> Any:
    """From nothing to all of the behaviour at an even pace."""
    return noise(rng) + np.array(AT)[:, None, None] / AT[-1] * effect[:, None]


def within_tolerance(rng: np.random.Generator, effect: Any) -> Any:
    """All at once, but no more than the tolerance: the edge of what is no change."""
    later = np.arange(len(AT))[:, None] >= rng.integers(1, len(AT), size=EDGES)
    return 0.1 * noise(rng) + 0.1 * later[:, None] * effect[:, None]


@pytest.mark.parametrize("null", [still, steady, within_tolerance])
def test_chance_trends_and_small_changes_give_false_alarms_in_at_most_5_percent(null: Any) -> None:
    rng, alarms = np.random.default_rng(0), []
    for _ in range(60):
        effect = rng.normal(1, 0.3, size=PAIRS)
        p = sharp_p(null(rng, effect), effect, AT, 0.1)
        alarms.append(stats.false_discovery_control(p.ravel()).min() <= 0.05)
    assert np.mean(alarms) <= 0.05


def test_of_one_change_that_is_the_tolerance_one_in_forty_p_values_is_below_5_percent() -> None:
    """Half of the level, as nobody says beforehand whether it goes up or down; nothing else is wasted."""
    rng = np.random.default_rng(1)
    effect = rng.normal(1, 0.3, size=(500, PAIRS))
    later = np.arange(3)[:, None, None] >= 1
    shown = 0.1 * rng.normal(size=(500, 3, PAIRS, 4)) + 0.1 * later * effect[:, None, :, None]
    low = [sharp_p(*each, (0, 1, 99), 0.1)[0] for each in zip(shown, effect, strict=True)]
    assert 0.015 < np.mean(np.array(low) <= 0.05) < 0.035


def test_a_change_at_once_is_told_from_the_same_change_at_an_even_pace() -> None:
    rng = np.random.default_rng(2)
    effect = rng.normal(1, 0.3, size=PAIRS)
    at_once = noise(rng) + (np.arange(len(AT)) >= 6)[:, None, None] * effect[:, None]
    corrected = stats.false_discovery_control(sharp_p(at_once, effect, AT, 0.1).ravel()).reshape(-1, EDGES)
    assert (corrected[5] <= 0.05).mean() > 0.8
    assert (np.delete(corrected, 5, axis=0) > 0.05).all()


# -- when it formed --------------------------------------------------------------------------------


def made(*figures: tuple[Estimate, Estimate | None]) -> Across:
    """A finding of such figures, in steps of ten."""
    count = len(figures)
    return replace(
        found(), steps=tuple(range(0, 10 * count, 10)), behaviour=tuple(first for first, _ in figures),
        faithfulness=tuple(other for _, other in figures), names=("",) * count, weights=("",) * count,
        effects=found().effects[:count], widths=found().widths[:count], p=found().p[: count - 1],
        p_behaviour=found().p_behaviour[: count - 1],
    )  # fmt: skip


GONE, ALL, HALF = Estimate(0.0, -0.1, 0.1), Estimate(1.0, 0.9, 1.1), Estimate(0.7, 0.4, 0.9)


@pytest.mark.parametrize(
    ("figures", "formed"),
    [
        ([(GONE, None), (GONE, None), (ALL, ALL)], (20, 10, 20)),
        ([(GONE, None), (HALF, ALL), (ALL, ALL)], (10, 0, 20)),
        ([(GONE, None), (ALL, HALF), (ALL, ALL)], (10, 0, 20)),
        ([(ALL, ALL), (ALL, GONE), (ALL, ALL)], (20, None, 20)),
        ([(GONE, None), (ALL, ALL), (ALL, GONE)], (None, 0, None)),
        ([(HALF, HALF), (HALF, HALF), (HALF, HALF)], (0, None, None)),
    ],
    ids=["at once", "behaviour unsure", "circuit unsure", "lost and found", "never", "all unsure"],
)
def test_a_circuit_has_formed_once_it_stays(figures: Any, formed: tuple[int | None, ...]) -> None:
    assert made(*figures).formed == formed
    assert str(made(*figures)).startswith("3 checkpoints: the circuit ")


# -- files, pictures, refusals ---------------------------------------------------------------------


def test_it_is_a_table_a_text_and_two_figures(tmp_path: Path) -> None:
    rows = list(found().records())
    assert len(rows) == len(STEPS) * (2 + len(found().edges))
    assert {row["step"] for row in rows if (row["p_fdr"] or 1) < 0.05} == {FORMED}
    assert "a1.h1->m1 | 40 to 90" in found().save(tmp_path / "a.md").read_text()
    assert found().figure().save(tmp_path / "a.svg").read_text().count("formed by step 90") == 1
    strip = found().strip(tmp_path / "s.svg", [40, 90])
    titles = [each.text for each in ET.parse(strip).iter("{http://www.w3.org/2000/svg}title")]
    shown = {name: sum(str(each).startswith(f"{name}:") for each in titles) for name in found().edges}
    assert {name: count for name, count in shown.items() if count} == {
        "input->a0.h0<k>": 2, "input->a0.h0<v>": 2, "m1->logits": 2, "a0.h0->a1.h0<v>": 1, "a1.h0->m1": 1,
        "a0.h0->a1.h1<v>": 1, "a1.h1->m1": 1,
    }  # fmt: skip
    assert set(found().told_steps(4)) == {0, 40, FORMED, 250}


def opened(path: Path) -> cv.Model:
    return checkpoint(int(path.read_text()))


def test_a_folder_is_read_by_the_last_number_of_each_name(tmp_path: Path) -> None:
    for step in (90, 0, 160):
        (tmp_path / f"run2-epoch-{step}.pt").write_text(str(step))
    (tmp_path / "log.txt").write_text("no checkpoint")
    some = cv.across(tmp_path, task(5), THROUGH_FIRST, load=opened, edges=0, progress=False)
    assert (some.steps, some.formed.at) == ((0, 90, 160), 90)
    assert [name.split()[1] for name in some.names] == ["0", "90", "160"]
    (tmp_path / "other-90.pt").write_text("90")
    with pytest.raises(FileError, match=r"other-90.pt and .*run2-epoch-90.pt are both of step 90"):
        cv.across(tmp_path, task(5), load=opened)


def test_cards_that_speak_of_another_step_or_training_are_refused(tmp_path: Path) -> None:
    last = cv.load("catdog-tiny")
    assert last.card is not None
    recipe = {**last.card.recipe, "steps_done": 7}
    other = replace(last, card=replace(last.card, recipe={**recipe, "learning_rate": 1.0}))
    pairs = cv.Task(*catdog_pairs(5), metric=cv.logit_diff("cat", "dog"))
    with pytest.raises(
        OptionError, match=r"catdog-tiny and catdog-tiny are of two trainings, .*'learning_rate': 1.0"
    ):
        cv.across({0: other, 1: last, 2: last}, pairs, ["input->logits"], edges=0, progress=False)
    for step in range(3):
        (tmp_path / f"x-{step}.pt").touch()
    with pytest.raises(FileError, match=r"x-2.pt is called a checkpoint of step 2, and its card says 7"):
        cv.across(tmp_path, pairs, load=lambda path: replace(last, card=replace(last.card, recipe=recipe)))


@pytest.mark.parametrize(
    ("given", "options", "error", "message"),
    [
        ((0, 90), {}, OptionError, "2 checkpoints: give 3 or more; two are compared by circuitvit.diff"),
        (STEPS, {"method": "hybrid"}, OptionError, "hybrid does not score each pair by itself"),
        (STEPS, {"method": "ifr"}, OptionError, "ifr is no estimate of effects"),
        (STEPS, {"steps": 3}, OptionError, "exact takes no 'steps'"),
        (STEPS, {"window": 1.5}, OptionError, "the window"),
        (STEPS, {"task": 4}, DataError, "4 pairs to measure on: give 5 or more"),
    ],
)
def test_what_makes_no_sense_is_refused(
    given: tuple[int, ...], options: Mapping[str, Any], error: type[Exception], message: str
) -> None:
    pairs = task(options.get("task", 6))
    rest = {name: value for name, value in options.items() if name != "task"}
    with pytest.raises(error, match=message):
        cv.across(planted(given), pairs, THROUGH_FIRST, progress=False, **rest)


def test_folders_without_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="cannot read the folder"):
        cv.across(tmp_path / "none", task(5))
    with pytest.raises(FileError, match="holds no checkpoints"):
        cv.across(tmp_path, task(5))
    (tmp_path / "last.pt").touch()
    with pytest.raises(FileError, match=r"last.pt holds weights alone: say how they are loaded"):
        cv.across(tmp_path, task(5))
    for given, load, said in (
        ([1, 2, 3], None, "a folder, or a mapping from steps to models or files, not list"),
        ({0: "0.pt", 1: "1.pt", 2: "2.pt"}, lambda path: {}, "made a dict of 2.pt"),
        ({0: "0.pt", 1: "1.pt", 2: "2.pt"}, "timm", "takes a function from a path to a model"),
    ):
        with pytest.raises(OptionError, match=said):
            cv.across(given, task(5), load=load)  # type: ignore[arg-type]
    with pytest.raises(FileError, match=r"last.pt has no step in its name"):
        cv.across(tmp_path, task(5), load=opened)
