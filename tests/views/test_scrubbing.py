"""Causal scrubbing: what is true of a model is recovered whole, what is false is caught and named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvit as cv
from circuitvit.engine.trees import TreeRuns, written_out
from circuitvit.errors import CircuitViTError, FileError
from circuitvit.views.scrubbing import Drawn, Plan, Scrubbing, others, scrub
from tests.rightness import METRIC, drawn_circuit, images, micro


def planted(name: str, n: int = 32) -> tuple[cv.Compiled, cv.Task, dict[str, Any]]:
    """A compiled model, images in which every change is made or not, each with its own answer, and labels."""
    made = cv.compiled(name)
    shown, factors = made.factors(n)
    yes = (made.model(shown).argmax(dim=1) == 0).tolist()
    sides = [cv.PerPair(tuple("yes" if each == side else "no" for each in yes)) for side in (True, False)]
    task = cv.Task(shown, metric=cv.logit_diff(*sides), ablation="resample")
    return made, task, {"answer": yes, **factors}


# -- models whose circuit is known -----------------------------------------------------------------

TRUE: dict[str, dict[str, str]] = {
    "relay": {"a0.h0": "answer", "a1.h0": "answer"},
    "factors": {"a0.h0": "colour", "a0.h1": "shape"},
    "hop": {"a1.h0": "answer"},
    "count": {"a0.h0": "answer", "m1": "answer"},
}

FALSE: dict[str, tuple[dict[str, str], str]] = {
    "relay": ({"a1.h0": "answer", "a0.h0": "bait"}, "a0.h0"),
    "factors": ({"a0.h0": "colour", "a0.h1": "colour"}, "a0.h1"),
    "hop": ({"a1.h0": "cue"}, "a1.h0"),
    "count": ({"a0.h0": "answer", "m1": "bait"}, "m1"),
}


@pytest.mark.parametrize("program", TRUE)
def test_a_true_hypothesis_recovers_all(program: str) -> None:
    made, task, labels = planted(program)
    found = scrub(
        made.model, task, cv.Interpretation(made.wired, TRUE[program], labels), draws=3, progress=False
    )
    assert [found.share.value, found.share.low, found.share.high] == pytest.approx([1, 1, 1], abs=1e-5)
    assert found.culprit is None


@pytest.mark.parametrize("program", FALSE)
def test_a_false_claim_is_caught_and_named(program: str) -> None:
    made, task, labels = planted(program)
    claims, wrong = FALSE[program]
    found = scrub(made.model, task, cv.Interpretation(made.wired, claims, labels), draws=3, progress=False)
    assert found.share.high is not None
    assert found.share.high < 0.8
    assert found.culprit is not None
    assert found.claims[found.culprit].pattern == wrong
    others_lost = [found.lost(number).value for number in range(len(claims)) if number != found.culprit]
    assert others_lost == pytest.approx([0.0] * len(others_lost), abs=1e-5)
    assert f"The claim that loses most: {wrong} carries {claims[wrong]}" in str(found)


def test_a_circuit_without_an_edge_that_matters_is_caught_without_any_claim() -> None:
    made, task, _ = planted("factors")
    one = cv.Circuit.from_edges(made.model.graph, [edge for edge in made.wired if "h1" not in edge])
    found = scrub(made.model, task, cv.Interpretation(one), draws=3, progress=False)
    assert found.lost().low is not None
    assert found.lost().low > 0
    assert np.array_equal(found.scrubbed, found.outside)


def test_a_claim_about_one_edge_is_about_no_other() -> None:
    """What a head looks for, its keys, may not come from an image with another cue, while its values may."""
    made, task, _ = planted("relay")
    lost = {}
    for port in "qkv":
        claims = {f"input -> a0.h0<{port}>": "nothing"}
        circuit = [*made.wired, "input->a0.h0<q>"]
        found = scrub(made.model, task, cv.Interpretation(circuit, claims), draws=3, progress=False)
        lost[port] = found.lost(0).value
    assert lost["q"] == pytest.approx(0, abs=1e-5)  # every token looks for the same
    assert min(lost["k"], lost["v"]) > 0.5


# -- what is measured --------------------------------------------------------------------------------


NAMES = [f"folder/{number}.png" for number in range(6)]

PAIRS = {"pair": [0, 0, 1, 1, 2, 2]}


def varied(n: int = 6, **options: Any) -> cv.Task:
    """A task in which each image has its own classes: which it speaks for and against more than others do."""
    logits = cv.wrap(micro())(images(n))
    order = (logits - logits.mean(dim=0)).argsort(dim=1, descending=True).tolist()
    sides = [cv.PerPair(tuple(row[place] for row in order)) for place in (0, -1)]
    return cv.Task(images(n), metric=cv.logit_diff(*sides), **{"ablation": "resample", **options})


def test_the_floor_is_the_metric_of_all_other_images_logits_and_the_original_that_of_its_own() -> None:
    model, task = cv.wrap(micro()), varied()
    found = scrub(
        model, task, cv.Interpretation("*", {"logits": "nothing"}), draws=2, copies=1, progress=False
    )
    logits, metric = model(images(6)), task.prepare(model).metric
    pairs = np.array(
        [[metric(logits[[z]], logits[[x]], torch.tensor([x])).item() for z in range(6)] for x in range(6)]
    )
    assert np.allclose(found.original, np.diag(pairs))
    assert np.allclose(found.floor, (pairs.sum(axis=1) - np.diag(pairs)) / 5)


def test_what_is_scrubbed_is_the_metric_of_the_tree_for_the_draw() -> None:
    model, task = cv.wrap(micro()), varied()
    hypothesis = cv.Interpretation(drawn_circuit(model.graph, 0.5, 2), {"a*": "pair"}, PAIRS)
    found = scrub(model, task, hypothesis, draws=2, seed=3, progress=False)
    prepared, claimed = task.prepare(model), hypothesis.about(model.graph, NAMES)
    tree = written_out(model.graph, claimed.circuit.kept, 4)
    runs = TreeRuns.of(prepared, tree, 6, 2**30)
    for place, plan in (("scrubbed", Plan(frozenset({0}), True)), ("outside", Plan(frozenset(), True))):
        logits = runs.logits(tree, Drawn(claimed, plan, (3, 1), 6), 6)
        expected = prepared.metric(logits, model(images(6)), torch.arange(6)).numpy()
        assert np.allclose(getattr(found, place)[1], expected)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 9))
def test_an_image_is_drawn_from_the_others_of_its_class(members: list[int], seed: int) -> None:
    given_ = np.array(members)
    rng = np.random.default_rng(seed)
    for _ in range(3):
        found = others(given_, rng)
        assert (given_[found] == given_).all()
        alone = np.bincount(given_)[given_] == 1
        assert np.array_equal(found == np.arange(len(given_)), alone)


def test_all_others_of_a_class_are_equally_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = np.array([others(np.array([1, 0, 1, 1, 0, 1]), rng)[0] for _ in range(600)])
    assert np.allclose([np.mean(drawn == image) for image in (2, 3, 5)], 1 / 3, atol=0.06)


def test_it_is_the_same_for_a_seed_whatever_the_batch_size_and_another_for_another() -> None:
    model, task = cv.wrap(micro()), varied()
    hypothesis = cv.Interpretation(drawn_circuit(model.graph, 0.5, 2), {"input": "nothing"})
    one, two, other = (
        scrub(model, task, hypothesis, draws=2, seed=seed, batch_size=size, progress=False)
        for seed, size in ((0, None), (0, 4), (1, None))
    )
    assert np.allclose(one.scrubbed, two.scrubbed)
    assert not np.allclose(one.scrubbed, other.scrubbed)


def test_images_are_drawn_from_the_corrupt_ones_too() -> None:
    """With every clean image in one class and its counterfactual in another, the model's task is kept."""
    relay = cv.compiled("relay")
    clean, corrupt = relay.pairs(12)
    task = cv.Task(clean, corrupt, cv.logit_diff("yes", "no"))
    labels = {"side": ["clean"] * 12 + ["corrupt"] * 12}
    for carries, share in (("side", 1.0), ("nothing", 0.0)):
        hypothesis = cv.Interpretation(relay.wired, {"a1.h0": carries}, labels)
        found = scrub(relay.model, task, hypothesis, draws=8, progress=False)
        assert found.share.value == pytest.approx(share, abs=1e-5 if share else 0.15)


