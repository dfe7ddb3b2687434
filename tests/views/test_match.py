"""`match` and `universality`: against plain loops, and where the right answer is known."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvit as cv
from circuitvit.engine import Evaluator
from circuitvit.errors import CircuitViTError, OptionError
from circuitvit.tasks import prepare
from circuitvit.views import likeness
from tests.reference.literal_likeness import by_image
from tests.reference.literal_likeness import likeness as literal
from tests.reference.literal_vit import LiteralViT
from tests.strategies import CHANNELS, PATCH, Recipe

FIRST = Recipe(depth=2, heads=3, width=4, norm="rms", seed=1)


@cache
def wrapped(recipe: Recipe) -> cv.Model:
    return cv.wrap(recipe.build())


def images(n: int = 16, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, CHANNELS, 2 * PATCH, 2 * PATCH, generator=draw).double()


def disguised(module: Any, order: list[list[int]], seed: int = 3) -> Any:
    """The same function with the heads of each layer in another order and the residual stream rotated.

    The norms are of the root-mean-square kind, whose weights become 1 first, as they point along axes.
    """
    with torch.no_grad():
        twin = FIRST.build()
        width = twin.cls_token.shape[-1]
        draw = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=draw))[0]
        for name in ("cls_token", "pos_embed"):
            getattr(twin, name).copy_(getattr(module, name) @ turn)
        _writes(twin.patch_embed.proj, module.patch_embed.proj, turn)
        _reads(twin.head, module.head, turn)
        for mine, theirs, heads in zip(twin.blocks, module.blocks, order, strict=True):
            size = theirs.attn.head_dim
            rows = torch.cat([torch.arange(size) + size * head for head in heads])
            _reads(mine.attn.qkv, theirs.attn.qkv, turn)
            for each in (mine.attn.qkv.weight, mine.attn.qkv.bias):
                each.copy_(each.unflatten(0, (3, -1))[:, rows].flatten(0, 1))
            _writes(mine.attn.proj, theirs.attn.proj, turn)
            mine.attn.proj.weight.copy_(mine.attn.proj.weight[:, rows])
            _reads(mine.mlp.fc1, theirs.mlp.fc1, turn)
            _writes(mine.mlp.fc2, theirs.mlp.fc2, turn)
    return _plain_norms(twin)


def _reads(mine: Any, theirs: Any, turn: Tensor) -> None:
    mine.weight.copy_(theirs.weight @ turn)
    mine.bias.copy_(theirs.bias)


def _writes(mine: Any, theirs: Any, turn: Tensor) -> None:
    mine.weight.copy_((turn.T @ theirs.weight.flatten(1)).view_as(theirs.weight))
    mine.bias.copy_(turn.T @ theirs.bias)


def _plain_norms(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, each in module.named_parameters():
            if "norm" in name:
                each.fill_(1.0)
    return module


def test_similarity_is_that_of_plain_loops() -> None:
    other = Recipe(depth=1, heads=2, width=8, registers=2, norm="layer", seed=2)
    pooled = replace(other, pool="avg", registers=0, class_token=False)
    given = images(10)
    for recipe, read in ((other, [0]), (pooled, [0, 1, 2, 3])):
        found = cv.match(wrapped(FIRST), wrapped(recipe), given, draws=3, halves=2, progress=False)
        again = cv.match(
            wrapped(FIRST), wrapped(recipe), given, draws=3, halves=2, batch_size=5, progress=False
        )
        np.testing.assert_allclose(found.p, again.p)
        np.testing.assert_allclose(found.low, again.low)
        sides = []
        for each, first in ((FIRST, [0]), (recipe, read)):
            outputs = LiteralViT(each.build()).run(given).outputs
            last = f"a{each.depth - 1}.", f"m{each.depth - 1}"  # from here on only `first` is read
            sides.append({
                name: by_image(
                    written, first,
                    [] if name.startswith(last) else [n for n in range(written.shape[1]) if n not in first],
                )
                for name, written in outputs.items()
            })  # fmt: skip
        for row, node in enumerate(found.nodes):
            for column, partner in enumerate(found.others):
                if node[0] == partner[0]:
                    expected = literal(sides[0][node], sides[1][partner])
                    assert found.similarity[row, column] == pytest.approx(expected, abs=1e-9)
                else:
                    assert np.isnan(found.similarity[row, column])


def test_a_model_in_disguise_is_seen_through() -> None:
    """Heads in another order, every weight in another basis: the same model, and the match knows."""
    module = _plain_norms(FIRST.build())
    order = [[2, 0, 1], [1, 0, 2]]
    model, twin = cv.wrap(module), cv.wrap(disguised(module, order))
    given = images()
    assert torch.allclose(model(given), twin(given))
    found = cv.match(model, twin, given, draws=39, halves=10, progress=False)
    expected = {f"a{layer}.h{head}": f"a{layer}.h{place}" for layer, heads in enumerate(order)
                for place, head in enumerate(heads)}  # fmt: skip
    assert found.pairs == {**expected, "m0": "m0", "m1": "m1"}
    partners = found.similarity[np.arange(len(found.nodes)), found.partner]
    np.testing.assert_allclose(partners, 1.0)
    heads = np.array([name.startswith("a") for name in found.nodes])
    assert found.p[heads] == pytest.approx(1 / 40)  # as small as 39 draws allow
    assert np.isnan(found.p[~heads]).all()  # an MLP has its layer to itself
    assert (found.held == 1).all()

    task = cv.Task(images(8, seed=1), images(8, seed=2), metric=cv.logit(0))
    for groups in (None, cv.TokenGroups.by_kind(model, model.n_tokens)):
        asked = task if groups is None else task.with_options(groups=groups)
        runs = [Evaluator(prepare(each, asked)) for each in (model, twin)]
        kept = np.random.default_rng(0).random(runs[0].graph.shape) < 0.6
        circuit = cv.Circuit(runs[0].graph, kept)
        carried = found.transfer(circuit)
        assert len(carried) == len(circuit)
        np.testing.assert_allclose(runs[1].values(carried), runs[0].values(circuit), rtol=1e-9)


def test_of_unrelated_heads_as_many_are_called_alike_as_the_level_says() -> None:
    """Values and outputs at random over images that both see: alike far beyond 0, and by chance."""
    rng = np.random.default_rng(5)
    alarms, alike = [], []
    for _ in range(100):
        seen = rng.normal(size=(14, 1, 6)) + 0.5 * rng.normal(size=(14, 5, 6))
        sides = []
        for _ in "ab":
            looks = rng.exponential(size=(3, 14, 2, 5)) ** 3
            values, outputs = seen @ rng.normal(size=(3, 1, 6, 2)), rng.normal(size=(3, 2, 8))
            mixed = [[look @ each for each in values] for look in looks]
            written = [row[head] @ outputs[head] for head, row in enumerate(mixed)]
            sides.append(written)
        layer = likeness.Layer.of(range(3), mixed, list(outputs), written)
        assert layer is not None
        kernels = [np.stack([likeness.kernel(each) for each in side]) for side in sides]
        own, others = map(likeness.centred, kernels)
        found = likeness.of_partners(own @ others.T, likeness.assign(own @ others.T))
        drawn = likeness.by_chance(own, kernels[1], [layer], 19, rng)
        alarms.append(likeness.beyond_chance(found, drawn).min() <= 0.05)
        alike.append(found.mean())
    assert np.mean(alike) > 0.1  # unrelated nodes would be at 0
    assert 0.01 <= np.mean(alarms) <= 0.1


def test_how_much_stands_in_the_other_model() -> None:
    """A circuit that is the other's own has all of it; edges that are lost are not counted as carried."""
    model, other = wrapped(FIRST), wrapped(replace(FIRST, seed=4))
    found = cv.match(model, other, images(), draws=0, halves=2, progress=False)
    ranked = images(40, seed=1)[other(images(40, seed=1))[:, 0].argsort()]
    task = cv.Task(ranked[-8:], ranked[:8], metric=cv.logit(0))
    circuit = cv.attribute(model, task, "eap", progress=False).connected(24)
    own = cv.attribute(other, task, "eap", progress=False).connected(24)
    stands = cv.universality(found, circuit, other, task, own, n_random=5, progress=False)
    run = Evaluator(prepare(other, task))
    drawn = cv.verification.connected_circuits(stands.carried, 5)
    floor = np.mean([run.values(each) for each in drawn], axis=0)
    expected = (run.values(stands.carried) - floor).mean() / (run.values(stands.own) - floor).mean()
    assert stands.carried == found.transfer(circuit).pruned()
    assert stands.faithfulness.value == pytest.approx(run.faithfulness(stands.carried))
    assert stands.edges_shared.value == pytest.approx(stands.carried.jaccard(own.pruned()))
    if stands.universality is not None:
        assert stands.universality.value == pytest.approx(expected)
    with pytest.raises(CircuitViTError, match="other weights than the model that was matched"):
        cv.universality(found, circuit, model, task, own, progress=False)


