"""Hypotheses: every rule with a known answer, honest indecision, and the YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.engine import Evaluator
from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.verification import (
    BeatsRandom,
    Expectation,
    Falls,
    Flips,
    Hypothesis,
    Rises,
    Unchanged,
    check_hypotheses,
    connected_circuits,
    read_hypotheses,
)
from tests.verification.cases import images, some_circuit, tiny_model, tiny_task

EDGES = "* -> logits"


def judge(expect: Expectation, n: int = 20, edges: Any = EDGES, **options: Any) -> Any:
    return Hypothesis("claim", edges, expect, **options).test(tiny_model(), tiny_task(n))


def fall(n: int = 20) -> np.ndarray:  # type: ignore[type-arg]
    """What ablating all edges into the logits costs: everything."""
    evaluator = Evaluator(tiny_task(n).prepare(tiny_model()))
    return evaluator.whole - evaluator.nothing


def test_a_fall_is_supported_refuted_or_open() -> None:
    mean = float(fall().mean())
    supported, refuted, open_ = (judge(Falls(by)) for by in (0.3 * mean, 2 * mean, mean))
    assert (supported.verdict, refuted.verdict) == ("supported", "refuted")
    assert open_.verdict == "not enough evidence"
    assert supported.effect.value == pytest.approx(mean)
    assert supported.p_value is not None
    assert supported.p_value < 0.05 < open_.p_value
    assert supported.effect.low < mean < supported.effect.high
    assert judge(Rises(0.3 * mean)).verdict == "refuted"


def test_no_change_must_be_shown() -> None:
    mean = float(fall().mean())
    assert judge(Unchanged(10 * mean)).verdict == "supported"
    assert judge(Unchanged(mean / 10)).verdict == "refuted"
    assert judge(Unchanged(mean)).verdict == "not enough evidence"
    assert judge(Unchanged(1e-6), edges="*", keep=True).verdict == "supported"


def test_a_single_pair_is_a_fact_and_few_pairs_are_nothing() -> None:
    one = judge(Falls(0.0), n=1)
    assert (one.verdict, one.p_value, one.scope) == ("supported", None, "these pairs")
    assert one.effect.low is None
    assert "exact statement about this pair" in one.reason
    assert judge(Falls(1e6), n=1).verdict == "refuted"
    few = judge(Falls(0.0), n=3)
    assert (few.verdict, few.p_value) == ("not enough evidence", None)
    assert "3 pairs say nothing about all such pairs" in few.reason
    assert judge(Falls(0.0), n=3, scope="these pairs").verdict == "supported"
    general = judge(Falls(0.0), n=1, scope="all such pairs")
    assert general.verdict == "not enough evidence"


def test_clusters_are_what_counts() -> None:
    claim = Hypothesis("", EDGES, Falls(0.0))
    four = ["a", "b", "c", "d"] * 5
    assert claim.test(tiny_model(), tiny_task(20), clusters=four).verdict == "not enough evidence"
    many = [str(row // 2) for row in range(20)]
    assert claim.test(tiny_model(), tiny_task(20), clusters=many).verdict == "supported"
    with pytest.raises(OptionError, match="3 clusters for 20 pairs"):
        claim.test(tiny_model(), tiny_task(20), clusters=["a"] * 3)


def test_flips() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(12)
    task = cv.Task(*pairs, metric=cv.logit_diff("cat", "dog"))
    claims = [
        Hypothesis("", EDGES, Flips("dog", "cat")),
        Hypothesis("", EDGES, Flips(["bear", "rabbit"], "cat")),
        Hypothesis("", EDGES, Flips("dog", "bear")),
        Hypothesis("", "a0.h0 -> logits", Flips("dog", share=1.0), scope="these pairs"),
    ]
    verdicts = check_hypotheses(model, task, claims)
    assert [each.verdict for each in verdicts[:3]] == ["supported", "refuted", "not enough evidence"]
    assert "12 of 12 pairs flip (they become dog)" in verdicts[0].reason
    assert "the whole model sees cat" in verdicts[2].reason
    assert verdicts[3].verdict == "refuted"
    clustered = claims[0].test(model, task, clusters=[str(row % 6) for row in range(12)])
    assert clustered.verdict == "supported"


def test_random_edges_of_the_same_kind() -> None:
    model, pairs = cv.load("catdog-tiny"), catdog_pairs(4)
    task = cv.Task(*pairs, metric=cv.logit_diff("cat", "dog"))
    strong = Hypothesis("", "input -> m0", BeatsRandom(30)).test(model, task)
    assert strong.details["random"] == 3  # input -> m1, m2, m3: enumerated, so no p-value below 1 / 4
    assert strong.p_value == (strong.details["as_large"] + 1) / 4
    assert "no p-value can reach" in strong.reason
    with pytest.raises(DataError, match="no other edges of the same kind"):
        Hypothesis("", "input -> logits", BeatsRandom()).test(model, task)


def test_a_claim_about_a_circuit_is_compared_with_connected_circuits() -> None:
    circuit = some_circuit()
    found = judge(BeatsRandom(19), edges=circuit)
    evaluator = Evaluator(tiny_task(20).prepare(tiny_model()))
    drawn = evaluator.many([(~each).kept for each in connected_circuits(circuit, 19)]) - evaluator.whole
    own = abs(float((evaluator.values((~circuit).kept) - evaluator.whole).mean()))
    as_large = int((np.abs(drawn.mean(axis=1)) >= own).sum())
    assert found.details["as_large"] == as_large
    assert found.p_value == (as_large + 1) / 20
    assert "19 random connected circuits of its profile" in found.reason


def test_beating_random_edges_is_refuted_when_many_do_as_well() -> None:
    weak = judge(BeatsRandom(40), n=3, edges="a0.h0 -> a1.h0<q>")
    assert weak.verdict in ("refuted", "not enough evidence")
    assert weak.scope == "these pairs, against random edges"
    assert 0 < weak.p_value <= 1


def test_a_hypothesis_brings_its_own_ablation_and_images() -> None:
    other = Hypothesis("", EDGES, Falls(0.0), ablation="zero", clean=images(2, 7), corrupt=images(2, 8))
    verdict = other.test(tiny_model(), tiny_task(20))
    assert verdict.n == 2
    assert "zero ablation" in verdict.intervention


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hypothesis("", EDGES, "falls"), "expect Falls"),  # type: ignore[arg-type]
        (lambda: Hypothesis("", EDGES, Falls(1), scope="everything"), "all such pairs"),
        (lambda: Hypothesis("", EDGES, BeatsRandom(), keep=True), "BeatsRandom"),
        (lambda: Unchanged(0.0), "must be positive"),
        (lambda: Flips("cat", share=0), "above 0"),
        (lambda: BeatsRandom(0), "at least one"),
        (lambda: judge(Falls(1), edges=EDGES, ablation="nothing"), "nothing"),
    ],
)
def test_claims_that_make_no_sense_are_refused(make: Any, message: str) -> None:
    with pytest.raises((OptionError, KeyError), match=message):
        make()


# -- the file ------------------------------------------------------------------------------------

FILE = """
schema: circuitvit.hypotheses/1
model: {name: catdog-tiny}
alpha: 0.01
hypotheses:
  - claim: one
    edges: [m3 -> logits, "*<v> -> logits"]
    expect: {falls_by: 1}
    verdict: supported
  - {claim: two, edges: m0, expect: {flips: {from: cat, to: [dog, 2]}}, ablation: mean, scope: these pairs}
  - {claim: three, edges: m0, keep: true, expect: {changes_less_than: 0.5}}
  - {claim: four, edges: m0, expect: {beats_random: 19}}
  - {claim: five, edges: m0, expect: {rises_by: 2}}
