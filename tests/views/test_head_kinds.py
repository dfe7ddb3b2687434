"""Kinds of heads: planted ones are found and nothing else, and every number is what the definition says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import CircuitViTError
from circuitvit.models import registry
from circuitvit.models.timm_import import import_timm
from circuitvit.views import HeadKinds, repeated_patches

VisionTransformer = import_timm().models.vision_transformer.VisionTransformer
MATCHES = ("same patch", "induction", "induction left", "same context")


def kinds_of(program: str) -> HeadKinds:
    return cv.head_kinds(cv.compiled(program).model, progress=False)


@pytest.fixture(scope="module")
def catdog() -> cv.Model:
    return cv.load("catdog-tiny")


@pytest.mark.parametrize(
    ("program", "planted"),
    [
        ("duplicate", {"same patch": ["a0.h0"]}),
        ("induction", {"induction": ["a1.h0"], "previous": ["a0.h0", "a0.h1", "a0.h2"]}),
        ("mirror", {"next": ["a0.h0"], "previous": ["a0.h1"]}),
        ("factors", {}),
    ],
)
def test_what_is_planted_is_found_and_nothing_else(program: str, planted: dict[str, list[str]]) -> None:
    found = kinds_of(program)
    for kind in (*MATCHES, "self", "previous", "next", "above", "below", "cls"):
        assert sorted(score.head for score in found.only(kind)) == planted.get(kind, [])
        for head in set(found.heads) - set(planted.get(kind, [])):
            assert not found[head, kind].low >= 0.05
    for kind, heads in planted.items():
        assert all(found[head, kind].low > 0.3 for head in heads)


def test_a_block_occurs_twice_and_nothing_else_does(catdog: cv.Model) -> None:
    drawn = repeated_patches(catdog, n=8, seed=3)
    height, width = drawn.block
    for row in range(8):
        (top, left), (down, right) = drawn.first[row], drawn.second[row]
        assert (top, left) < (down, right)
        pieces, control = (
            {(r, c): image[:, 8 * r : 8 * r + 8, 8 * c : 8 * c + 8] for r in range(6) for c in range(6)}
            for image in (drawn.images[row], drawn.controls[row])
        )
        twins = {(down + r, right + c): (top + r, left + c) for r in range(height) for c in range(width)}
        assert not set(twins) & set(twins.values())
        for one in pieces:
            alike = [other for other in pieces if other != one and torch.equal(pieces[other], pieces[one])]
            back = {first: second for second, first in twins.items()}
            assert alike == [each for each in (twins.get(one), back.get(one)) if each is not None]
            assert not any(torch.equal(control[one], control[other]) for other in control if other != one)
            assert torch.equal(control[one], pieces[one]) == (one not in back)
    pixels = drawn.images * 0.5 + 0.5
    assert set(pixels.unique().tolist()) == {0.0, 1.0}


def test_patches_are_cut_out_of_images_where_there_are_some(catdog: cv.Model) -> None:
    images = catdog_pairs(8, seed=0).clean
    drawn = repeated_patches(catdog, images, n=8)

    def cut(images: torch.Tensor) -> list[bytes]:
        pieces = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        return [piece.numpy().tobytes() for piece in pieces]

    assert set(cut(drawn.images)) <= set(cut(images))


def literal(model: cv.Model, head: str, step: tuple[int, int], n: int, part: str) -> tuple[float, float]:
    """Attention, or scores over the query's mean, from the second copy to the step from its twin."""
    drawn = repeated_patches(model, n=n, seed=0)
    means = []
    for images in (drawn.images, drawn.controls):
        values = model.activations(images, f"{head}.{part}", progress=False)[f"{head}.{part}"].double()
        values = values - values.mean(dim=-1, keepdim=True) if part == "scores" else values
        each = []
        for row in range(n):
            cells = []
            for down in range(drawn.block[0]):
                for right in range(drawn.block[1]):
                    to = down + step[0], right + step[1]
                    if 0 <= to[0] < drawn.block[0] and 0 <= to[1] < drawn.block[1]:
                        query = 1 + (drawn.second[row][0] + down) * 6 + drawn.second[row][1] + right
                        key = 1 + (drawn.first[row][0] + to[0]) * 6 + drawn.first[row][1] + to[1]
                        cells.append(float(values[row, query, key]))
            each.append(np.mean(cells))
        means.append(float(np.mean(each)))
    return means[0], means[1]


@pytest.mark.parametrize(
    ("kind", "step"), [("same patch", (0, 0)), ("induction", (0, 1)), ("induction above", (-1, 0))]
)
def test_matches_are_what_the_definition_says(catdog: cv.Model, kind: str, step: tuple[int, int]) -> None:
    found = cv.head_kinds(catdog, n=8, batch_size=3, progress=False)
    for head in ("a2.h1", "a3.h2"):
        attention, control = literal(catdog, head, step, 8, "pattern")
        raised, usual = literal(catdog, head, step, 8, "scores")
        assert found[head, kind].attention == pytest.approx(attention, abs=1e-6)
        assert found[head, kind].control == pytest.approx(control, abs=1e-6)
        assert found[head, kind].preference == pytest.approx(raised - usual, abs=1e-4)
        assert found[head, kind].low < attention - control < found[head, kind].high


