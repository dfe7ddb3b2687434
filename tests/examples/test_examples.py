"""Every script in `examples/` runs, offline and in seconds, and shows what it says it shows; and every
measurement of `bench/`, which takes too long to be run here, has at least what it imports."""

from __future__ import annotations

import json
import runpy
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import circuitvit as cv
from bench.__main__ import NAMES
from circuitvit.models import registry

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
README_PICTURE = EXAMPLES.parent / "docs" / "images" / "cat_dog.svg"
LARGEST_PICTURE = 150_000  # bytes


def load(name: str) -> Callable[..., Any]:
    """The `main` of an example, as a user would run it."""
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]  # type: ignore[no-any-return]


def test_every_example_is_tested_here() -> None:
    here = Path(__file__).read_text(encoding="utf-8")
    for script in EXAMPLES.glob("*.py"):
        assert f'load("{script.stem}")' in here, f"add a test for {script.name}"


@pytest.mark.parametrize("name", NAMES)
def test_a_measurement_has_what_it_imports(name: str) -> None:
    assert callable(import_module(f"bench.{name}").main)


def test_first_circuit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = load("first_circuit")(tmp_path / "out")
    assert report.headline.images == "held-out"
    assert 0.9 < report.headline.faithfulness.value < 1.1
    assert report.headline.random.p_value < 0.05  # connected circuits that share its edges keep a third of it
    circuit = cv.Circuit.load(tmp_path / "out" / "circuit.json")
    assert len(circuit) <= 80
    assert circuit.pruned() == circuit
    saved = {"circuit.json", "circuit.svg", "report.md", "scores.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == saved
    assert "m3->logits" in capsys.readouterr().out


def test_compare_methods(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row.method: row for row in load("compare_methods")(pairs=8)}
    assert set(rows) == {*cv.METHODS, "acdc", "learned mask", "find"}
    assert rows["exact"].correlation == pytest.approx(1.0)
    estimates = [row for name, row in rows.items() if name not in ("ifr", "random")]
    assert all(0.3 < row.correlation <= 1.0 + 1e-9 for row in estimates if row.correlation is not None)
    assert max(abs(rows[name].correlation or 0.0) for name in ("ifr", "random")) < 0.3
    assert all(0 < row.edges <= 479 for row in rows.values())
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)


def test_own_images(tmp_path: Path) -> None:
    report = load("own_images")(tmp_path)
    assert report.headline.n_pairs == 32
    assert report.headline.pairs[3].clean == "03.png"
    assert 0.85 < report.headline.faithfulness.value < 1.15


def test_verify_hypothesis() -> None:
    left = load("verify_hypothesis")(pairs=32)
    assert left["nothing"] == 1.0
    assert left["all that the head hears"] < 0.95
    assert left["its query"] > 0.98  # what the asking token holds does not matter
    assert left["its values at the class token"] > 0.98
    assert left["its values at patches"] == pytest.approx(left["its values"], abs=0.02)
    assert left["all that the bystander hears"] > 0.98


def test_draw_readme_picture(tmp_path: Path) -> None:
    report = load("draw_readme_picture")(tmp_path / "picture.svg", pairs=16)
    assert report.size.density < 0.15
    assert 0.7 < report.headline.faithfulness.value < 1.3  # few pairs, to be fast
    check_picture(tmp_path / "picture.svg", report.size.edges)


def test_the_readme_shows_the_picture_that_the_example_draws() -> None:
    assert "docs/images/cat_dog.svg" in (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    check_picture(README_PICTURE)


def check_picture(path: Path, edges: int | None = None) -> None:
    """A well-formed SVG of moderate size, whose title says how many edges it shows."""
    assert path.stat().st_size < LARGEST_PICTURE
    root = ElementTree.parse(path).getroot()
    assert root.tag.endswith("svg")
    title = next(element.text or "" for element in root.iter() if element.tag.endswith("title"))
    assert "of 479 edges" in title
    if edges is not None:
        assert f"{edges} of 479 edges" in title


def test_video_circuit(tmp_path: Path) -> None:
    circuit = load("video_circuit")(tmp_path, steps=60)
    assert circuit.graph.groups == ("frame0", "frame1", "frame2", "frame3")
    assert 0 < len(circuit) <= 40
    assert {path.name for path in tmp_path.iterdir()} == {"circuit.svg", "lens.png"}


def test_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "FAMILIES", dict(registry.FAMILIES))  # it registers a class of its own
    circuit = load("own_model")(steps=60)
    assert circuit.graph.n_edges == 110
    assert 0 < len(circuit) <= 30


class TestConvertingPrismaSAEs:
    """A state dict and a configuration as ViT-Prisma saves them."""

    CONFIG: ClassVar[dict[str, Any]] = {
        "architecture": "standard",
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "normalize_activations": "none",
        "d_in": 4,
        "hook_point_layer": 9,
        "layer_subtype": "hook_mlp_out",
        "hook_point_head_index": None,
    }

    @staticmethod
    def tensors() -> dict[str, torch.Tensor]:
        shapes = {"W_enc": (4, 7), "b_enc": (7,), "W_dec": (7, 4), "b_dec": (4,)}
        drawn = torch.Generator().manual_seed(0)
        return {name: torch.randn(*shape, generator=drawn) for name, shape in shapes.items()}

    def convert(self, folder: Path, content: Any, **changed: Any) -> cv.Dictionary:
        torch.save(content, folder / "weights.pt")
        (folder / "config.json").write_text(json.dumps({**self.CONFIG, **changed}))
        names = ("weights.pt", "config.json", "out.safetensors")
        load("convert_prisma_sae")(*(folder / name for name in names))
        return cv.load_dictionary(folder / "out.safetensors")

    def test_an_autoencoder(self, tmp_path: Path) -> None:
        own, x = self.tensors(), torch.randn(3, 4)
        features = ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]).relu()
        found = self.convert(tmp_path, {"state_dict": own})
        assert torch.allclose(found.encode(x), features, atol=1e-6)
        assert torch.allclose(found.decode(features), features @ own["W_dec"] + own["b_dec"], atol=1e-6)
        assert (found.site, found.reads) == ("m9", "output")

    def test_a_transcoder_has_a_bias_on_either_side(self, tmp_path: Path) -> None:
        own, x = {**self.tensors(), "b_dec_out": torch.ones(4)}, torch.randn(3, 4)
        topk = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2}}
        out = {"is_transcoder": True, "out_hook_point_layer": 9, "layer_out_subtype": "hook_mlp_out"}
        found = self.convert(tmp_path, own, **topk, **out)
        kept = ((x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]).topk(2, dim=-1)
        features = torch.zeros(3, 7).scatter(-1, kept.indices, kept.values.relu())
        assert torch.allclose(found.encode(x), features, atol=1e-6)
        assert torch.allclose(found.decode(features), features @ own["W_dec"] + 1, atol=1e-6)
        assert (found.site, found.reads) == ("m9", "input")

    def test_a_file_that_would_run_code_is_not_opened(self, tmp_path: Path) -> None:
        content = {"cfg": SimpleNamespace(d_in=4), "state_dict": self.tensors()}
        with pytest.raises(SystemExit, match=r"would run types\.SimpleNamespace.*save it again"):
            self.convert(tmp_path, content)

    def test_what_cannot_be_folded_is_said(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit, match=r"weights\.pt cannot be converted: activation_fn 'tanh-relu'"):
            self.convert(tmp_path, self.tensors(), activation_fn_str="tanh-relu")
