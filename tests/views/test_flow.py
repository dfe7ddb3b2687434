"""What crosses between groups of tokens: against raw weights written out, against the edges of split heads,
and on a compiled model whose route is known."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.datasets.catdog import catdog_pairs
from circuitvit.errors import DataError, NameNotFoundError, OptionError
from circuitvit.groundtruth.planted import PATH
from circuitvit.models.timm_import import import_timm
from tests.views.commands import run, save_pictures
from tests.views.literal_vit import embedded, micro, normed

GROUPS = cv.TokenGroups(
    ("cls", "object", "rest"), torch.tensor([[0, 1, 1, 2, 2], [0, 2, 1, 1, 2], [0, 2, 2, 2, 1]])
)


def images(seed: int, count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.manual_seed(seed), dtype=torch.float64)


def tiny(**more: object) -> tuple[cv.Model, nn.Module]:
    model, module = micro(**more)
    return cv.wrap(module.double(), name="micro", preprocessing=model.preprocessing), module


def sides(near: float = 1.0) -> tuple[Tensor, Tensor]:
    """Clean and corrupt images, how far apart they are; in numbers that single precision has."""
    return images(0).float().double(), (images(0) + near * images(1)).float().double()


def question(near: float = 1.0, **more: Any) -> cv.Task:
    options: dict[str, Any] = {"metric": cv.logit_diff(0, 1), "groups": GROUPS, **more}
    return cv.Task(*sides(near), **options)


# -- against what is written out -------------------------------------------------------------------


@torch.no_grad()
def literal(
    module: nn.Module, clean: Tensor, push: Mapping[str, Tensor] = {}
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Logits, and stream before each block, patterns and values; something is added to the stream `before0`
    or, when attention has written, `after0`."""
    x, seen = embedded(module, clean), []
    for layer, block in enumerate(module.blocks):
        x = x + push.get(f"before{layer}", 0)
        qkv = F.linear(normed(block.norm1, x), block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        pattern = (q @ k.transpose(-1, -2) / 6**0.5).softmax(dim=-1)
        seen.append((x, pattern, v))
        z = (pattern @ v).transpose(1, 2).flatten(-2)
        x = x + F.linear(z, block.attn.proj.weight, block.attn.proj.bias) + push.get(f"after{layer}", 0)
        hidden = F.gelu(F.linear(normed(block.norm2, x), block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.linear(normed(module.norm, x)[:, 0], module.head.weight, module.head.bias), seen


def moved(module: nn.Module, own: Any, other: Any, layer: int, head: int, source: int) -> Tensor:
    """What a head writes more in one run than in another, by values of a group."""
    (_, pattern, value), (_, other_pattern, other_value) = own[layer], other[layer]
    there = (GROUPS.members == source)[..., None]
    z = other_pattern[:, head] @ (other_value[:, head] * there) - pattern[:, head] @ (value[:, head] * there)
    return z @ module.blocks[layer].attn.proj.weight[:, head * 6 : head * 6 + 6].T


@pytest.mark.parametrize(("method", "direction"), [("eap", "noising"), ("exact", "denoising")])
def test_what_crosses_is_what_a_push_of_a_head_by_its_sources_does(method: Any, direction: Any) -> None:
    model, module = tiny()
    found = cv.flow(model, question(direction=direction), method=method, heads=True, progress=False)
    clean, corrupt = sides() if direction == "noising" else sides()[::-1]
    base, own = literal(module, clean)
    end, other = literal(module, corrupt)

    def metric(logits: Tensor) -> float:
        return float((logits[:, 0] - logits[:, 1]).mean())

    def effect(place: str, change: Tensor, group: int) -> float:
        there = change * (GROUPS.members == group)[..., None]
        if method == "exact":
            return metric(literal(module, clean, {place: there})[0]) - metric(base)
        up, down = (literal(module, clean, {place: sign * 1e-5 * there})[0] for sign in (1, -1))
        return (metric(up) - metric(down)) / 2e-5

    assert found.effect == pytest.approx(metric(end) - metric(base), abs=1e-12)
    assert found.by_head is not None
    close = partial(pytest.approx, rel=1e-6, abs=1e-8)
    for layer in range(2):
        for source in range(3):
            pieces = [moved(module, own, other, layer, head, source) for head in range(2)]
            for target in range(3):
                assert found.crossing[layer, source, target] == close(
                    effect(f"after{layer}", pieces[0] + pieces[1], target)
                )
                head = (layer + source + target) % 2
                assert found.by_head[2 * layer + head, source, target] == close(
                    effect(f"after{layer}", pieces[head], target)
                )
        for group in range(3):
            change = other[layer][0] - own[layer][0]
            assert found.before[layer, group] == close(effect(f"before{layer}", change, group))


# -- what adds up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["eap", "ceap"])
def test_crossings_are_the_edges_of_split_heads_and_the_balance_those_of_whole_ones(method: Any) -> None:
    model, _ = tiny()
    found = cv.flow(model, question(), method=method, heads=True, steps=5, batch_size=2, progress=False)
    whole = cv.attribute(model, question(), method, progress=False)
    split = cv.attribute(cv.split_sources(model, GROUPS), question(), method, progress=False)
    edges, pieces = whole.values, split.values.sum(axis=1)
    senders, receivers = whole.graph.senders, whole.graph.receivers
    assert found.by_head is not None
    assert found.read is not None
    for number, head in enumerate(found.heads):
        for source, group in enumerate(found.groups):
            mine = pieces[split.graph.senders.index(f"{head}[{group}]")]
            np.testing.assert_allclose(found.by_head[number, source], mine, atol=1e-12)
        own = edges[senders.index(head)].sum(axis=0)
        np.testing.assert_allclose(found.by_head[number].sum(axis=0), own, atol=1e-12)
    for layer in range(2):
        into = [place for place, name in enumerate(receivers) if name.startswith(f"a{layer}.")]
        np.testing.assert_allclose(found.read[layer], edges[:, into].sum(axis=(0, 1)), atol=1e-12)
        mlp = edges[senders.index(f"m{layer}")].sum(axis=0) - edges[:, receivers.index(f"m{layer}")].sum(
            axis=0
        )
        np.testing.assert_allclose(found.worked[layer], mlp, atol=1e-12)
    into_logits = edges[:, receivers.index("logits")].sum(axis=0)
    np.testing.assert_allclose(found.readout, into_logits, atol=1e-12)
    assert found.readout[0] == pytest.approx(found.readout.sum())  # only the class token is read
    entered = (found.crossing.sum(axis=1) - found.read + found.worked).sum(axis=0)
    np.testing.assert_allclose(found.before[0] + entered, found.readout, atol=1e-12)


@pytest.mark.parametrize(
    ("more", "groups"),
    [
        ({}, GROUPS),
        ({"reg_tokens": 2}, ("cls", "reg", "patch")),
        ({"class_token": False, "global_pool": "avg"}, ("patch",)),
        ({"class_token": False, "global_pool": "map"}, ("patch", "pool")),
        ({"block_fn": import_timm().models.vision_transformer.ParallelScalingBlock}, ("cls", "patch")),
    ],
    ids=["objects", "registers", "mean", "pool", "parallel"],
)
def test_by_conductance_no_cut_loses_anything(more: dict[str, Any], groups: Any) -> None:
    model, _ = tiny(**more)
    known = isinstance(groups, cv.TokenGroups)
    task = question(near=0.1, groups=groups if known else None)
    found = cv.flow(model, task, steps=6, progress=False)
    assert found.groups == (groups.names if known else groups)
    assert np.abs(found.unexplained).max() < 2e-3
    assert found.read is not None
    unit = abs(found.effect)
    if "block_fn" not in more:  # a parallel block reads for its MLP, too
        np.testing.assert_allclose(found.crossing.sum(axis=(1, 2)), found.read.sum(axis=1), atol=2e-3 * unit)
        assert np.abs(found.worked).max() < 2e-3 * unit
    if found.layers[-1] == "pool":
        assert found.share("pool").tolist() == pytest.approx([0, 0, 0, 1], abs=2e-3)


def test_the_batch_does_not_matter() -> None:
    model, _ = tiny()
    for method in ("ceap", "exact"):
        one, all_ = (
            cv.flow(model, question(), method=method, batch_size=size, progress=False) for size in (1, 3)
        )
        np.testing.assert_allclose(one.crossing, all_.crossing, atol=1e-12)
        np.testing.assert_allclose(one.held, all_.held, atol=1e-12)


# -- a route that is known ---------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "direction"), [("ceap", "noising"), ("exact", "denoising")])
def test_the_paths_of_a_compiled_model_are_found_and_nothing_else(method: Any, direction: Any) -> None:
    """The colour goes from A to B, and from B to the class token; the shape from C to it at once."""
    path = cv.compiled("path", dtype=torch.float64)
    members = torch.full((10,), 4)
    members[0] = 0
    members[[1 + PATH[name] for name in "ABC"]] = torch.arange(1, 4)
    groups = cv.TokenGroups(("cls", "A", "B", "C", "rest"), members)
    for change, crossings in {
        "colour": {("layer 0", "A", "B"), ("layer 1", "B", "cls")},
        "shape": {("layer 0", "C", "cls")},
    }.items():
        sides = path.pairs(2, change=change)
        task = cv.Task(*sides, cv.logit_diff("yes", "no"), groups=groups, direction=direction)
        found = cv.flow(path.model, task, method=method, steps=4, progress=False)
        least = 1e-9 if method == "exact" else 0.03 * abs(found.effect)  # saturated softmax has some slope
        strong = [each for each in found.strongest(9) if abs(each[3]) > least]
        assert {each[:3] for each in strong} == crossings
        assert all(found.sign * each[3] > 0 for each in strong)
        sizes = [each[3] / found.effect for each in strong]
        assert sizes == pytest.approx([1.0] * len(strong), abs=1e-9 if method == "exact" else 0.03)


# -- what is shown, and what is refused --------------------------------------------------------------


def test_figure_and_animation(tmp_path: Path) -> None:
    model, _ = tiny()
    found = cv.flow(model, question(), method="eap", progress=False)
    text = found.figure().save(tmp_path / "flow.svg").read_text(encoding="utf-8")
    assert "object" in text
    assert f"of {found.effect:+.3g} in all" in text
    with Image.open(found.film(tmp_path / "flow.gif")) as film:
        assert film.n_frames == 3
    with pytest.raises(OptionError, match="first 9 of 2 layers"):
        found.figure(upto=9)
    with pytest.raises(OptionError, match=r"saved as \.gif"):
        found.film(tmp_path / "flow.mp4")
    with pytest.raises(NameNotFoundError, match="dog"):
        found.share("dog")


def test_command(tmp_path: Path) -> None:
    pairs = catdog_pairs(2, seed=0)
    clean, corrupt = (
        save_pictures(tmp_path / name, side / 2 + 0.5)
        for name, side in (("cats", pairs.clean), ("dogs", pairs.corrupt))
    )
    said = run(
        "flow", "--model", "catdog-tiny", "--clean", clean, "--corrupt", corrupt, "--target", "cat",
        "--foil", "dog", "--method", "eap", "--heads", "--out", tmp_path / "flow.json",
    )  # fmt: skip
    assert "patch -> cls" in said
    assert "readout" in said
    found = cv.views.Flow.load(tmp_path / "flow.json")
    assert found.method == "eap"
    assert len(found.heads) == 16


def test_what_makes_no_sense_is_refused() -> None:
    model, _ = tiny()
    with pytest.raises(NameNotFoundError, match="conductance"):
        cv.flow(model, question(), method="conductance")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="what two images of a pair differ in"):
        cv.flow(model, question(ablation="zero"))
    with pytest.raises(OptionError, match="without token groups"):
        cv.flow(model, question(groups=None).prepare(model))
    with pytest.raises(OptionError, match="keeps its token groups"):
        cv.flow(model, question().prepare(model), GROUPS)
    drawn = catdog_pairs(1, seed=0)
    task = cv.Task(drawn.clean, drawn.corrupt, cv.logit_diff("cat", "dog"), groups="token")
    found = cv.flow(cv.load("catdog-tiny"), task, method="eap", progress=False)
    with pytest.raises(OptionError, match="8 groups apart, not 37"):
        found.figure()


def test_rings_go_around_every_image_of_its_own() -> None:
    model = cv.load("catdog-tiny")
    masks = torch.zeros(2, 48, 48, dtype=torch.bool)
    masks[0, :8, :8] = masks[1, 16:24, 16:24] = True
    found = cv.TokenGroups.rings(model, masks, count=2, name="dot")
    assert found.names == ("cls", "dot", "ring1", "ring2", "far")
    corner, middle = found.members[:, 1:].unflatten(1, (6, 6))
    rows, columns = np.indices((6, 6))
    for grid, at in ((corner, 0), (middle, 2)):
        away = np.maximum(abs(rows - at), abs(columns - at)).clip(max=3)
        np.testing.assert_array_equal(grid, away + 1)
    with pytest.raises(DataError, match="covers no patch"):
        cv.TokenGroups.rings(model, masks & (torch.arange(2) > 0)[:, None, None])
    with pytest.raises(OptionError, match="lies around"):
        cv.TokenGroups.rings(model, masks, name="ring1")
