"""The pages that answer questions keep their word: every answer runs, and every message quoted is said.

A page's `python` blocks run one after the other in one namespace. In `troubleshooting.md` a `text` block
after such a block is the message that it ends with; one that stands alone stands in the library's sources. An
`…` stands for anything.
"""

from __future__ import annotations

import re
import shlex
import textwrap
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import circuitvit as cv
from circuitvit.cli.program import app
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.models.timm_import import import_timm

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)

MY_VIT = """
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.MultiheadAttention(32, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class MyViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(32, 3)

    def forward(self, images):
        x = self.patches(images).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))
"""


class Block(SimpleNamespace):
    """A fenced block: `kind`, `text`, and the line of the page that it begins after."""

    kind: str
    text: str
    line: int


def blocks(page: str) -> list[Block]:
    text = (DOCS / page).read_text(encoding="utf-8")
    return [
        Block(kind=kind, text=textwrap.dedent(body), line=text.count("\n", 0, found.start()) + 1)
        for found in FENCE.finditer(text)
        for kind, body in [found.group(2, 3)]
    ]


def run(block: Block, page: str, names: dict[str, object]) -> None:
    """Run a block; a traceback names the line of the page."""
    exec(compile("\n" * block.line + block.text, str(DOCS / page), "exec"), names)


def fits(said: str, quoted: str) -> bool:
    """Whether a text is the one that is quoted, where `…` stands for anything."""
    parts = [re.escape(" ".join(part.split())) for part in quoted.split("…")]
    return re.fullmatch(r"\s*.*?\s*".join(parts), " ".join(said.split()), re.DOTALL) is not None


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures, a checkpoint and a module as the pages suppose them, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, pictures in zip(("cats", "dogs"), catdog_pairs(3, seed=4), strict=True):
        (tmp_path / name).mkdir()
        for number, picture in enumerate(pictures):
            pixels = ((picture * 0.5 + 0.5).clamp(0, 1) * 255).permute(1, 2, 0).byte().numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    torch.manual_seed(0)
    save_file(import_timm().create_model("test_vit", num_classes=3).state_dict(), "pets.safetensors")
    (tmp_path / "my_vit.py").write_text(MY_VIT, encoding="utf-8")
    return tmp_path


def test_forty_questions_and_one_are_answered_in_three_to_ten_lines() -> None:
    answers = (DOCS / "how_do_i.md").read_text(encoding="utf-8").split("\n### ")[1:]
    assert len(answers) == 41
    for answer in answers:
        question = answer.splitlines()[0]
        assert re.fullmatch(r"How do I .+\?", question)
        lines = [line for _, _, code in FENCE.findall(answer) for line in code.splitlines() if line.strip()]
        assert 3 <= len(lines) <= 10, f"{question}: {len(lines)} lines"


def test_the_answers_run(folder: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks("how_do_i.md"):
        if block.kind == "console":
            result = CliRunner().invoke(app, shlex.split(block.text)[1:])
            assert result.exit_code == 0, result.output
        else:
            run(block, "how_do_i.md", names)
    assert {
        "circuit.json",
        "circuit.html",
        "attention.html",
        "patch.json",
        "difference.svg",
        "attribution.png",
    } <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize(
    "page",
    [
        "what_scores_mean.md", "corruptions.md", "compare_models.md", "what_changed.md", "over_training.md",
        "across_models.md",
    ],
)  # fmt: skip
def test_examples_of_a_page_run(page: str, folder: Path) -> None:
    found, names = [each for each in blocks(page) if each.kind == "python"], {"__name__": "__main__"}
    assert found
    for block in found:
        run(block, page, names)


def test_what_is_called_here_can_be_called(folder: Path) -> None:
    page = "coming_from.md"
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        run(block, page, names)
    rows = re.findall(r"^\| (?!there|---)(.*) \|$", (DOCS / page).read_text(encoding="utf-8"), re.MULTILINE)
    columns = [row.split(" | ")[1].removesuffix(" |") for row in rows]
    calls = [call for column in columns for call in re.findall(r"`([^`]+)`", column)]
    assert len(rows) > 50
    assert all("`" in column or column == "none" for column in columns)
    for call in calls:
        eval(call, names)


def test_messages_that_are_quoted_are_said(folder: Path) -> None:
    page, quoted = "troubleshooting.md", 0
    found, names = blocks(page), {"__name__": "__main__"}
    for block, after in pairwise([*found, Block(kind="", text="", line=0)]):
        if block.kind != "python":
            continue
        if after.kind != "text":
            run(block, page, names)
            continue
        with pytest.raises((cv.CircuitViTError, RuntimeError)) as refused:
            run(block, page, names)
        assert fits(str(refused.value), after.text), (
            f"line {after.line} of {page}: now it says {refused.value}"
        )
        quoted += 1
    assert quoted > 15


def test_messages_quoted_alone_stand_in_the_sources() -> None:
    found = blocks("troubleshooting.md")
    alone = [after for block, after in pairwise(found) if after.kind == "text" and block.kind != "python"]
    said = "\n".join(strings(path) for path in sorted((ROOT / "circuitvit").rglob("*.py")))
    assert alone
    for block in alone:
        for part in block.text.split("…"):
            assert " ".join(part.split()) in said, f"nothing says {part!r} (line {block.line})"


def strings(path: Path) -> str:
    """A file's text in which what is put together by the compiler stands together."""
    return re.sub(r'"\n\s*f?"', "", path.read_text(encoding="utf-8"))


def test_a_wrong_quotation_would_be_noticed() -> None:
    assert fits("no class 'kat' here", "no class … here")
    assert not fits("no class 'kat' now", "no class … here")
