"""What a report says of how it is made again really makes it again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvit as cv
from circuitvit.cli.discover import Search, checked_search
from circuitvit.cli.inputs import ModelOptions, load_model
from circuitvit.cli.repeat import _model, _without
from circuitvit.errors import OptionError
from circuitvit.models.timm_import import import_timm
from tests.cli.cases import Run


def section(page: str, language: str) -> str:
    """The lines of the page's block of code in a language."""
    return page.split(f"```{language}\n")[1].split("```")[0].strip()


@pytest.mark.parametrize(
    "search",
    [
        ["--method", "eap-ig", "--steps", 2, "--edges", 60],
        ["--method", "find", "--within", "1s", "--start=thin", "--faithfulness", 0.8],
    ],
)
def test_command_and_python_give_the_same_circuit(
    run: Run, behaviour: list[object], tmp_path: Path, search: list[object]
) -> None:
    found = tmp_path / "found"
    options = [*behaviour, *search, "--random", 0, "--held-out", 0.34, "--out", found]
    assert run("discover", *options).exit_code == 0
    page, circuit = (found / "report.md").read_text(), cv.Circuit.load(found / "circuit.json")
    assert "](circuit.svg)" in page

    program, *command = shlex.split(section(page, "console"))
    assert program == "circuitvit"
    (found / "circuit.json").unlink()
    again = run(*command)
    assert again.exit_code == 0, again.output
    assert cv.Circuit.load(found / "circuit.json") == circuit

    names: dict[str, Any] = {}
    exec(section(page, "python"), names)
    assert names["circuit"] == circuit
    first = cv.Report.load(found / "report.json")
    assert names["report"].recipe.edges == first.recipe.edges
    assert names["report"].headline.faithfulness.value == pytest.approx(first.headline.faithfulness.value)


def test_a_fine_tuned_checkpoint_is_loaded_again_with_its_classes(tmp_path: Path) -> None:
    weights, names = tmp_path / "pets.pth", tmp_path / "my names.txt"
    torch.save(import_timm().create_model("test_vit", num_classes=2).state_dict(), weights)
    names.write_text("my cat\nmy dog\n")
    options = ModelOptions(model="test_vit", checkpoint=weights, arch=["num_classes=2"], classes=names)
    again = eval(_model(options), {"cv": cv})
    assert again.classes == load_model(options).classes == ("my cat", "my dog")


def test_verify_names_the_file_that_it_read(
    run: Run, behaviour: list[object], discovered: tuple[Path, Any], tmp_path: Path
) -> None:
    circuit = discovered[0] / "circuit.json"
    assert run("verify", circuit, *behaviour, "--random", 1, "--out", tmp_path).exit_code == 0
    page = (tmp_path / "report.md").read_text()
    assert section(page, "console").startswith(f"circuitvit verify {circuit} --model catdog-tiny")
    assert f"circuit = cv.Circuit.load({str(circuit)!r})" in page


def test_folders_are_paired_aloud(run: Run, pairs: Path, tmp_path: Path) -> None:
    dogs = tmp_path / "dogs"
    dogs.mkdir()
    for number in range(4):
        (dogs / f"dog{number}.png").write_bytes((pairs / "corrupt" / f"{number}.png").read_bytes())
    options = ["--model", "catdog-tiny", "--target", "cat", "--foil", "dog", "--method", "eap", "--edges", 60]
    images = ["--clean", pairs / "clean", "--corrupt", dogs, "--pair", "nearest"]
    result = run(
        "discover", *options, *images, "--random", 0, "--calibrate", 0, "--out", tmp_path / "out", "-q"
    )
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("note: 6 images of clean and 4 of dogs, paired with the most alike (")
    assert "2 of clean left over" in " ".join(result.stdout.split())
    report = cv.Report.load(tmp_path / "out" / "report.json")
    assert str(report.provenance.parameters["pairing"]) in result.stderr
    assert [pair.corrupt for pair in report.task.pairs] == [f"dog{pair.clean}" for pair in report.task.pairs]


def test_arguments_that_a_plan_stands_for_are_left_out() -> None:
    asked = [
        "discover",
        "--within",
        "5s",
        "--start=whole",
        "--resume",
        "--keep",
        "prediction",
        "--plan=1,2,3",
    ]
    assert _without(asked) == ["discover", "--keep", "prediction"]


def test_a_plan_is_for_what_is_kept() -> None:
    given = {"plan": "1,2,3", "keep": "prediction", "agreement": 0.8}
    search = checked_search(Search("find", given), "noising", seed=4)
    assert search.keywords["plan"] == cv.Plan(1, 2, 3, seed=4, keep="prediction")
    for keep, other in (("prediction", "faithfulness"), ("behaviour", "agreement")):
        with pytest.raises(OptionError, match=f"leave out --{other}"):
            checked_search(Search("find", {"keep": keep, other: 0.8}), "noising", seed=0)