def test_the_figure_names_nodes_and_says_what_is_bold(tmp_path: Path) -> None:
    found = cv.match(wrapped(FIRST), wrapped(FIRST), images(), draws=3, halves=2, progress=False)
    said = found.figure().save(tmp_path / "match.svg").read_text()
    assert all(name in said for name in (*found.nodes, "heads", "MLPs", "beyond chance"))
    assert "6 of 6 heads have a partner, similarity 1.00" in str(found)


def test_what_cannot_be_matched_is_refused_by_name() -> None:
    model, catdog = wrapped(FIRST), cv.load("catdog-tiny")
    for first, other, given, said in (
        (model, "catdog-tiny", images(), "str is no model of circuitvit"),
        (model, model, images(9), "give 10 or more"),
        (model, model, images(9).repeat(2, 1, 1, 1), "of 18 images only 9 differ"),
        (model, wrapped(replace(FIRST, grid=(2, 3))), images(), "prepare images differently"),
        (catdog, cv.load("clip-tiny").text(), images(), "no inputs are for both"),
        (cv.refine_nodes(catdog, {"m1": cv.neurons([3])}), catdog, images(), "the model that was cut"),
    ):
        with pytest.raises(CircuitViTError, match=said):
            cv.match(first, other, given, progress=False)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="takes what match"):
        cv.universality(model, [], model, None, [])  # type: ignore[arg-type]