def test_an_edited_model_is_a_model_like_any_other() -> None:
    made, task, labels = planted("relay")
    edited = made.model.edit({"m0": 0})
    found = scrub(edited, task, cv.Interpretation(made.wired, TRUE["relay"], labels), draws=2, progress=False)
    assert found.share.value == pytest.approx(1, abs=1e-5)  # nobody reads m0


# -- claims as data ------------------------------------------------------------------------------


def test_labels_are_names_lists_tensors_or_functions_and_joined_by_an_ampersand() -> None:
    graph = cv.compiled("factors").model.graph
    colour, shape = [0, 0, 1, 1, 0, 0], ["o", "x", "o", "o", "x", "o"]

    def members(carried: Any) -> tuple[int, ...]:
        about = cv.Interpretation("a0.h0 -> logits", {"a0.h0": carried}, {"colour": colour, "shape": shape})
        full = cv.Interpretation(cv.Circuit.full(graph), about.claims, about.labels)
        return full.about(graph, NAMES).claims[0].members

    assert members("colour") == members(colour) == members(torch.tensor(colour)) == (0, 0, 1, 1, 0, 0)
    assert members(lambda image: colour[image]) == members(np.array(colour))
    assert members("colour & shape") == (0, 1, 2, 2, 1, 0)
    assert members("nothing") == (0,) * 6
    assert members("everything") == ()