def test_heads_made_to_look_somewhere_are_of_that_kind(catdog: cv.Model) -> None:
    """Also a proof that edits count: their patterns are written by an edit."""
    cls, uniform = torch.zeros(37, 37), torch.full((37, 37), 1 / 37)
    cls[:, 0] = 1.0
    edited = catdog.edit({"a1.h0.pattern": torch.eye(37), "a1.h1.pattern": cls, "a1.h2.pattern": uniform})
    found = cv.head_kinds(edited, catdog_pairs(4, seed=0).clean, n=8, progress=False)
    assert found["a1.h0", "self"].attention == pytest.approx(1.0)
    assert found["a1.h0", "self"].control == pytest.approx(1 / 37)
    assert found["a1.h1", "cls"].attention == pytest.approx(1.0)
    assert found["a1.h1", "cls"].low == pytest.approx(36 / 37)
    row = found.heads.index("a1.h2")
    assert np.abs(found.excess[row]).max() < 1e-6
    assert found.spread[row] == pytest.approx(1.0)
    assert found.spread[row - 2] == pytest.approx(0.0, abs=1e-6)
    assert [score.head for score in found.only("self")] == ["a1.h0"]
    assert found.positions["a1.h0"].name == "self"
    assert found.natural
    assert len(found.caveats) == 1


def test_causal_attention_has_scores_though_some_are_minus_infinite(catdog: cv.Model) -> None:
    found = cv.head_kinds(catdog.edit({"a*.pattern": cv.causal()}), n=8, progress=False)
    assert np.isfinite(found.attention).all()
    assert np.isfinite(found.preference).all()
    assert found["a0.h0", "next"].attention == 0.0


def test_registers_and_models_without_a_class_token() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 3}
    torch.manual_seed(0)
    registers = cv.wrap(VisionTransformer(reg_tokens=2, **sizes).eval())
    found = cv.head_kinds(registers, n=8, progress=False)
    assert found.kinds[-2:] == ("cls", "reg")
    assert found["a0.h0", "reg"].control == pytest.approx(2 / 19)
    plain = cv.wrap(VisionTransformer(class_token=False, global_pool="avg", **sizes).eval())
    assert cv.head_kinds(plain, n=8, progress=False).kinds[-1] == "edges"


def test_blocks_of_clips_are_repeated_in_every_frame() -> None:
    example = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "video_circuit.py"))
    before = dict(registry.FAMILIES)
    cv.register(example["TubeletViT"], example["TubeletFamily"]())
    module = example["TubeletViT"](8, 16, (2, 4, 4), width=16, depth=2, heads=2, hidden=16, classes=3)
    model = cv.wrap(module.eval())
    registry.FAMILIES.clear()
    registry.FAMILIES.update(before)
    drawn = repeated_patches(model, n=8)
    (top, left), (down, right) = 4 * drawn.first[0], 4 * drawn.second[0]
    block = drawn.images[0, ..., down : down + 4, right : right + 8]
    assert torch.equal(block, drawn.images[0, ..., top : top + 4, left : left + 8])
    assert not torch.equal(block[:2], block[2:4])
    assert len(drawn.looks(0, 1)["same patch"].query) == 4 * 2
    found = cv.head_kinds(model, n=8, progress=False)
    assert np.isfinite(found.attention[:, : found.kinds.index("induction") + 1]).all()


def test_the_same_seed_gives_the_same_numbers(catdog: cv.Model) -> None:
    one, two, other = (cv.head_kinds(catdog, n=8, seed=seed, progress=False) for seed in (0, 0, 1))
    assert np.array_equal(one.attention, two.attention, equal_nan=True)
    assert not np.array_equal(one.attention, other.attention, equal_nan=True)


def test_what_cannot_be_asked_is_refused_by_name(catdog: cv.Model) -> None:
    with pytest.raises(CircuitViTError, match="the number of images"):
        cv.head_kinds(catdog, n=4)
    with pytest.raises(CircuitViTError, match="give at least 2"):
        cv.head_kinds(catdog, torch.zeros(1, 3, 48, 48))
    with pytest.raises(CircuitViTError, match="batch_size"):
        cv.head_kinds(catdog, n=8, batch_size=0)
    found = cv.head_kinds(catdog, n=8, progress=False)
    with pytest.raises(CircuitViTError, match="did you mean 'induction'"):
        found.only("inducton")
    with pytest.raises(CircuitViTError, match=r"unknown head 'a9\.h9'"):
        _ = found["a9.h9", "induction"]
    torch.manual_seed(0)
    sizes = {"img_size": (8, 24), "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    small = VisionTransformer(num_classes=3, **sizes).eval()
    with pytest.raises(CircuitViTError, match="no room for a block"):
        cv.head_kinds(cv.wrap(small), n=8)


def test_the_figure_names_what_was_found(tmp_path: Path) -> None:
    found = kinds_of("induction")
    text = found.figure().save(tmp_path / "kinds.svg").read_text()
    assert re.search(r"a1\.h0 \d\d%", text)
    assert "induction left" in text
    assert "uniform" in text
    only = found.figure(["induction"]).save(tmp_path / "one.svg").read_text()
    assert "previous" not in only
    assert repr(found) == "HeadKinds(12 heads x 12 kinds; a1.h0 induction, a0.h0 previous)"


def test_a_real_model_has_duplicate_heads_and_no_induction_heads(shared_data: Path) -> None:
    weights = shared_data / "weights/vit_tiny_patch16_224.safetensors"
    found = cv.head_kinds(cv.load("vit_tiny_patch16_224", checkpoint=weights), n=8, progress=False)
    assert [score.head for score in found.only("same patch")] == ["a0.h1", "a0.h0"]
    for kind in ("induction", "induction left", "induction above", "induction below", "same context"):
        assert found.only(kind, 0.02) == []
