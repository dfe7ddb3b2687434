"""Neurons, features and pieces of heads on diagrams and pages: where they stand, what they show."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import OptionError
from circuitvit.export import draw, picture_of, svg_of
from circuitvit.export.examples import EACH, lit
from circuitvit.export.maps import maps_of, thumbnails
from circuitvit.graph import Circuit, Graph, StageNodes
from circuitvit.graph.eap_ig import transformer_graph
from tests.export.cases import random_scores
from tests.export.geometry import Drawing

MODEL = cv.load("catdog-tiny")


@cache
def task() -> cv.Task:
    return cv.Task(*catdog_pairs(2, seed=0), metric=cv.logit_diff("cat", "dog"))


def dictionary(width: int) -> cv.Dictionary:
    """The positive parts of coordinates, doubled: `encode` and `decode` are not each other's transposes."""
    one = torch.eye(width)
    return cv.Dictionary(one, torch.zeros(width), 2 * one, torch.zeros(width), "relu")


@cache
def refined() -> cv.Model:
    """An MLP in features, one in neurons, a head in features, and one by sources."""
    units = {
        "m1": cv.features(dictionary(MODEL.d_model), [0, 5]),
        "a2.h1": cv.features(dictionary(16), [3]),
        "m2": cv.neurons([3, 17]),
    }
    return cv.split_sources(cv.refine_nodes(MODEL, units), halves(), "a2.h3")


def halves() -> cv.TokenGroups:
    """The upper patches with the class token, and the lower ones: another line for each of two images."""
    lower = torch.stack([torch.arange(37) > 18, torch.arange(37) > 24])
    return cv.TokenGroups(("upper", "lower"), lower.long())


def cut_up() -> Graph:
    """A transformer of four layers with an MLP of 30 features after heads of three pieces each."""
    stages = []
    for stage in transformer_graph(4, 3).stages:
        if stage.name == "mlp2":
            names = (*(f"m2.f{number * 97}" for number in range(30)), "m2.rest", "m2.error")
            stage = StageNodes(stage.name, stage.kind, stage.layer, names, names)
        if stage.name == "attn2":
            pieces = tuple(
                f"{head}[{group}]" for head in stage.senders for group in ("cls", "object", "patch")
            )
            feeds = tuple(
                tuple(place for place, piece in enumerate(pieces) if piece[:5] == receiver[:5])
                for receiver in stage.receivers
            )
            stage = StageNodes(stage.name, stage.kind, stage.layer, pieces, stage.receivers, feeds)
        stages.append(stage)
    return Graph(tuple(stages))


@pytest.mark.parametrize("n_edges", [60, 300])
def test_units_stand_side_by_side_and_pieces_above_their_heads(n_edges: int) -> None:
    picture = picture_of(random_scores(cut_up()).connected(n_edges))
    drawing = Drawing(svg_of(picture))
    assert drawing.clashes() == []
    middles = {name: (box.top + box.bottom) / 2 for name, box in drawing.boxes.items()}
    units = [name for name in middles if name.startswith("m2.")]
    pieces = [name for name in middles if "[" in name]
    heads = {name for name in middles if name in ("a2.h0", "a2.h1", "a2.h2")}
    assert len(units) > 5
    assert len(pieces) > 3
    assert heads
    assert len({middles[name] for name in units}) == len({middles[name] for name in pieces}) == 1
    assert middles[units[0]] < middles[pieces[0]] < min(middles[name] for name in heads)
    for name in (*units, *pieces):
        assert name in [words for words, _ in drawing.own_texts[name]]  # whole, not cut
    kinds = {node.name: node.kind for node in picture.nodes}
    assert kinds["m2.f97"] == kinds["m2.rest"] == "mlp"
    assert (kinds["a2.h1[cls]"], kinds["a2.h1"]) == ("part", "head")


def test_heads_keep_their_columns_where_some_are_cut() -> None:
    circuit = Circuit.full(cv.split_sources(MODEL, cv.TokenGroups.by_kind(MODEL, 37), "a1.h1").graph)
    boxes = Drawing(svg_of(picture_of(circuit))).boxes
    assert [boxes[f"a1.h{head}"].left for head in range(4)] == sorted(
        boxes[f"a1.h{head}"].left for head in range(4)
    )