def test_a_table_that_says_which_image_a_row_is_about_has_to_be_right() -> None:
    graph = cv.compiled("relay").model.graph
    rows = [f"{number}.png" for number in range(6)]
    cv.Interpretation("*", {}, {"image": rows}).about(graph, NAMES[:3], NAMES[3:])
    with pytest.raises(
        CircuitViTError, match=r"row 0 of the labels is about image '5.png', and image 0 is 'fo"
    ):
        cv.Interpretation("*", {}, {"image": rows[::-1]}).about(graph, NAMES)


def test_the_last_claim_about_an_edge_counts() -> None:
    graph = cv.compiled("relay").model.graph
    hypothesis = cv.Interpretation("*", {"*": "nothing", "a*": "everything", "a0.h0 -> logits": "nothing"})
    found = hypothesis.about(graph, NAMES)
    assert [claim.edges for claim in found.claims] == [
        int((found.deciding == number).sum()) for number in range(3)
    ]
    assert found.deciding[graph.edge_index("a0.h0->logits")] == 2
    assert found.deciding[graph.edge_index("a0.h1->logits")] == 1
    assert found.deciding[graph.edge_index("m0->logits")] == 0


LABELS = {"pair": [0, 0, 1, 1, 2, 2], "own": [*range(6)]}