"""


def test_a_file_of_hypotheses_is_read(tmp_path: Path) -> None:
    (tmp_path / "claims.yaml").write_text(FILE)
    file = read_hypotheses(tmp_path / "claims.yaml")
    assert [each.claim for each in file.hypotheses] == ["one", "two", "three", "four", "five"]
    assert file.hypotheses[0].edges == ["m3 -> logits", "*<v> -> logits"]
    expected = [Falls(1.0), Flips(("dog", 2), "cat"), Unchanged(0.5), BeatsRandom(19), Rises(2.0)]
    assert [each.expect for each in file.hypotheses] == expected
    assert file.hypotheses[2].keep
    assert (file.model, file.alpha, file.task, file.expected[0]) == ("catdog-tiny", 0.01, None, "supported")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("edges: m0", "edges: *m0", "not YAML"),
        ("schema: circuitvit.hypotheses/1", "schema: circuitvit.hypotheses/9", "schema"),
        ("falls_by: 1", "falls: 1", "hypotheses/0/expect"),
        ("falls_by: 1}", "falls_by: 1, rises_by: 1}", "hypotheses/0/expect"),
        ("claim: five, edges: m0", "claim: five", "hypotheses/4"),
        ("ablation: mean", "ablation: magic", "hypotheses/1/ablation"),
        ("verdict: supported", "verdict: true", "hypotheses/0/verdict"),
        ("{name: catdog-tiny}", "!!python/object/apply:os.system [echo]", "not YAML"),
        ("{claim: five, edges: m0", "&x {claim: [*x], edges: m0", "refers to itself"),
        (FILE, "just text", "does not begin with"),
    ],
)
def test_malformed_files_are_refused_by_place(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yaml"
    path.write_text(FILE.replace(old, new))
    with pytest.raises(FileError, match=message):
        read_hypotheses(path)
    with pytest.raises(FileError, match="cannot read"):
        read_hypotheses(tmp_path / "missing.yaml")


def test_the_cat_dog_claims_of_the_documentation_hold(shared_data: Path) -> None:
    file = read_hypotheses(Path(__file__).parents[2] / "docs" / "cat_dog_hypotheses.yaml")
    model = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights/vit_tiny_patch16_224.safetensors"
    )
    folder = shared_data / "images" / "catdog"
    assert file.task is not None
    task = file.task.with_options(
        clean=folder / "prisma_crop_dog.jpeg", corrupt=folder / "prisma_crop_cat.png"
    )
    verdicts = check_hypotheses(model, task, file.hypotheses)
    assert [each.verdict for each in verdicts] == list(file.expected)
    assert len(verdicts) >= 6
    assert [each.verdict for each in verdicts].count("refuted") == 2
