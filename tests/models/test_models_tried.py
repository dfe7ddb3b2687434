"""The script that tries every architecture, on a handful: what it calls accepted, refused and wrong."""

from __future__ import annotations

import csv
import importlib.util
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import models_tried
from bench.models_tried import FILES, Tried, architectures, redraw, report, small, tried
from circuitvit.models.refusals import NO_EDGES
from circuitvit.models.timm_import import import_timm

HANDFUL = {
    "vit_tiny_patch16_224": True,
    "vit_dwee_patch16_reg1_gap_256": True,
    "deit_tiny_distilled_patch16_224": True,
    "vit_relpos_small_patch16_224": True,
    "qwen3_vit_88m": True,
    "vitamin_small_224": True,
    "vit_base_patch16_rpn_224": False,
    "cait_xxs24_224": False,
    "xcit_nano_12_p16_224": False,
}


def test_all_of_timms_isotropic_files_are_tried() -> None:
    names = [name for name, where, _ in architectures() if where.startswith("timm")]
    assert len(names) == len(set(names)) == 370
    assert all(name in names for name in HANDFUL)


@pytest.mark.parametrize("name", HANDFUL)
def test_a_handful_is_accepted_or_refused_with_a_reason(name: str) -> None:
    found = tried(name, "timm", partial(small, name))
    assert found is not None
    assert found.outcome == ("accepted" if HANDFUL[name] else "refused")
    assert bool(found.reason) != HANDFUL[name]
    assert found.error is None or found.error < 1e-9


def test_files_whose_models_have_no_edges_are_there() -> None:
    import_timm()  # after which torchvision can be imported
    for name in NO_EDGES:
        library = name.partition(".")[0]
        if importlib.util.find_spec(library) is not None:
            assert importlib.util.find_spec(name) is not None, name


def test_every_weight_is_drawn_anew_and_small() -> None:
    module = small("deit3_small_patch16_224")
    before = {name: weight.clone() for name, weight in module.named_parameters()}
    redraw(module)
    assert len(module.blocks) == 2
    for name, weight in module.named_parameters():
        assert weight.dtype == torch.float64
        assert (weight != before[name]).all(), name
    assert all(block.ls1.gamma.abs().min() > 0.01 for block in module.blocks)


def test_a_wrong_sum_and_an_error_of_another_kind_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    build = partial(small, "test_vit")
    monkeypatch.setattr(models_tried, "summed", lambda model, images: model(images) * 1.001)
    found = tried("test_vit", "timm", build)
    assert found is not None
    assert found.outcome == "wrong"
    assert "off by 1.0e-03" in found.reason

    def fails(module: Any) -> None:
        raise ZeroDivisionError("here")

    monkeypatch.setattr(models_tried.cv, "wrap", fails)
    assert tried("test_vit", "timm", build) == Tried(
        "test_vit", "timm", reason="ZeroDivisionError: here", wrong=True
    )


def test_a_library_that_is_not_there_is_left_out() -> None:
    def missing() -> Any:
        raise ImportError("no such library")

    assert tried("any", "missing", missing) is None


def test_the_page_is_renewed_between_its_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, names = tmp_path / "models.md", tmp_path / "tried.csv"
    monkeypatch.setattr(models_tried, "PAGE", page)
    monkeypatch.setattr(models_tried, "LIST", names)
    page.write_text("\n".join(["before", models_tried.MARKS[0], "old", models_tried.MARKS[1], "after"]))
    found = [
        Tried("a", "timm `one.py`", 1e-15),
        Tried("b", "timm `one.py`", reason="is a X"),
        Tried("c", "timm `one.py`", reason="is a X"),
        Tried("D", "hf", 2e-13),
    ]
    models_tried.write(found)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after")
    assert "old" not in text
    assert "| timm `one.py` | 3 | 1 | 2 | 1e-15 |" in text
    assert "| 2 | is a X | `b`, `c` |" in text
    assert report(found) in text
    with names.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["outcome"] for row in rows] == ["accepted", "refused", "refused", "accepted"]


def test_the_list_in_the_documentation_is_complete_and_nothing_in_it_is_wrong() -> None:
    with Path("docs/models_tried.csv").open() as file:
        rows = list(csv.DictReader(file))
    timm = [row for row in rows if row["where"].startswith("timm")]
    assert len(timm) == 370
    assert sum(row["outcome"] == "accepted" for row in timm) >= 285
    assert not [row for row in rows if row["outcome"] == "wrong"]
    assert len({row["where"] for row in timm}) == len(FILES)
