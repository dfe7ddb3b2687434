"""`circuitvit classes`, and groups where a command takes a class."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.cases import Run


def test_a_group_is_listed_with_what_lies_around_it(run: Run) -> None:
    result = run("classes", "carnivores", "--model", "catdog-tiny")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert "group:carnivores is 3 of the 4 classes of catdog-tiny" in result.stdout
    assert [line for line in lines if line[:1] in (["0"], ["1"], ["3"])] == [
        ["0", "cat"],
        ["1", "dog"],
        ["3", "bear"],
    ]
    assert ["4", "animal,", "animate", "being", "n00015388"] in lines
    assert "- dog: dog, domestic dog, Canis familiaris" in result.stdout


def test_without_a_word_all_classes_are(run: Run) -> None:
    lines = [line.split() for line in run("classes", "--model", "catdog-tiny").stdout.splitlines()]
    assert lines[-4:] == [["0", "cat"], ["1", "dog"], ["2", "rabbit"], ["3", "bear"]]


def test_a_name_that_is_a_group_is_answered_in_options(run: Run, behaviour: list[object]) -> None:
    result = run("attribute", *behaviour, "--target", "carnivore", "--method", "eap")
    assert result.exit_code == 2
    assert "it is a group of 3 (cat, dog, bear): write 'group:carnivore' for all" in " ".join(
        result.output.split()
    )


def test_groups_are_taken_and_said(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    named = [
        "group:feline" if each == "cat" else "group:dogs" if each == "dog" else each for each in behaviour
    ]
    foil = ["--foil", "rabbit"]
    assert run("attribute", *named, *foil, "--method", "eap", "--out", tmp_path).exit_code == 0
    task = json.loads((tmp_path / "scores.json").read_text())["provenance"]["task"]
    assert "logit_diff(cat, dog and 1 more)" in task
