"""Figures: drawn without pyplot, the same every time, and inert whatever names say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit import views
from circuitvit.errors import FileError, OptionError
from circuitvit.graph import EdgeScores
from circuitvit.graph.eap_ig import transformer_graph
from circuitvit.views.canvas import Picture, drawable, even_norm, grey, label
from tests.strategies import Recipe

HOSTILE = ("<script>alert(1)</script>", "a\"b'c&d $x^2$ \\frac", "x\n\u202ey" + 200 * "z")


def all_figures() -> dict[str, Picture]:
    """One of each, of a tiny model whose classes have hostile names."""
    recipe = Recipe(depth=2, heads=2, grid=(3, 3))
    model = cv.wrap(recipe.build(), classes=HOSTILE)
    images = recipe.images(3)
    lens = views.logit_lens(model, images)
    patterns = views.attention_patterns(model, images)
    evidence = views.patch_evidence(model, images, 0, 1)
    graph = transformer_graph(2, 4)
    scores = EdgeScores(graph, np.random.default_rng(0).standard_normal(graph.shape), method=HOSTILE[0])
    mask = np.zeros((3, 6, 6), dtype=bool)
    mask[:, :3] = True
    curve = views.faithfulness_curve([(1, 0.0, -0.1, 0.1), (50, 0.9, 0.8, 1.0)], HOSTILE[1])
    return {
        "attribution": views.direct_logit_attribution(model, images, 0, 2).figure(),
        "attribution-one": views.direct_logit_attribution(model, images, 0).figure(1, picture=False, heads=0),
        "lens": lens.figure(),
        "lens-symbols": lens.figure(1, symbols={0: HOSTILE[0], 1: "\N{DOG FACE}"}, picture=False),
        "lens-curve": lens.curve_figure(),
        "attention": patterns.figure(query=(1, 1)),
        "attention-one": patterns.figure(1, kinds=("weighted",), picture=False),
        "positions": views.position_heads(model, images).figure(at_least=-9.0),
        "evidence": evidence.figure(),
        "evidence-masks": evidence.figure(masks=mask, threshold=0.0, smooth=False),
        "heatmap": views.effect_heatmap(scores).figure(),
        "heatmap-sizes": views.effect_heatmap(scores, "magnitude").figure(title="sizes"),
        "curve": curve.figure(),
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, Picture]:
    return all_figures()


@pytest.fixture(scope="module")
def saved(figures: dict[str, Picture], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each figure as SVG, which is the quickest to write and can be read."""
    folder = tmp_path_factory.mktemp("figures")
    return {name: figure.save(folder / f"{name}.svg") for name, figure in figures.items()}


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_figure_is_saved_in_every_format_and_the_same_each_time(
    kind: str, start: bytes, figures: dict[str, Picture], tmp_path: Path
) -> None:
    """Of one with pictures, maps and emoji: what writes a format does not know which view it writes."""
    first, second = (
        figures["lens-symbols"].save(tmp_path / f"{place}.{kind}").read_bytes() for place in range(2)
    )
    assert first.startswith(start)
    assert first == second


def test_the_same_view_gives_the_same_bytes(saved: dict[str, Path], tmp_path: Path) -> None:
    again = all_figures()
    for name, figure in again.items():
        assert figure.save(tmp_path / f"{name}.svg").read_bytes() == saved[name].read_bytes(), name


def test_names_are_text_and_nothing_else(saved: dict[str, Path]) -> None:
    for path in saved.values():
        tree = ElementTree.parse(path)
        tags = {element.tag.rpartition("}")[2] for element in tree.iter()}
        assert "script" not in tags
        text = "".join(tree.getroot().itertext())
        assert "\u202e" not in text
        assert "z" * 120 not in text


