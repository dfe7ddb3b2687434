"""The report as JSON and Markdown: nothing is lost, nothing malformed is read, no table is broken."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from circuitvit.errors import FileError, OptionError
from circuitvit.graph.records import from_json, to_json
from circuitvit.verification import Estimate, Report, verify
from tests.verification.cases import some_circuit, tiny_model, tiny_task


@cache
def report() -> Report:
    held_out = tiny_task(7, seed=50)
    return verify(tiny_model(), tiny_task(), some_circuit(), held_out=held_out, n_random=4, progress=False)


@cache
def single() -> Report:
    return verify(tiny_model(), tiny_task(1), some_circuit(), n_random=0, progress=False)


@pytest.mark.parametrize("which", [report, single])
def test_json_keeps_everything(which: Any, tmp_path: Path) -> None:
    path = which().save(tmp_path / "report.json")
    assert Report.load(path) == which()
    content = json.loads(path.read_text())
    assert next(iter(content)) == "schema"
    assert content["schema"] == "circuitvit.report/2"


def test_numbers_written_as_integers_and_fields_of_later_versions_are_read(tmp_path: Path) -> None:
    content = report().to_dict()
    content["task"]["faithfulness"]["value"] = 1
    content["task"]["minimality"] = {"value": 0.1}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    value = Report.load(path).task.faithfulness.value
    assert value == 1.0
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.update(schema="circuitvit.report/1"), "reads 'circuitvit.report/2'"),
        (lambda content: content.pop("schema"), "names no schema"),
        (lambda content: content.pop("task"), "'task' is a required property"),
        (lambda content: content["task"].update(n_pairs="six"), "task/n_pairs"),
        (lambda content: content["task"]["pairs"][0].update(kl="no"), "task/pairs/0/kl"),
        (lambda content: content.update(warnings="none"), "warnings"),
    ],
)
def test_malformed_files_are_refused_by_name(change: Any, message: str, tmp_path: Path) -> None:
    content = report().to_dict()
    change(content)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"report\.json") as refused:
        Report.load(path)
    assert message in str(refused.value)


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.json, \.md or \.csv"):
        report().save(tmp_path / "report.pdf")
    for name in ("report.md", "report.json", "report.csv"):
        with pytest.raises(FileError, match="cannot write"):
            report().save(tmp_path / "missing" / name)
    with pytest.raises(FileError, match="cannot read"):
        Report.load(tmp_path / "report.json")


def test_markdown_says_it_in_sentences_first(tmp_path: Path) -> None:
    text = report().save(tmp_path / "report.md").read_text(encoding="utf-8")
    headline = report().headline
    assert text.startswith("# Circuit of tiny\n\n**")
    parts = ["Alone they keep", "## What was done", "| faithfulness", "## Caveats", "## How to repeat it"]
    assert sorted(parts, key=text.index) == parts
    assert f"keep {headline.faithfulness} of it on 7 pairs that were not used to find them" in text
    assert f"| necessity: share that is lost without it | {headline.necessity} |" in text
    assert "4 random circuits of their shape keep" in text
    assert "| with 95% intervals | 7 held-out pairs | 6 pairs of the task |" in text
    assert all(warning in text for warning in report().warnings)
    assert report().provenance.weights in text


@pytest.mark.parametrize(
    ("kept", "lost", "verdict"),
    [
        (0.9, 0.9, "are enough for the behaviour, and it is lost without them."),
        (0.9, 0.1, "are enough for the behaviour, and the model does not need them."),
        (0.6, 0.9, "carry a part of the behaviour, but it is lost without them."),
        (0.1, 0.2, "are not enough for the behaviour, and the model does not need them."),
        (1.4, 0.9, "overshoot the behaviour, but it is lost without them."),
    ],
)
def test_the_verdict_comes_first(kept: float, lost: float, verdict: str) -> None:
    section = replace(report().headline, faithfulness=Estimate(kept), necessity=Estimate(lost))
    assert verdict in replace(report(), held_out=section).to_markdown().splitlines()[2]


def test_markdown_of_a_single_pair_promises_no_interval() -> None:
    text = single().to_markdown()
    assert "of it on 1 pair of the task." in text
    assert "A single pair: no intervals" in text
    assert "intervals |" not in text
    assert "random connected" not in text


def test_a_picture_is_shown_where_it_is_of_this_circuit(tmp_path: Path) -> None:
    circuit = some_circuit()
    circuit.draw(tmp_path / "circuit.svg")
    assert "circuit.svg" not in report().save(tmp_path / "report.md").read_text()  # whose is it?
    circuit.save(tmp_path / "circuit.json")
    assert "](circuit.svg)" in report().save(tmp_path / "report.md").read_text()
    some_circuit(share=1.1).save(tmp_path / "circuit.json")
    assert "circuit.svg" not in report().save(tmp_path / "report.md").read_text()


def test_what_nobody_knows_is_left_open_in_the_python() -> None:
    text = report().to_markdown()
    assert "model = ... # tiny" in text
    assert f"held_out = ... # {report().headline.task}" in text
    assert "circuit = cv.Circuit.load('circuit.json')" in text
    assert "report = cv.verify(model, task, circuit, held_out=held_out, n_random=4" in text
    hostile = replace(report().recipe, command="circuitvit ```\n# no heading")
    assert "circuitvit ` ` ` # no heading" in replace(report(), recipe=hostile).to_markdown()


def test_class_and_file_names_cannot_break_the_tables() -> None:
    pair = replace(report().task.pairs[0], clean="a|b\n<img>`x`.png")
    text = replace(report(), task=replace(report().task, pairs=(pair,)), held_out=None).to_markdown()
    rows = [line for line in text.splitlines() if "img" in line]
    assert len(rows) == 1
    assert r"a\|b \<img>\`x\`.png" in rows[0]
    tables = [line.replace(r"\|", "") for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 8}


def test_markdown_is_a_page_and_the_pairs_are_in_the_csv(tmp_path: Path) -> None:
    section = report().headline
    failures = section.failures * (40 // len(section.failures) + 1)
    many = replace(section, pairs=section.pairs * 20, failures=failures)
    long = replace(report(), held_out=many)
    text = long.to_markdown()
    assert f"It fails on {len(failures)} of 7 pairs" in text
    assert 1 <= text.count("\n| image ") <= 6
    assert len(text.splitlines()) <= 66  # of a printed page
    assert len(text.split()) <= 800  # many caveats among them: that of the demo has 600
    rows = list(csv.DictReader(long.save(tmp_path / "pairs.csv").read_text().splitlines()))
    assert [row["images"] for row in rows] == ["held-out"] * 140 + ["task"] * 6
    for row, pair in zip(rows, (*many.pairs, *report().task.pairs), strict=True):
        assert row["clean"] == pair.clean
        assert row["top_circuit"] == pair.top_circuit
        assert [float(row[name]) for name in ("whole", "nothing", "circuit", "complement", "kl")] == [
            pair.whole, pair.nothing, pair.circuit, pair.complement, pair.kl,
        ]  # fmt: skip
    off = (section.pairs[0].circuit - section.pairs[0].whole) / (section.whole.value - section.nothing.value)
    assert float(rows[0]["off"]) == pytest.approx(off)


def test_the_short_form_gives_the_headline() -> None:
    assert str(report().headline.faithfulness) in repr(report())
    assert "7 held-out pairs" in str(report())
    assert "1 pair:" in str(single())


def test_records_of_every_kind() -> None:
    assert from_json(tuple[Estimate, ...], to_json((Estimate(1.0), Estimate(2.0, 0.0, 3.0)))) == (
        Estimate(1.0),
        Estimate(2.0, 0.0, 3.0),
    )


class TestFailures:
    """The pairs that a circuit fails on, told from the pairs one by one."""

    def test_they_are_those_that_are_far_off_or_see_another_class(self) -> None:
        section = report().headline
        behaviour = section.whole.value - section.nothing.value
        expected = {
            pair.clean: (pair.circuit - pair.whole) / behaviour
            for pair in section.pairs
            if abs(pair.circuit - pair.whole) > 0.5 * behaviour or pair.top_circuit != pair.top_whole
        }
        assert expected
        assert {each.clean: each.off for each in report().failures} == pytest.approx(expected)
        sizes = [abs(each.off) for each in report().failures]
        assert sizes == sorted(sizes, reverse=True)

    def test_the_whole_model_fails_on_none(self) -> None:
        whole = verify(tiny_model(), tiny_task(), some_circuit(share=1.1), n_random=0, progress=False)
        assert whole.failures == ()
        assert "It fails on no pair. The pair that it keeps best" in whole.to_markdown()

    def test_they_are_listed_for_people_and_programs(self) -> None:
        (worst, *_) = report().failures
        (pair,) = (each for each in report().headline.pairs if each.clean == worst.clean)
        figures = f"{pair.whole:+.2f} | {pair.circuit:+.2f} | {worst.off:+.0%}"
        rows = [line for line in report().to_markdown().splitlines() if line.startswith("| image ")]
        assert rows[0].startswith(f"| {worst.clean} | {worst.corrupt} | {figures} |")
        assert report().to_dict()["held_out"]["failures"][0]["clean"] == worst.clean

    def test_files_without_them_are_still_read(self, tmp_path: Path) -> None:
        content = report().to_dict()
        del content["task"]["failures"]
        (tmp_path / "report.json").write_text(json.dumps(content))
        assert Report.load(tmp_path / "report.json").task.failures == ()
