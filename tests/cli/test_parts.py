"""The small parts: values with units, option groups, the output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from circuitvit.cli.folder import Folder, Interrupted
from circuitvit.cli.grouped import grouped
from circuitvit.cli.values import parse_architecture, parse_plan, parse_size
from circuitvit.errors import DataError, FileError, OptionError


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("1GiB", 2**30), ("512 mib", 2**29), ("1.5kb", 1500), (".5MB", 500_000), ("7B", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--memory") == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-2GB", "0GB", "2 G B", "1e9B", "nanGB", "0.1B"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(OptionError, match="--memory takes a size such as"):
        parse_size(text, "--memory")


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


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "1,0,1", "1,1,0", "a,b,c", "1.5,2,3"])
def test_plans_that_make_no_sense(text: str) -> None:
    with pytest.raises(OptionError, match="--plan takes"):
        parse_plan(text)


# -- option groups -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    width: Annotated[int, typer.Option(help="How wide.")]
    names: Annotated[list[str] | None, typer.Option("--name")] = None
    tall: bool = False


def test_a_group_of_options_arrives_as_one_argument() -> None:
    seen: list[Any] = []

    @grouped
    def show(path: Annotated[Path, typer.Argument()], shape: Shape, loud: bool = True) -> None:
        """Show."""
        seen.append((path, shape.width, list(shape.names or ()), shape.tall, loud))

    app = typer.Typer()
    app.command()(show)
    result = CliRunner().invoke(app, ["here", "--width", "3", "--name", "a", "--name", "b", "--no-loud"])
    assert result.exit_code == 0, result.output
    assert seen == [(Path("here"), 3, ["a", "b"], False, False)]
    assert CliRunner().invoke(app, ["here"]).exit_code == 2  # a field without a default is required


# -- the folder ----------------------------------------------------------------------------------


def write(path: Path) -> None:
    path.write_text("content")


def test_a_folder_is_made_before_the_work_and_kept_after_it(tmp_path: Path) -> None:
    with Folder(tmp_path / "a" / "b", ("x",)) as folder:
        assert list((tmp_path / "a" / "b").iterdir()) == []
        folder.write("x", write)
        folder.write("x", write)
    assert folder.saved == ["x"]
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
