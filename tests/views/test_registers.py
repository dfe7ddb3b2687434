"""Registers and outlier patches: planted readers, writers and tokens, and literal computations."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.models.timm_import import import_timm
from circuitvit.views import Registers, registers


def made(**options: Any) -> Any:
    """Three blocks of two heads, nine patches, random weights in float64."""
    family = import_timm().models.vision_transformer.VisionTransformer
    module = family(img_size=12, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3, **options)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in module.named_parameters():
        scale = 0.1 if name.endswith("bias") else 0.5 / tensor.shape[-1] ** 0.5
        tensor.data = torch.randn(tensor.shape, generator=generator) * scale
        if "norm" in name:
            tensor.data = torch.ones_like(tensor) if name.endswith("weight") else torch.zeros_like(tensor)
    return module.double().eval()


@cache
def with_registers() -> cv.Model:
    """Every head looks everywhere alike, but `a1.h1`, whose keys are registers alone."""
    module = made(reg_tokens=2)
    module.reg_token.data[..., 0] += 40.0
    for block in module.blocks:
        block.attn.qkv.weight.data[:32] = 0.0
        block.attn.qkv.bias.data[:32] = 0.0
    module.blocks[1].attn.qkv.bias.data[8] = 30.0  # the query of the second head, its first number
    module.blocks[1].attn.qkv.weight.data[16 + 8, 0] = 1.0  # its key: the coordinate of registers
    return cv.wrap(module, name="registers", classes=("a", "b", "c"))


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


@cache
def found_registers() -> Registers:
    return registers(with_registers(), images(6), progress=False)


def test_one_head_alone_reads_the_registers() -> None:
    found = found_registers()
    assert found.of == "registers"
    assert found.special.sum(axis=1).tolist() == [2] * 6
    assert found.chance == pytest.approx(2 / 12)
    (best, share), *rest = found.readers()
    assert best == "a1.h1"
    assert share > 0.99
    assert [each for _, each in rest] == pytest.approx([2 / 12] * 5)
    assert found.readers("cls")[0] == (best, pytest.approx(share, abs=0.01))


def test_attention_is_what_a_literal_computation_gives() -> None:
    """Shares of attention, weighted by the lengths of values, of one head by hand."""
    found, model = found_registers(), with_registers()
    acts = model.activations(images(6), ["a2.h0.pattern", "a2.h0<v>"], progress=False)
    weight = model.module.blocks[2].attn.proj.weight[:, :8]
    lengths = (acts["a2.h0<v>"] @ weight.T).norm(dim=-1)[:, None]
    pattern, patches, own = acts["a2.h0.pattern"], slice(3, None), slice(1, 3)
    head = found.heads.index("a2.h0")
    for query, rows in enumerate((slice(0, 1), patches)):
        for values, whole in ((found.attention, pattern), (found.weighted, pattern * lengths)):
            share = whole[:, rows, own].sum(dim=-1) / whole[:, rows].sum(dim=-1)
            assert values[head, query] == pytest.approx(float(share.mean()), abs=1e-6)


def test_what_nodes_wrote_makes_up_the_tokens() -> None:
    model = with_registers()
    found = registers(model, images(6), position="resid1", ways=(), progress=False)
    acts = model.activations(images(6), ["resid1", "m0"], progress=False)
    at, wrote = acts["resid1"][:, 1:3], acts["m0"][:, 1:3]
    share = ((wrote * at).sum(-1) / at.square().sum(-1)).mean()
    node = found.nodes.index("m0")
    assert found.pushes[node] == pytest.approx(float(share))
    assert found.written[node, 0] == pytest.approx(float(wrote.norm(dim=-1).mean()))
    assert found.written[node, 1] == pytest.approx(float(acts["m0"][:, 3:].norm(dim=-1).mean()))
    bias = model.module.blocks[0].attn.proj.bias
    constant = float(((bias * at).sum(-1) / at.square().sum(-1)).mean())
    assert np.nansum(found.pushes) + constant == pytest.approx(1.0)
    assert np.isnan(found.pushes[found.nodes.index("m1")])


def test_norms_are_those_of_the_stream() -> None:
    found = found_registers()
    acts = with_registers().activations(images(6), [*found.positions], progress=False)
    for place, name in enumerate(found.positions):
        assert np.allclose(found.norms[:, place], acts[name].norm(dim=-1), rtol=1e-5)


def test_what_breaks_is_what_token_ablations_say() -> None:
    found = found_registers()
    alone = cv.views.tokens.token_ablations(
        with_registers(), images(6), {"registers": "reg"}, site=found.at, progress=False
    )
    assert found.broken is not None
    assert np.allclose(found.broken.outcomes.after, alone.outcomes.after)
    assert registers(with_registers(), images(2), ways=(), progress=False).broken is None


# -- outliers ------------------------------------------------------------------------------------


@cache
def planted() -> cv.Model:
    """`catdog-tiny` with one patch far away from the third position of the stream on."""
    model = cv.load("catdog-tiny")
    direction = torch.randn(64, generator=torch.Generator().manual_seed(1))
    return model.edit({"resid1": cv.add(direction / direction.norm(), scale=2000, tokens="patch(2,3)")})


def test_a_planted_outlier_is_found_and_nothing_else() -> None:
    found = registers(planted(), catdog_pairs(6, seed=0).clean, ways=("zero",), progress=False)
    assert found.of == "outliers"
    assert found.counts[0] == 0
    assert found.counts[1] == 6
    assert found.at == "resid1"
    assert {tuple(np.flatnonzero(row)) for row in found.special} == {(1 + 2 * 6 + 3,)}
    assert found.where[2, 3] == 1
    assert found.where.sum() == 1
    assert found.near[1] == 0
    assert not any("tail" in each for each in found.caveats)
    assert found.broken is not None
    assert found.broken.tokens == ("outliers", "random patches")


def test_the_writer_of_an_outlier_is_found() -> None:
    """An MLP that writes far where a patch is bright: it made the outliers, and those alone."""
    module = made()
    module.patch_embed.proj.weight.data.zero_()
    module.patch_embed.proj.weight.data[0] = 0.03  # the first coordinate is how bright a patch is
    module.blocks[0].attn.proj.weight.data.zero_()
    module.blocks[0].mlp.fc2.weight.data.zero_()
    module.blocks[1].mlp.fc1.weight.data[0] = 0.0
    module.blocks[1].mlp.fc1.weight.data[0, 0] = 10.0
    module.blocks[1].mlp.fc1.bias.data[0] = -30.0
    module.blocks[1].mlp.fc2.weight.data[:, 0] = 100.0 * torch.eye(16)[5]
    model, given = cv.wrap(module, classes=("a", "b", "c")), torch.zeros(5, 3, 12, 12)
    given += 0.01 * images(5)
    for row in range(5):
        given[row, :, 4:8, 4 * (row % 3) : 4 * (row % 3) + 4] = 1.0
    found = registers(model, given, position="resid2", ways=(), progress=False)
    assert [np.flatnonzero(row).tolist() for row in found.special] == [[4 + row % 3] for row in range(5)]
    (best, share), (_, second), *_ = found.writers()
    assert best == "m1"
    assert share > 0.9 > 0.2 > second


def test_a_tail_is_called_one_and_none_is_none() -> None:
    clean = catdog_pairs(6, seed=0).clean
    tail = registers(cv.load("catdog-tiny"), clean, z=3, times=1.02, ways=(), progress=False)
    assert any("a tail" in each for each in tail.caveats)
    none = registers(cv.load("catdog-tiny"), clean, z=100, times=100, progress=False)
    assert none.broken is None
    assert not none.special.any()
    assert np.isnan(none.attention).all()
    assert none.readers() == none.writers() == []
    assert "no patch is an outlier" in none.caveats[0]
    assert none.table() == "0 outliers at resid0, in 0 of 6 images"


def test_batches_do_not_matter() -> None:
    one, other = (
        registers(planted(), catdog_pairs(5, seed=0).clean, ways=(), batch_size=n, progress=False)
        for n in (2, 5)
    )
    assert np.allclose(one.attention, other.attention, atol=1e-6)
    assert np.allclose(one.pushes, other.pushes, equal_nan=True, atol=1e-6)


def test_features_without_classes_or_class_token() -> None:
    module = made(reg_tokens=1, class_token=False, global_pool="avg")
    module.reset_classifier(0)
    found = registers(cv.wrap(module), images(3), metric="similarity", progress=False)
    assert np.isnan(found.attention[:, 0]).all()
    assert found.broken is not None
    assert found.broken.outcomes.kl is None


def test_data_and_figures(tmp_path: Path) -> None:
    found = found_registers()
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert said["heads"][3]["head"] == "a1.h1"
    assert len(said["broken"]["lost"]) == len(found.broken.ways) if found.broken else False
    assert "a1.h1" in found.table()
    assert repr(found) == "Registers(12 registers at resid2 in 6 images)"
    pytest.importorskip("matplotlib")
    text = found.figure().save(tmp_path / "registers.svg").read_text(encoding="utf-8")
    assert all(word in text for word in ("read by", "written by", "threshold", found.writers()[0][0]))
    clean = catdog_pairs(2, seed=0).clean
    none = registers(cv.load("catdog-tiny"), clean, z=99, times=99, progress=False)
    assert "(there are none)" in none.figure().save(tmp_path / "none.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"of": "registers"}, OptionError, "has no registers"),
        ({"of": "sinks"}, NameNotFoundError, "sinks"),
        ({"position": "resid9"}, NameNotFoundError, "resid9"),
        ({"ways": ["drop"]}, NameNotFoundError, "drop"),
        ({"times": 0}, OptionError, "times"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        registers(cv.load("catdog-tiny"), catdog_pairs(2).clean, progress=False, **options)
    with pytest.raises(DataError, match="single image"):
        registers(cv.load("catdog-tiny"), catdog_pairs(1).clean, progress=False)


def test_the_corners_of_a_real_model_are_outliers(shared_data: Path) -> None:
    """ViT-Ti makes the four corners of every photograph outliers, in `m7`; a10 looks there."""
    model = cv.load(
        "vit_tiny_patch16_224", checkpoint=shared_data / "weights" / "vit_tiny_patch16_224.safetensors"
    )
    photos = sorted((shared_data / "images" / "cats_vs_dogs" / "cats").iterdir())[:6]
    found = registers(model, photos, ways=(), progress=False)
    assert found.at == "resid8"
    assert found.where[[0, 0, -1, -1], [0, -1, 0, -1]].min() > 0.8
    assert found.special.sum() <= 4 * 6 + 2
    assert found.near[8] == 0
    assert found.writers()[0][0] == "m7"
    assert found.writers()[0][1] > 0.9
    assert found.readers()[0][0] in ("a10.h0", "a10.h1")
    assert found.readers()[0][1] > 0.6


def test_commands_write_pictures_and_numbers(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    from typer.testing import CliRunner

    from circuitvit.cli.inside import view

    pairs = catdog_pairs(5, seed=0)
    for side, shown in (("clean", pairs.clean), ("corrupt", pairs.corrupt)):
        (tmp_path / side).mkdir()
        for row, image in enumerate((shown.clamp(-1, 1) + 1) * 127.5):
            pillow.fromarray(image.permute(1, 2, 0).byte().numpy()).save(tmp_path / side / f"{row}.png")

    def run(*options: object) -> str:
        result = CliRunner().invoke(view, [str(each) for each in options])
        assert result.exit_code == 0, result.output
        return result.output

    out = tmp_path / "found.json"
    said = run("registers", "--model", "catdog-tiny", tmp_path / "clean", "--z", 3, "--times", 1.02,
               "--ways", "zero", "--out", out)  # fmt: skip
    assert "written by" in said
    assert json.loads(out.read_text())["of"] == "outliers"
    said = run("deciders", "--model", "catdog-tiny", "--clean", tmp_path / "clean", "--corrupt",
               tmp_path / "corrupt", "--target", "cat", "--foil", "dog", "--sites", "mlps",
               "--out", out)  # fmt: skip
    assert "carries over" in said
    assert len(json.loads(out.read_text())["candidates"]) == 4
