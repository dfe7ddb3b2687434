"""The documentation keeps up with the code: examples run, links lead somewhere, lists are complete.

A block marked `python` is run, block after block in one file; a block marked `py` is only shown, because it
needs weights or images that the repository does not have.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path

import pytest
import typer

import circuitvit as cv
from circuitvit.cli.program import Program, app
from circuitvit.export import FORMATS
from circuitvit.graph.circuit import CIRCUIT_SCHEMA
from circuitvit.graph.scores import SCORES_SCHEMA
from circuitvit.groundtruth import PARTS, PLANTED, PROGRAMS
from circuitvit.models.zoo import zoo_names
from circuitvit.models.zoo.card import SCHEMA as CARD_SCHEMA
from circuitvit.tasks import ablation_names, metric_names
from circuitvit.verification.report import REPORT_SCHEMA, Report, Section

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+\.(?:md|py|svg|cff))?(?:#([\w-]+))?\)")
PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, language: str) -> list[str]:
    """The contents of all fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text_of(path), re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as both the site and common viewers make them."""
    headings = re.findall(r"^#+ (.+)$", text_of(path), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower() for heading in headings]
    return {re.sub(r"\s", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", [ROOT / "README.md", DOCS / "quickstart.md"], ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "\n".join(blocks(page, "python"))
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    exec(compile(code, str(page), "exec"), names)
    report, circuit = names["report"], cv.Circuit.load("circuit.json")
    assert isinstance(report, cv.Report)
    assert 0.7 < report.headline.faithfulness.value < 1.3
    assert 0 < len(circuit) < 0.15 * circuit.graph.n_edges
    assert Path("circuit.svg").is_file()


def test_looking_inside_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(DOCS / "look_inside.md", "python"):
        exec(compile(code, "look_inside.md", "exec"), names)
    pictures = ("knockouts", "tokens", "steering", "deciders", "probes", "probe_scores", "registers")
    assert all(Path(f"{name}.png").is_file() for name in pictures)


def test_the_page_on_words_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(DOCS / "typographic.md", "python"):
        exec(compile(code, "typographic.md", "exec"), names)
    found = names["found"]
    assert isinstance(found, cv.defences.HeadDefence)
    assert found.gain.low is not None
    assert found.gain.low > 0.3 > 0.05 > found.cost.value
    assert Path("heads.png").is_file()


def test_the_page_on_taking_it_home_runs_as_written() -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(DOCS / "take_it_home.md", "python"):
        exec(compile(code, "take_it_home.md", "exec"), names)
    assert [block.attn.num_heads for block in names["small"].blocks] == [1, 1, 4, 3]  # type: ignore[attr-defined]


def test_the_page_on_mending_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for code in blocks(DOCS / "mending.md", "python"):
        exec(compile(code, "mending.md", "exec"), names)
    found = names["found"]
    assert isinstance(found, cv.Mended)
    assert found.best == "circuit"
    left = found.behaviours[0].left(found.methods.index("circuit"))
    assert left is not None
    assert left.value < 0.2
    assert Path("mended.png").is_file()


def test_the_readme_examples_are_short() -> None:
    first, inside = blocks(ROOT / "README.md", "python")
    assert len(first.splitlines()) <= 15
    assert len(inside.splitlines()) <= 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_shown_code_can_be_parsed(page: Path) -> None:
    for code in [*blocks(page, "py"), *blocks(page, "python")]:
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(text_of(page)):
        path = page.parent / target if target else page
        assert path.is_file(), f"{page.name} links to {target}, which does not exist"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), (
                f"{page.name} links to {target}#{anchor}: there is no such heading"
            )
    for target in PICTURE.findall(text_of(page)):
        assert (page.parent / target).is_file(), f"{page.name} shows {target}, which does not exist"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r": (\w+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE))
    assert listed == {path.name for path in DOCS.glob("*.md")}


# -- lists that must be complete -----------------------------------------------------------------------


@pytest.mark.parametrize("name", cv.METHODS)
def test_methods_are_documented(name: str) -> None:
    assert f"`{name}`" in text_of(DOCS / "methods.md"), f"name the method {name} in docs/methods.md"
    assert f"`{name}`" in text_of(DOCS / "command_line.md"), f"name the method {name} in docs/command_line.md"


@pytest.mark.parametrize("name", metric_names())
def test_metrics_are_documented(name: str) -> None:
    assert f"`{name}`" in text_of(DOCS / "command_line.md")


@pytest.mark.parametrize("name", ablation_names())
def test_ablations_are_documented(name: str) -> None:
    for page in ("concepts.md", "command_line.md"):
        assert f"`{name}`" in text_of(DOCS / page), f"name the ablation {name} in docs/{page}"


@pytest.mark.parametrize("name", zoo_names())
def test_bundled_models_are_documented(name: str) -> None:
    assert f"`{name}`" in text_of(DOCS / "models.md")


@pytest.mark.parametrize("name", [*PROGRAMS, *PLANTED, *PARTS])
def test_compiled_models_are_documented(name: str) -> None:
    assert f"| `{name}` | " in text_of(DOCS / "ground_truth.md")


@pytest.mark.parametrize("name", FORMATS)
def test_drawing_formats_are_documented(name: str) -> None:
    page = text_of(DOCS / "command_line.md") + text_of(DOCS / "formats.md")
    assert f".{name}" in page, f"name the format .{name} in docs/formats.md"


@pytest.mark.parametrize("name", [each for each in cv.__all__ if each not in ("METHODS", "__version__")])
def test_public_names_are_in_the_reference(name: str) -> None:
    found = getattr(cv, name)
    home = sys.modules[found.__module__].__name__ if inspect.isclass(found) or callable(found) else ""
    page = text_of(DOCS / "api.md")
    assert f"::: circuitvit.{name}\n" in page or name in page, f"add {name} ({home}) to docs/api.md"


def test_commands_and_options_are_documented() -> None:
    page = text_of(DOCS / "command_line.md")
    program = typer.main.get_command(app)
    assert isinstance(program, Program)
    for name in program.commands:
        command = program.load(name)
        assert f"`{name}`" in page, f"name the command {name} in docs/command_line.md"
        if name == "train":  # docs/models.md tells about it, and its help about the options
            continue
        for parameter in command.params:
            long = [option for option in parameter.opts if option.startswith("--")]
            assert all(option in page for option in long), f"name {long} of {name} in docs/command_line.md"


@pytest.mark.parametrize("schema", [CIRCUIT_SCHEMA, SCORES_SCHEMA, REPORT_SCHEMA, CARD_SCHEMA])
def test_schemas_are_documented(schema: str) -> None:
    assert f"`{schema}`" in text_of(DOCS / "formats.md")


def test_fields_of_a_report_are_documented() -> None:
    page = text_of(DOCS / "formats.md")
    for kind in (Report, Section):
        for field in kind.__dataclass_fields__:
            assert f"`{field}`" in page, f"name the field {field} of {kind.__name__} in docs/formats.md"


def test_the_circuit_files_shown_can_be_loaded(tmp_path: Path) -> None:
    shown = blocks(DOCS / "formats.md", "json")
    assert len(shown) == 2
    circuits = []
    for number, content in enumerate(shown):
        json.loads(content)
        path = tmp_path / f"{number}.json"
        path.write_text(content, encoding="utf-8")
        circuits.append(cv.Circuit.load(path))
    own, theirs = circuits
    assert list(own) == ["input->a0.h0<v>", "a0.h0->logits"]
    assert own == theirs
    assert own.score_of("a0.h0->logits") == theirs.score_of("a0.h0->logits") == -1.25