def test_a_unit_shows_its_activation() -> None:
    maps = maps_of(refined(), task(), 1)
    units, image = maps.sides["corrupt"].units, task().corrupt[1:]
    assert set(units) == {"m1.f0", "m1.f5", "a2.h1.f3", "m2.n3", "m2.n17"}
    read = MODEL.activations(image, ["m1", "a2.h1.z", "m2.hidden"], progress=False)
    expected = {
        "m1.f5": read["m1"][0, :, 5].relu(),
        "a2.h1.f3": read["a2.h1.z"][0, :, 3].relu(),
        "m2.n17": read["m2.hidden"][0, :, 17],
    }
    for name, values in expected.items():
        assert np.allclose(units[name], values, atol=1e-5)
    assert {"m1.rest", "m1.error", "a2.h1.error", "m2.rest"} <= set(maps.sides["corrupt"].writes)


def test_a_piece_shows_what_its_head_attends_to_among_its_tokens() -> None:
    """The groups are of each image its own, so that all images are run."""
    for pair, first in ((0, 19), (1, 25)):
        heads = maps_of(refined(), task(), pair).sides["clean"].heads
        whole, lower = heads["a2.h3"], heads["a2.h3[lower]"]
        own = np.arange(37) >= first
        assert np.allclose(whole.pattern.sum(axis=1), 1)
        expected = whole.pattern * own
        assert np.allclose(lower.pattern, expected / expected.sum(axis=1, keepdims=True))
        assert np.allclose(lower.weights, whole.weights * own)
        assert np.allclose(
            whole.scores, maps_of(MODEL, task(), pair).sides["clean"].heads["a2.h3"].scores, atol=1e-4
        )


def test_every_node_that_writes_has_a_thumbnail() -> None:
    assert set(refined().graph.senders) <= set(thumbnails(maps_of(refined(), task())))


def test_a_page_holds_the_top_images_and_the_label_of_a_unit(tmp_path: Path) -> None:
    labels = tuple("an </script> ear" if number == 5 else "" for number in range(MODEL.d_model))
    named = replace(dictionary(MODEL.d_model), labels=labels)
    model = cv.refine_nodes(MODEL, {"m1": cv.features(named, [0, 5])})
    found = cv.top_images(model, catdog_pairs(9, seed=4).clean, "m1.f*", rows=["top"], progress=False)
    circuit = Circuit.from_edges(
        model.graph, ["input->m1.f0", "m1.f0->logits", "input->m1.f5", "m1.f5->logits"]
    )
    page = draw(circuit, tmp_path / "page.html", model=model, task=task(), examples=found).read_text()
    figures = re.findall(r'<figure id="unit-\d+">.*?</figure>', page, re.DOTALL)
    assert {re.search("<b>(.*?)</b>", figure)[1] for figure in figures} == {"m1.f0", "m1.f5"}
    (ears,) = (figure for figure in figures if "m1.f5" in figure)
    assert "an &lt;/script&gt; ear" in ears
    assert "an </script>" not in page
    assert re.findall(r'alt="(.*?): ', ears) == found.names("m1.f5")[:EACH]
    assert len(re.findall('src="data:image/', ears)) == EACH


def test_pictures_are_lit_where_a_unit_is_active() -> None:
    white = np.full((8, 8, 3), 200, dtype=np.uint8)
    shown = lit(white, np.array([[-5.0, 4.0], [2.0, 0.0]], dtype=np.float32))
    assert shown[0, 7, 0] == 200 > shown[7, 0, 0] > shown[0, 0, 0] == shown[7, 7, 0]
    assert (lit(white, np.zeros((2, 2), dtype=np.float32)) == 200).all()


def test_examples_that_fit_nothing_are_refused(tmp_path: Path) -> None:
    found = cv.top_images(MODEL, catdog_pairs(3, seed=4).clean, "m2.hidden[3]", progress=False)
    circuit = Circuit.full(MODEL.graph)
    with pytest.raises(OptionError, match=r"m2.hidden\[3\].*none of these is a node"):
        draw(circuit, tmp_path / "page.html", examples=found)
    with pytest.raises(OptionError, match="on the page"):
        draw(circuit, tmp_path / "page.svg", examples=found)
