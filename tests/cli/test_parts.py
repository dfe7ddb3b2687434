"""The small parts: values with units, option groups, the output folder."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from circuitvit._keywords import in_bytes
from circuitvit.attribution import METHODS
from circuitvit.cli.inputs import parse_architecture, parse_plan
from circuitvit.cli.library import arguments, scoring_methods
from circuitvit.cli.options import Keywords, command, group
from circuitvit.cli.output import LOCK, Folder, Interrupted
from circuitvit.errors import DataError, FileError, OptionError
from circuitvit.pruning.find import Start


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1GiB", 2**30), ("512 mib", 2**29), ("1.5kb", 1500), (".5MB", 500_000), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-2GB", "0GB", "2 G B", "1e9B", "nanGB", "0.1B"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(OptionError, match="memory= takes a size such as"):
        in_bytes(text)


def test_architecture_settings() -> None:
    expected = {"num_classes": 37, "global_pool": "avg", "qkv_bias": False, "class_token": True, "a": "b=c"}
    settings = ["num_classes=37", "global_pool = avg", "qkv_bias=False", "class_token=true", "a=b=c"]
    assert parse_architecture(settings) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["=3"], "KEY=VALUE"),
        (["a b=3"], "KEY=VALUE"),
        (["img_size="], "KEY=VALUE"),
        (["device=cuda"], "use the option --device"),
        (["name=vit"], "use the option --model"),
        (["depth=3", "depth=4"], "gives depth twice"),
    ],
)
def test_architecture_settings_that_make_no_sense(settings: list[str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_architecture(settings)


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4,5", "1,-1,1", "1,1,0", "a,b,c", "1.5,2,3"])
def test_plans_that_make_no_sense(text: str) -> None:
    with pytest.raises(OptionError, match="--plan takes"):
        parse_plan(text)


# -- options -------------------------------------------------------------------------------------


@group("Shape", "graph.EdgeScores.top", names="--name NAME")
@dataclass(frozen=True)
class Shape:
    """A shape.

    Attributes:
        width: how wide.
        tall: higher than wide, or
            not.
    """

    width: int
    names: list[str] | None = None
    tall: bool = False
    by: str = "magnitude"


def invoke(function: Any, *arguments: str) -> Any:
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})


def test_a_group_of_options_arrives_as_one_argument() -> None:
    seen: list[Any] = []

    @command("Show")
    def show(path: Annotated[Path, typer.Argument()], shape: Shape, loud: bool = True) -> None:
        """Show."""
        seen.append((path, shape.width, list(shape.names or ()), shape.tall, shape.by, loud))

    result = invoke(show, "here", "--width", "3", "--name", "a", "--name", "b", "--no-loud", "--by", "signed")
    assert result.exit_code == 0, result.output
    assert seen == [(Path("here"), 3, ["a", "b"], False, "signed", False)]
    assert invoke(show, "here").exit_code == 2  # a field without a default is required
    refused = invoke(show, "here", "--width", "3", "--by", "sined").exception
    assert str(refused) == "unknown ranking 'sined': did you mean 'signed'?"
    assert str(invoke(show, "here", "--width", "0").exception) == "--width is at least 1, not 0"


def test_texts_come_from_the_docstring_or_else_from_the_library() -> None:
    @command("Show", own="--mine WORD")
    def show(shape: Shape, own: str = "x") -> None:
        """Show.

        Args:
            own: of the command.
        """

    text = " ".join(invoke(show, "--help").output.split())
    for told in (
        "--width N How wide.",
        "Higher than wide, or not.",
        "--mine WORD Of the command.",
    ):
        assert told in text
    assert '"magnitude", or "signed": the edges that support the behaviour most' in text
    assert "Args:" not in text


def test_arguments_are_what_the_library_says_of_them() -> None:
    """The source that is parsed, against the function that is imported."""
    for place in ("pruning.find", "pruning.acdc", "pruning.FamilySettings", "models.load", "training.Recipe"):
        room, name = place.split(".")
        real = inspect.signature(getattr(importlib.import_module(f"circuitvit.{room}"), name)).parameters
        told = arguments(place)
        assert list(told) == [each for each in real if real[each].kind != inspect.Parameter.VAR_KEYWORD]
        for each, argument in told.items():
            assert argument.text, f"{place} says nothing of {each}"
            if isinstance(real[each].default, (int, float, str, bool)):
                assert argument.default == real[each].default
    assert arguments("pruning.find")["start"].choices == get_args(Start)
    assert arguments("pruning.find")["within"].type is str
    assert [arguments("training.Recipe")[each].type for each in ("steps", "clip")] == [int, float]
    with pytest.raises(LookupError, match="has no fnd"):
        arguments("pruning.fnd")


def test_every_scoring_method_is_known_without_importing_it() -> None:
    assert list(scoring_methods()) == list(METHODS)


def test_keywords_say_who_takes_them() -> None:
    takers = {"find": arguments("pruning.find"), "acdc": arguments("pruning.acdc")}
    keywords = Keywords("Search", takers, {"within": "--within TIME"})
    assert not set(keywords.names()) & {"state", "seed", "progress"}
    assert keywords.argument("tau").text.startswith("acdc: the rise in divergence")
    assert keywords.argument("faithfulness").text.endswith("[default: 0.9]")
    assert "`--within`" in keywords.argument("plan").text
    keywords.check("find", ["within", "batch_size"])
    with pytest.raises(OptionError, match="--method acdc does not use --within: it belongs to --method find"):
        keywords.check("acdc", ["within"])


# -- the folder ----------------------------------------------------------------------------------


def write(path: Path) -> None:
    path.write_text("content")


def test_a_folder_is_made_before_the_work_and_kept_after_it(tmp_path: Path) -> None:
    with Folder(tmp_path / "a" / "b", ("x",)) as folder:
        assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == [LOCK]
        folder.write("x", write)
        folder.write("x", write)
    assert folder.saved == ["x"]
    assert not (tmp_path / "a" / "b" / LOCK).exists()
    assert (tmp_path / "a" / "b" / "x").read_text() == "content"


def test_a_folder_made_for_nothing_is_taken_away(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for inside in ("mine/a/b", "mine"):
        with pytest.raises(DataError), Folder(tmp_path / inside, ()):
            raise DataError("no")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_an_interruption_says_what_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "old")
    told = pytest.raises(Interrupted, match=r"saved in .*: new; from an earlier run: old")
    with told, Folder(tmp_path, ("new", "old", "never")) as folder:
        folder.write("new", write)
        raise KeyboardInterrupt
    with pytest.raises(DataError), Folder(tmp_path, ("new",)) as folder:  # noqa: PT012
        folder.write("new", write)
        raise DataError("no")
    assert capsys.readouterr().err == f"saved in {tmp_path}: new\n"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    write(tmp_path / "file")
    with pytest.raises(FileError, match="it is a file"), Folder(tmp_path / "file", ()):
        pass
    with pytest.raises(FileError, match="cannot write to the folder"), Folder(tmp_path / "file" / "x", ()):
        pass