def test_names_that_a_user_gives_to_what_is_asked_are_text_too(tmp_path: Path) -> None:
    """Classes, labels, factors and sets of tokens."""
    recipe = Recipe(depth=1, heads=2, grid=(2, 2))
    model, images = cv.wrap(recipe.build(), classes=HOSTILE), recipe.images(20)
    options: dict[str, Any] = {"progress": False}
    factors = {name: np.arange(20) // 2**place % 2 for place, name in enumerate(HOSTILE)}
    width = model.sites("resid1")[0].shape[1]
    push = torch.ones(width, dtype=torch.float64)
    figures = (
        views.token_ablations(model, images, dict.fromkeys(HOSTILE, 0.5), **options).figure(),
        views.steer(model, images, push, "resid1", metric=cv.logit(HOSTILE[2]), **options).figure(),
        views.linear_probes(model, images, [*HOSTILE[1:]] * 10, "resid1", tokens="patch", **options).figure(),
        views.disentanglement(model, images, factors, trees=0, **options).figure(),
        views.feature_visualisation(model, "logits", unit=HOSTILE[2], count=1, steps=1, **options).figure(),
    )
    for figure in figures:
        tree = ElementTree.parse(figure.save(tmp_path / "figure.svg"))
        assert "script" not in {element.tag.rpartition("}")[2] for element in tree.iter()}
        text = "".join(tree.getroot().itertext())
        assert "x y" in text
        assert "\u202e" not in text
        assert "z" * 120 not in text


def test_drawing_leaves_no_trace_in_matplotlib() -> None:
    code = """
import sys
import circuitvit as cv, circuitvit.views
assert "matplotlib" not in sys.modules, "imported before any figure"
from circuitvit.views import faithfulness_curve
import matplotlib
settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != "backend"}
before = settings()
faithfulness_curve([(1, 0.5), (2, 1.0)]).figure()._repr_png_()
assert settings() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_notebook_shows_a_figure(figures: dict[str, Picture]) -> None:
    assert figures["curve"]._repr_png_().startswith(b"\x89PNG")


def test_a_figure_that_cannot_be_saved_says_why(figures: dict[str, Picture], tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"saved as \.png, \.svg, \.pdf"):
        figures["curve"].save(tmp_path / "curve.bmp")
    with pytest.raises(FileError, match="there is no folder"):
        figures["curve"].save(tmp_path / "nowhere" / "curve.png")


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "circuitvit.views.canvas", raising=False)
    monkeypatch.delattr(views, "canvas", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FileError, match=r"pip install circuitvit\[plots\]"):
        views.faithfulness_curve([(1, 0.5)]).figure()


def test_figures_of_nothing_are_refused() -> None:
    recipe = Recipe(depth=1, heads=2)
    model = cv.wrap(recipe.build())
    images = recipe.images(2)
    with pytest.raises(OptionError, match="no head goes by position"):
        views.position_heads(model, images).figure(at_least=1.5)
    with pytest.raises(OptionError, match="there is no image 2"):
        views.logit_lens(model, images).figure(2)
    with pytest.raises(OptionError, match="there is no image -3"):
        views.direct_logit_attribution(model, images, 0, 1).figure(-3)
    mask = np.zeros((2, 9, 9), dtype=bool)
    mask[:, 0] = True
    with pytest.raises(OptionError, match="cannot be drawn over pictures"):
        views.patch_evidence(model, images, 0).figure(masks=mask)


def test_colours_are_centred_and_pictures_pale() -> None:
    norm = even_norm(np.array([np.nan, -1.0, 4.0]))
    assert (norm.vmin, norm.vmax) == (-4.0, 4.0)
    assert float(norm(0.0)) == 0.5
    assert even_norm(np.zeros(3)).vmax == 1.0
    pale = grey(np.zeros((2, 2, 3), dtype=np.uint8), 0.75)
    assert np.allclose(pale, 0.25)
    assert drawable("cat")
    assert not drawable("\N{DOG FACE}")
    assert label("a\tb" + 50 * "c", 6) == "a bcc…"


def test_grey_and_two_channel_images_have_pictures() -> None:
    recipe = Recipe()
    view = views.logit_lens(cv.wrap(recipe.build()), torch.zeros(1, 2, 4, 4))
    assert view.subjects.pictures.shape == (1, 4, 4, 3)
    assert view.subjects.pictures.dtype == np.uint8
    assert matplotlib.__version__