@pytest.mark.parametrize(
    ("hypothesis", "options", "said"),
    [
        ("a circuit", {}, "str is no hypothesis to scrub: give an Interpretation"),
        (cv.Interpretation([]), {}, "a claim needs edges"),
        (cv.Interpretation("a0.h0 -> logits"), {}, "no edge of the circuit is on a path"),
        (cv.Interpretation("*", {"a7.h0": "pair"}, LABELS), {}, "'a7.h0'"),
        (cv.Interpretation("input -> logits", {"m0": "pair"}, LABELS), {}, "'m0' names no edge of the"),
        (cv.Interpretation("*", {"m0": "pear"}, LABELS), {}, "unknown labels 'pear': did you mean 'pair'"),
        (cv.Interpretation("*", {"m0": [1, 2]}), {}, "labels of 'm0' are 2, and there are 6 images"),
        (cv.Interpretation("*", {"m0": "own"}, LABELS), {}, "no two of 6 images have the same label"),
        (cv.Interpretation("*", {"m0": [0, 0, None, 1, 1, 1]}), {}, "label of image 2 in 'm0' is None"),
        (cv.Interpretation("*", {"m0": [1, "1", 1, 1, "1", 1]}), {}, "two labels in 'its labels'"),
        (cv.Interpretation("*", {"m0": 3}), {}, "the labels of 'm0' are 3: give one for each image"),
        (cv.Interpretation("*", {"m0": "pair", "*": "nothing"}, LABELS), {}, "'m0' decides no edge"),
        (cv.Interpretation("*"), {"draws": 0}, "the number of draws (draws) must be at least 1"),
        (cv.Interpretation("*"), {"copies": 0}, "copies"),
        (cv.Interpretation("*"), {"clusters": ["a"]}, "1 clusters for 6 pairs"),
        (cv.Interpretation("*"), {"clusters": 6}, "one for each pair, not 6"),
        (cv.Interpretation("*"), {"clusters": ["a"] * 5 + ["b"], "n_bootstrap": 3}, "at least 100 resamples"),
        (cv.Interpretation("*"), {"memory": 10_000}, "would take"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(hypothesis: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(CircuitViTError, match=re.escape(said)):
        scrub(cv.wrap(micro()), varied(), hypothesis, progress=False, **options)


def test_labels_that_are_none_are_refused_when_they_are_given() -> None:
    for claims, labels, said in (
        (["m0"], {}, "by patterns of edges"),
        ({}, 3, "labels are given by name"),
        ({}, {"nothing": [1]}, "cannot be called 'nothing'"),
    ):
        with pytest.raises(CircuitViTError, match=said):
            cv.Interpretation("*", claims, labels)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (cv.Task(images(6), images(6, 1), METRIC, direction="denoising"), "direction='noising'"),
        (varied(groups=cv.TokenGroups(("a", "b"), torch.arange(30).view(6, 5) % 2)), "from image to image"),
        (cv.Task(images(1), metric=cv.logit(0), ablation="zero"), "no other image to stand in"),
        (
            cv.Task(images(6), metric=cv.logit(0), ablation="resample"),
            "the metric has to differ between them",
        ),
    ],
)
def test_tasks_in_which_images_cannot_be_exchanged_are_refused(task: cv.Task, said: str) -> None:
    with pytest.raises(CircuitViTError, match=said):
        scrub(cv.wrap(micro()), task, cv.Interpretation("*"), progress=False)


def test_errors_that_are_kept_in_every_run_are_refused() -> None:
    eye = torch.eye(24, dtype=torch.float64)
    own = cv.Dictionary(eye, torch.zeros(24).double(), eye, torch.zeros(24).double(), "relu")
    model = cv.refine_nodes(cv.wrap(micro()), {"m0": cv.features(own, [0], error="kept")})
    with pytest.raises(CircuitViTError, match=r"m0\.error are kept in every run"):
        cv.scrub(model, cv.Task(images(6), images(6, 1), METRIC), cv.Interpretation("*"), progress=False)


def test_edits_with_a_value_for_each_image_are_refused() -> None:
    model = cv.wrap(micro()).edit({"m0": cv.add(torch.ones(6, 5, 24))})
    with pytest.raises(CircuitViTError, match="have a value for each image"):
        scrub(model, varied(), cv.Interpretation("*"), progress=False)


# -- the result ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def false() -> Scrubbing:
    made, task, labels = planted("relay")
    labels["rare"] = [*labels["answer"][:-1], "only one"]
    claims = {"a0.h0": "bait", "a1.h0": "rare"}
    return scrub(made.model, task, cv.Interpretation(made.wired, claims, labels), draws=2, progress=False)


def test_losses_by_class_add_up_to_that_of_the_claim(false: Scrubbing) -> None:
    for number in range(2):
        by_class = false.lost_by_class(number)
        total = sum(value * count for value, count in by_class.values())
        assert total / len(false.names) == pytest.approx(false.lost(number).value)
    for asked in (false.lost, false.lost_by_class):
        with pytest.raises(CircuitViTError, match="there is no claim 2"):
            asked(2)


def test_a_label_that_one_image_has_is_said_to_be_untested(false: Scrubbing) -> None:
    assert false.caveats == (
        "a1.h0 carries rare: 1 label (only one) on a single image, which has no other to stand in for it and "
        "stays.",
    )
    assert false.caveats[0] in str(false)


def test_the_table_has_a_row_for_everything_each_claim_and_each_label(false: Scrubbing) -> None:
    rows = list(false.records())
    assert [(row["part"], row["carries"], row["class"]) for row in rows] == [
        ("all together", None, None),
        ("outside of the circuit", None, None),
        ("a0.h0", "bait", None), ("a0.h0", "bait", "False"), ("a0.h0", "bait", "True"),
        ("a1.h0", "rare", None), ("a1.h0", "rare", "False"), ("a1.h0", "rare", "True"),
        ("a1.h0", "rare", "only one"),
    ]  # fmt: skip
    assert rows[0]["lost"] == pytest.approx(1 - false.share.value)
    assert rows[2]["metric"] == pytest.approx(false.alone[0].mean())
    assert [row["n"] for row in rows[:3]] == [32, 32, 32]


def test_it_comes_back_from_a_file_and_draws_itself(false: Scrubbing, tmp_path: Path) -> None:
    file = false.save(tmp_path / "found.json")
    again = Scrubbing.load(file)
    assert str(again) == str(false)
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "floor": said["original"]}))
    with pytest.raises(FileError, match="not distinguishable from 0"):
        Scrubbing.load(file)
    assert again.figure().save(tmp_path / "found.svg").read_text().count("bait") >= 1
