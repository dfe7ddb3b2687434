"""The command line names options where the library names keywords."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import circuitvit
from circuitvit.cli.program import COMMANDS, app
from circuitvit.cli.wording import as_options, flags_of, in_options
from tests.cli.cases import Run

FLAGS = {
    name.lstrip("-").replace("-", "_"): name
    for name in (
        "--metric", "--to", "--head", "--target", "--foil", "--corrupt", "--batch-size", "--by", "--classes",
        "--pretrained", "--checkpoint", "--arch", "--start", "--list",
    )
} | {"scales": "--scale", "ways": "--way", "layers": "--layer"}  # fmt: skip


SAID = {
    "give corrupt=, or another metric=": "give --corrupt, or another --metric",
    "use by='top'": "use --by top",
    "the batch size (batch_size) must be": "the batch size (--batch-size) must be",
    "write scales=(-1, 0.5, 1)": "write --scale -1 --scale 0.5 --scale 1",
    "give at least 2, or ways=()": "give at least 2, or no --way",
    "give checkpoint=FILE, or pretrained=True to": "give --checkpoint FILE, or --pretrained to",
    "when loading: load(..., classes=[...])": "when loading: --classes FILE",
    "choose another metric, or find(..., start='whole')": "choose another metric, or --start whole",
    "options such as num_classes=, img_size= or": "options such as --arch num_classes=, --arch img_size= or",
    "as in logit_diff('tabby', 'Border collie')": "as in --target 'tabby' --foil 'Border collie'",
    "write cv.group('sea bird') for": "write 'group:sea bird' for",
    "metric=cv.similarity(to=...) or cv.projection(direction); or": "--metric similarity --to FILE; or",
    "no site is called 'q*': model.sites() lists them all": "no site is called 'q*': --list lists them all",
    "use by='top' or 'logit'": "use --by top or --by logit",
    "build it with global_pool='avg'": "build it with --arch global_pool=avg",
    "its options --arch num_classes=37 and": "its options --arch num_classes=37 and",
    "put a classifier on it, cv.fit_head or cv.with_head": "put a classifier on it, --head FILE",
    # What the command has no option for stays Python; what is no keyword stays as it is.
    "give memory=": "give memory=",
    "more images to average, Mean(scales=...)": "more images to average, Mean(scales=...)",
    "see http://x.org/?by=top, a/by=3.png, `by=1`": "see http://x.org/?by=top, a/by=3.png, `by=1`",
}


@pytest.mark.parametrize(("said", "instead"), SAID.items())
def test_keywords_become_options_of_the_command(said: str, instead: str) -> None:
    assert as_options(said, FLAGS) == instead


def test_nothing_changes_outside_of_a_command() -> None:
    assert in_options("give corrupt=") == "give corrupt="


def test_an_error_of_the_library_names_the_option(run: Run, behaviour: list[object]) -> None:
    without_foil = [each for each in behaviour if each not in ("--foil", "dog")]
    found = run("attribute", *without_foil, "--metric", "accuracy", "--method", "eap")
    assert found.exit_code == 2
    assert "use logit_diff or log_probability, or --method exact" in " ".join(found.output.split())


def messages() -> list[str]:
    """All texts that the library raises, with X for what is filled in."""
    found = []
    for path in sorted(Path(circuitvit.__file__).parent.rglob("*.py")):
        if "cli" in path.parts:
            continue
        raised = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Raise)]
        for node in (each for one in raised if one.exc for each in ast.walk(one.exc)):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def all_commands() -> Iterator[Any]:
    program = typer.main.get_command(app)
    for name in COMMANDS:
        whole = program.load(name)  # type: ignore[attr-defined]
        yield from getattr(whole, "commands", {"": whole}).values()


def test_no_message_of_the_library_names_an_option() -> None:
    assert [each for each in messages() if re.search(r"(?<![\w-])--[a-z]", each)] == []


def test_no_command_says_a_keyword_that_it_has_an_option_for() -> None:
    texts = messages()
    assert any("corrupt=" in each for each in texts)
    for command in all_commands():
        long = {each.name: [flag for flag in each.opts if flag.startswith("--")] for each in command.params}
        flags = flags_of({name: flags[0] for name, flags in long.items() if flags})
        for text in texts:
            named = re.findall(r"(?<![\w.\-`(/?&])(\w+)=", as_options(text, flags))
            left = [
                name for name in named if name in flags and f"--arch {name}=" not in as_options(text, flags)
            ]
            assert left == [], (command.name, text)
