"""Bad input is refused before any long work: exit code 2, one message, no traceback, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import circuitvit as cv
from circuitvit.graph import ONE_GROUP, Circuit, Graph
from circuitvit.graph.eap_ig import transformer_graph
from tests.cli.cases import Run

SCORING: tuple[object, ...] = ("--method", "eap", "--edges", "60")


def assert_refused(result: Any, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.stderr.split())
    assert result.stderr.startswith("error: ")
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--method": "epa"}, "unknown method 'epa': did you mean 'eap'?"),
        ({"--model": "catdog-tyny"}, "unknown model 'catdog-tyny': did you mean 'catdog-tiny' or"),
        ({"--model": "vit_tiny_patch16_225"}, "did you mean 'vit_tiny_patch16_224'"),
        ({"--model": "vit_tiny_patch16_224"}, "no weights yet"),
        ({"--model": "missing.json"}, "cannot read the card missing.json"),
        ({"--checkpoint": "missing.safetensors"}, "comes with its own weights"),
        ({"--target": "catt"}, "unknown class 'catt': did you mean 'cat'?"),
        ({"--target": "7"}, "there is no class 7"),
        ({"--target": "Dog"}, "--target and --foil are both 'dog'"),
        ({"--target": "1"}, "target and foil are the same class (dog)"),
        ({"--metric": "logit_dif"}, "unknown metric 'logit_dif': did you mean 'logit_diff'"),
        ({"--metric": "logit"}, "the metric logit has no foil: leave out --foil"),
        ({"--ablation": "pach"}, "unknown ablation 'pach': did you mean 'patch'?"),
        ({"--direction": "noisy"}, "unknown direction 'noisy': did you mean 'noising'?"),
        ({"--groups": "animals"}, "groups is 'kind'"),
        ({"--dtype": "float31"}, "unknown dtype 'float31': did you mean 'float32'"),
        ({"--device": "warp"}, "the device 'warp' cannot be used"),
        ({"--arch": "num_classes"}, "--arch takes KEY=VALUE"),
        ({"--arch": "num_classes=3"}, "comes with its own weights and architecture: leave out num_classes"),
        ({"--classes": "missing.txt"}, "Give a file, one name a line"),
        ({"--memory": "2 elephants"}, "--memory takes a size such as"),
        ({"--clean": "missing.png"}, "no image missing.png: there is no such file"),
        ({"--pairs": "pairs.csv"}, "give either --pairs or --clean and --corrupt, not both"),
        ({"--clean": None}, "no images: give --clean and --corrupt, or --pairs with a table"),
        ({"--corrupt": None}, "no counterfactuals: give --corrupt"),
        ({"--held-out-corrupt": "missing"}, "no images: give --held-out-clean"),
        ({"--held-out-clean": "missing.png"}, "no counterfactuals: give --held-out-corrupt"),
        ({"--held-out": "0.5", "--held-out-clean": "x"}, "leave out the other --held-out options"),
        ({"--held-out": "1"}, "--held-out is a share of the pairs, between 0 and 1, not 1"),
        ({"--edges": None}, "say how many to take with --edges K"),
        ({"--edges": "100000"}, "--edges 100000: the model has"),
        ({"--threshold": "0.1"}, "say how many to take with --edges K"),
        ({"--edges": None, "--threshold": "-1"}, "--threshold must be a positive number"),
        ({"--by": "size"}, "unknown ranking 'size'"),
        ({"--steps": "4"}, "--method eap does not use --steps"),
        ({"--tau": "0.1"}, "--method eap does not use --tau: it belongs to --method acdc"),
        ({"--method": "find"}, "--method find does not use --edges"),
        ({"--method": "find", "--edges": None, "--within": "soon"}, "a duration is"),
        ({"--method": "find", "--edges": None, "--faithfulness": "2"}, "--faithfulness must lie between"),
        ({"--method": "find", "--edges": None, "--plan": "3"}, "--plan takes steps,trim_runs,batch_size"),
        ({"--method": "acdc", "--edges": None, "--tau": "0"}, "--tau must be a positive number"),
        ({"--method": "acdc", "--edges": None, "--divergence": "lk"}, "unknown divergence 'lk'"),
        ({"--method": "acdc", "--edges": None, "--direction": "denoising"}, "leave out --direction"),
    ],
)  # fmt: skip
def test_discover(
    run: Run, pairs: Path, tmp_path: Path, changes: dict[str, str | None], message: str
) -> None:
    options: dict[str, object] = {
        "--model": "catdog-tiny", "--clean": pairs / "clean", "--corrupt": pairs / "corrupt",
        "--target": "cat", "--foil": "dog", "--method": "eap", "--edges": "60",
        "--out": tmp_path / "new" / "out",
    }  # fmt: skip
    options.update(changes)
    given = [part for name, value in options.items() if value is not None for part in (name, value)]
    assert_refused(run("discover", *given), message)
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_is_a_file(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in (tmp_path / "taken", tmp_path / "taken" / "deeper"):
        result = run("discover", *behaviour, *SCORING, "--out", out)
        assert_refused(result, f"cannot write to the folder {out}")
    assert (tmp_path / "taken").read_text() == "mine"


def test_images_that_cannot_be_used(run: Run, pairs: Path, tmp_path: Path) -> None:
    good, empty, cut = pairs / "clean" / "0.png", tmp_path / "empty", tmp_path / "cut.png"
    empty.mkdir()
    cut.write_bytes(good.read_bytes()[:300])
    Image.new("RGB", (48, 48)).save(tmp_path / "blank.png")
    cases: list[tuple[Path, Path, str]] = [
        (empty, pairs / "corrupt", f"the folder {empty} has no images"),
        (cut, good, f"cannot read the image {cut}"),
        (pairs / "clean", good, "0.png are the same file"),
        (good, good, "same within rounding"),
    ]
    for clean, corrupt, message in cases:
        named = ["--model", "catdog-tiny", "--target", "cat", "--foil", "dog", "--out", tmp_path / "new"]
        result = run("discover", *named, *SCORING, "--clean", clean, "--corrupt", corrupt)
        assert result.exit_code == 2
        assert message in result.stderr or "nothing to explain" in result.stderr
        assert "Traceback" not in result.output


def test_a_table_that_names_the_classes_too(run: Run, pairs: Path, tmp_path: Path) -> None:
    given = ["--model", "catdog-tiny", "--pairs", pairs / "named.csv", "--target", "cat"]
    result = run("discover", *given, *SCORING, "--out", tmp_path)
    assert_refused(result, "named.csv names a target for each pair: leave out --target")


def test_circuits_of_another_graph_and_malformed_ones(
    run: Run, behaviour: list[object], tmp_path: Path
) -> None:
    other = Circuit.from_edges(transformer_graph(2, 2), ["input->m0", "m0->logits"])
    other.save(tmp_path / "other.json")
    (tmp_path / "broken.json").write_text('{"schema": "circuitvit.circuit/1"')
    (tmp_path / "later.json").write_text('{"schema": "circuitvit.circuit/9"}')
    for name, message in (
        ("other", "belongs to another graph"),
        ("broken", "is not a JSON file"),
        ("later", "this version of circuitvit reads"),
        ("missing", "cannot read"),
    ):
        path = tmp_path / f"{name}.json"
        assert_refused(run("verify", path, *behaviour, "--out", tmp_path / "new"), f"{message}")
        if name != "other":
            assert_refused(run("draw", path, tmp_path / "out.svg"), message)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("groups", [[], ["--groups", "kind"]])
def test_a_circuit_of_another_graph_is_refused_before_the_model_is_run(
    run: Run, pairs: Path, tmp_path: Path, groups: list[str]
) -> None:
    """The images are the same on both sides, which a run would find out; graphs that print alike are told."""
    graph = cv.load("catdog-tiny").graph
    stages = [replace(stage, name=stage.name.replace("mlp2", "ffn2")) for stage in graph.stages]
    Circuit.full(Graph(tuple(stages), ("cls", "patch") if groups else ONE_GROUP)).save(tmp_path / "o.json")
    named = ["--model", "catdog-tiny", "--target", "cat", "--foil", "dog", *groups]
    images = ["--clean", pairs / "clean", "--corrupt", pairs / "clean"]
    result = run("verify", tmp_path / "o.json", *named, *images)
    assert_refused(result, "its stage 'ffn2' differs in its name: 'ffn2', not 'mlp2'")
    assert_refused(result, "Give the --model and the --groups that the circuit was found with")


def test_drawings_that_cannot_be_made(run: Run, discovered: tuple[Path, Any], tmp_path: Path) -> None:
    circuit = discovered[0] / "circuit.json"
    (tmp_path / "taken").write_text("mine")
    assert_refused(run("draw", circuit, tmp_path / "out.jpeg"), "cannot draw a .jpeg file")
    assert_refused(run("draw", circuit, tmp_path / "taken" / "out.svg"), "cannot write to the folder")
    assert_refused(run("draw", circuit, tmp_path / "new" / "out"), "has no ending to tell the format by")
    assert not (tmp_path / "new").exists()


def test_images_in_a_drawing_need_model_and_pictures(
    run: Run, discovered: tuple[Path, Any], pairs: Path, tmp_path: Path
) -> None:
    circuit, new = discovered[0] / "circuit.json", tmp_path / "new"
    photo, model = ["--clean", pairs / "clean"], ["--model", "catdog-tiny"]
    for options, message in (
        ([*photo], "no --model: images show what .* name it (the circuit is of catdog-tiny)"),
        (["--checkpoint", "weights.pt"], "no --model"),
        ([*model], "--model without images: add --clean IMAGE"),
        (["--corrupt", pairs / "corrupt"], "--corrupt without --clean"),
        ([*model, *photo, "--image", 999], "pair is 0 to"),
        (["--report", discovered[0] / "circuit.json"], "circuitvit.report/2"),
    ):
        refused = run("draw", circuit, "--out", new / "page.html", *options)
        assert_refused(refused, message.partition(" .* ")[0])
        assert message.rpartition(" .* ")[2] in " ".join(refused.stderr.split())
    assert_refused(run("draw", circuit, new / "x.dot", *model, *photo), "a .dot file holds no images")
    assert_refused(run("draw", circuit, new / "x.svg", "--out", new / "y.svg"), "Give one of them")
    assert not new.exists()


def test_attribute(run: Run, behaviour: list[object], tmp_path: Path) -> None:
    out = ["--out", tmp_path / "new"]
    assert_refused(run("attribute", *behaviour, "--method", "find", *out), "unknown method 'find'")
    without_foil = [*behaviour[:8], "--metric", "accuracy", *out]
    assert_refused(run("attribute", *without_foil), "needs the metric's gradient")
    assert not (tmp_path / "new").exists()


def test_a_refusal_late_in_the_work_says_what_was_saved(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from circuitvit.errors import DataError

    def verify(*_: object, **__: object) -> None:
        raise DataError("no more pairs")

    monkeypatch.setattr("circuitvit.verification.verify", verify)
    result = run("discover", *behaviour, *SCORING, "--out", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"saved in {tmp_path}: circuit.json, scores.json")
    assert result.stderr.endswith("error: no more pairs\n")


def test_a_bug_is_not_dressed_up_as_bad_input(
    run: Run, behaviour: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attribute(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("circuitvit.attribution.attribute", attribute)
    result = run("discover", *behaviour, *SCORING, "--out", tmp_path)
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)
