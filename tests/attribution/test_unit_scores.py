"""Scores of neurons and features: the literal definition, their sums, and what they refuse."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import circuitvit as cv
from circuitvit.errors import NameNotFoundError, OptionError, UnsupportedModelError
from tests import families
from tests.reference.literal_units import Tapped, mean_of
from tests.strategies import Case, Recipe, assert_same_scores, cases


def dictionary(width: int, features: int = 5, reads: Any = "output", seed: int = 0) -> cv.Dictionary:
    generator = torch.Generator().manual_seed(seed)
    encoder, decoder = torch.randn(2, features, width, generator=generator, dtype=torch.float64)
    offset = torch.randn(features, generator=generator, dtype=torch.float64)
    bias = torch.randn(width, generator=generator, dtype=torch.float64)
    return cv.Dictionary(encoder, offset, decoder, bias, "relu", reads=reads)


@dataclass(frozen=True)
class Literal:
    """A case with a dictionary on a head, one on a stream, one on an MLP; the other MLPs are neurons."""

    case: Case

    @property
    def units(self) -> dict[str, Any]:
        recipe = self.case.recipe
        width = recipe.width * recipe.heads if recipe.d_head is None else recipe.width
        head = recipe.width if recipe.d_head is None else recipe.d_head
        last = dictionary(width, reads="input" if recipe.seed % 2 else "output")
        rebuilt: dict[str, Any] = {"a0.h0": dictionary(head), "resid1": dictionary(width, seed=1)}
        return (
            {"m*": cv.neurons(), **rebuilt}
            if recipe.depth == 1
            else {"m*": cv.neurons(), **rebuilt, "m0": last}
        )

    @property
    def tapped(self) -> Tapped:
        vit, recipe = self.case.module, self.case.recipe
        head = recipe.width if recipe.d_head is None else recipe.d_head
        places: dict[str, Any] = {"resid0": (vit.blocks[0], None)}
        places["a0.h0"] = (vit.blocks[0].attn.proj, slice(0, head))
        after = vit.blocks[1] if recipe.depth > 1 else vit.norm
        places["resid1"] = (after, None)
        for layer, block in enumerate(vit.blocks):
            places[f"m{layer}.in"] = (block.mlp, None)
            places[f"m{layer}.hidden"] = families.last_linear(block.mlp)
            places[f"m{layer}"] = (block.drop_path2, None)
        return Tapped(vit, places)

    def parts(self, name: str, given: Any, values: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, str]:
        """Units, directions at the place that is written, what is written without any, and their letter."""
        if isinstance(given, cv.models.Units):
            layer, hidden = int(name[1:]), values[f"{name}.hidden"]
            block, (reader, _) = (
                self.case.module.blocks[layer],
                families.last_linear(self.case.module.blocks[layer].mlp),
            )
            with torch.no_grad():
                rest = block.ls2(reader(torch.zeros_like(hidden[:1, :1])))
                each = torch.eye(hidden.shape[-1], dtype=torch.float64)[:, None]
                return hidden, (block.ls2(reader(each)) - rest)[:, 0], rest, "n"
        read = values[f"{name}.in" if given.reads == "input" else name]
        return torch.relu(read @ given.encoder.T + given.offset), given.decoder, given.bias, "f"

    def scores(self, method: str) -> dict[str, float]:
        case, tapped = self.case, self.tapped
        base, other = tapped.values(case.base), tapped.values(case.paired)
        both = {name: torch.cat([base[name], other[name]]) for name in base}
        groups = case.token_groups
        inside = [1.0] if groups is None else [groups.inside(g, len(case.base)) for g in range(3)]
        slopes = tapped.slopes(case.base, case.formula)

        def reference(own: Tensor, others: Tensor, of_both: Tensor) -> Tensor:
            if case.ablation == "patch":
                return others
            return own * 0 if case.ablation == "zero" else mean_of(of_both, case.ablation == "mean")

        if method == "eap-ig":
            moved = reference(base["resid0"], other["resid0"], both["resid0"]) - base["resid0"]
            steps = [tapped.slopes(case.base, case.formula, {"resid0": moved * at}) for at in (0.25, 0.75)]
            slopes = {name: (steps[0][name] + steps[1][name]) / 2 for name in slopes}
        whole = case.formula(tapped.logits(case.base))
        order = ["a0.h0", "m0", "resid1", *(f"m{layer}" for layer in range(1, case.recipe.depth))]
        scores = {}
        for name in order:
            given = self.units.get(name, self.units["m*"])
            units, directions, rest, letter = self.parts(name, given, base)
            of_other, of_both = (self.parts(name, given, each)[0] for each in (other, both))
            change = reference(units, of_other, of_both) - units
            unmoved = -rest if case.ablation == "zero" else 0 * rest
            node = reference(base[name], other[name], both[name]) - base[name]
            rows = {f"{letter}{at}": change[..., at, None] * row for at, row in enumerate(directions)}
            rows["rest"] = unmoved + 0 * node
            if letter == "f":
                rows["error"] = node - change @ directions - unmoved
            for unit, row in rows.items():
                for group, part in enumerate(inside):
                    if method == "exact":
                        effect = case.formula(tapped.logits(case.base, {name: row * part})) - whole
                    else:
                        effect = (row * slopes[name] * part).sum(dim=(1, 2))
                    said = f"{name}.{unit}" if groups is None else f"{name}.{unit}@{groups.names[group]}"
                    scores[said] = float(effect.detach().sum()) / len(case.base)
        return scores


def check(case: Case, method: str, **options: int) -> None:
    literal = Literal(case)
    found = cv.attribute_units(case.model, case.task(), literal.units, method, progress=False, **options)
    assert_same_scores(found.to_dict(), literal.scores(method))


@settings(max_examples=8)
@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_first_order_scores_are_changes_times_slopes(case: Case) -> None:
    check(case, "eap")


@settings(max_examples=4)
@given(cases(smooth=True, max_depth=2, max_heads=1))
def test_integrated_scores_take_the_mean_slope_along_the_path(case: Case) -> None:
    check(case, "eap-ig", steps=2)


@settings(max_examples=3)
@given(cases(smooth=True, max_depth=1, max_heads=1))
def test_exact_scores_are_effects_of_ablating_a_unit_alone(case: Case) -> None:
    check(case, "exact")


@settings(max_examples=6)
@given(cases(smooth=True, max_depth=2, max_heads=2))
def test_the_units_of_a_node_sum_to_its_own_score(case: Case) -> None:
    units = Literal(case).units
    units["m0"] = units["m0"] if "m0" in units else dictionary(case.model.d_model, seed=2)
    found = cv.attribute_units(case.model, case.task(), units, batch_size=2, progress=False)
    nodes = cv.attribute_nodes(case.model, case.task(), "atp", progress=False)
    scale = max(1.0, np.abs(found.values).max())
    for row, name in enumerate(nodes.graph.senders):
        if name in found.nodes:
            own = [place for place, unit in enumerate(found.units) if unit.rpartition(".")[0] == name]
            assert found.values[own].sum(axis=0) == pytest.approx(nodes.values[row], abs=1e-9 * scale)


@pytest.mark.parametrize(
    "family",
    [
        "timm, registers",
        "timm, parallel",
        "timm, parallel and fused",
        "timm, two of each",
        "timm, pool",
        "open_clip",
        "transformers, dinov2, registers and classes",
        "transformers, siglip",
        "transformers, vivit",
    ],
)
@pytest.mark.parametrize("edited", [False, True])
def test_neurons_of_every_family_and_of_edited_models(family: str, edited: bool) -> None:
    """What is edited is another node."""
    model, original = families.made(family)
    clean, corrupt = families.FAMILIES[family].images(seed=0), families.FAMILIES[family].images(seed=1)
    run = original.nodes.run
    if edited:
        head = next(name for name in original.nodes.senders if name.endswith(".h1"))
        model = model.edit({head: lambda written: written * 0.5})
        run = original.edited({head: lambda written: written * 0.5}).run
    tapped = Tapped(run, original.neurons)
    slopes = tapped.slopes(clean, lambda logits: logits[:, 0] - logits[:, 1])
    before, after = tapped.values(clean), tapped.values(corrupt)
    task = cv.Task(clean.float(), corrupt.float(), cv.logit_diff(0, 1))
    units = dict.fromkeys(original.neurons, cv.neurons())
    found = cv.attribute_units(model, task, units, progress=False)
    assert set(found.nodes) == set(original.neurons)
    for name in original.neurons:
        expected = ((after[name] - before[name]) * slopes[name]).sum(dim=(0, 1)) / len(clean)
        scale = max(1e-6, float(expected.abs().max()))
        assert found.of(name)[:, 0] == pytest.approx(expected.numpy(), rel=1e-6, abs=1e-9 * scale)


# -- what they are, on a model that is easy to say ------------------------------------------------


@pytest.fixture(scope="module")
def small() -> Case:
    return Case(Recipe(depth=2, heads=2, width=4, registers=1), n_pairs=2)


def test_units_that_are_not_named_are_in_the_rest(small: Case) -> None:
    every = cv.attribute_units(small.model, small.task(), {"m1": cv.neurons()}, progress=False)
    few = cv.attribute_units(
        small.model, small.task(), {"m*": cv.neurons([0]), "m1": cv.neurons([7, 3])}, progress=False
    )
    assert few.units == ("m0.n0", "m0.rest", "m1.n7", "m1.n3", "m1.rest")
    assert few["m1.n3"] == every["m1.n3"]
    assert few["m1.rest"] + few["m1.n3"] + few["m1.n7"] == pytest.approx(every.values.sum())
    assert every["m1.rest"] == 0.0  # a bias is the same on both images


def test_what_is_refined_beside_changes_nothing(small: Case) -> None:
    fine = cv.models.refined(small.model, {"m0": cv.neurons([1])})
    found, expected = (
        cv.attribute_units(model, small.task(), {"m1": cv.neurons()}, progress=False).values
        for model in (fine, small.model)
    )
    assert found == pytest.approx(expected, abs=1e-11)


def test_any_object_that_encodes_and_decodes_is_a_dictionary(small: Case) -> None:
    known = dictionary(8)

    class Own:
        encode, decode = known.encode, known.decode

    found, expected = (
        cv.attribute_units(small.model, small.task(), {"m1": each}, progress=False).values
        for each in (Own(), known)
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_the_strongest_are_units(small: Case) -> None:
    task = small.task(ablation="zero", groups="kind")
    scores = cv.attribute_units(
        small.model, task, {"m*": cv.neurons(), "resid1": dictionary(8)}, progress=False
    )
    (best, score), *_ = scores.strongest(40)
    unit = re.compile(r"\.[nf]\d+(@|$)")
    assert abs(score) == max(abs(value) for name, value in scores.to_dict().items() if unit.search(name))
    assert scores[best] == score
    top = scores.top(3)
    named = zip(scores.units, np.abs(scores.values.sum(axis=1)), strict=True)
    wanted = sorted((each for each in named if unit.search(each[0])), key=lambda each: -each[1])[:3]
    letter = {"m0": "n", "m1": "n", "resid1": "f"}
    assert {f"{node}.{letter[node]}{at}" for node, numbers in top.items() for at in numbers} == dict(
        wanted
    ).keys()
    assert repr(scores).startswith("UnitScores(eap, 37 units of 3 nodes; strongest: ")
    with pytest.raises(NameNotFoundError, match="m1"):
        scores.of("m2")


@pytest.mark.parametrize(
    ("units", "options", "kind", "message"),
    [
        ({}, {}, OptionError, "asked for by node"),
        ({"m7": cv.neurons()}, {}, NameNotFoundError, "m7"),
        ({"a0.h0": cv.neurons()}, {}, NameNotFoundError, "a0.h0.hidden"),
        ({"m0": cv.neurons([16])}, {}, OptionError, "m0 has no neuron 16: it has 16, counted from 0"),
        ({"m0": "all"}, {}, OptionError, "a dictionary has encode and decode, which str has not"),
        ({"m0": dictionary(5)}, {}, OptionError, "a dictionary of width 5, and m0 has 8"),
        (
            {"a0.h0.pattern": dictionary(5)},
            {},
            OptionError,
            "a dictionary stands for what a node writes, or for a stream, not a0.h0.pattern",
        ),
        ({"m0": cv.neurons()}, {"method": "eap", "steps": 3}, OptionError, "eap takes no steps"),
        ({"m0": cv.neurons()}, {"method": "epa"}, NameNotFoundError, "did you mean 'eap'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    small: Case, units: Any, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        cv.attribute_units(small.model, small.task(), units, progress=False, **options)


def test_what_cannot_be_said_of_units_is_refused(small: Case) -> None:
    for ablation in (cv.Noise(), cv.Constants(torch.zeros(7, 1, 8))):
        with pytest.raises(OptionError, match="ablation is made for whole nodes"):
            cv.attribute_units(
                small.model, small.task(ablation=ablation), {"m0": cv.neurons()}, progress=False
            )
    edited = small.model.edit({"m0": cv.add(torch.ones(8))})
    with pytest.raises(UnsupportedModelError, match="what m0 writes is edited: it is no sum over neurons"):
        cv.attribute_units(edited, small.task(), {"m*": cv.neurons()}, progress=False)
    fine = cv.models.refined(small.model, {"m0": cv.neurons([1])})
    with pytest.raises(OptionError, match="m0 is refined already: score its units in the model before that"):
        cv.attribute_units(fine, small.task(), {"m0": cv.neurons()}, progress=False)

    class Bent:
        encode, decode = staticmethod(torch.relu), staticmethod(torch.square)

    with pytest.raises(OptionError, match="decode is not affine"):
        cv.attribute_units(small.model, small.task(), {"m0": Bent()}, progress=False)


def test_neurons_of_a_real_model(shared_data: Path) -> None:
    """Against the float64 gradient of the original module; and the ten strongest against exact effects."""
    name = "vit_tiny_patch16_224"
    model = cv.load(name, checkpoint=shared_data / "weights" / f"{name}.safetensors")
    photos = shared_data / "images" / "catdog"
    metric = cv.logit_diff("tabby", "Border collie")
    task = cv.Task(photos / "prisma_crop_dog.jpeg", photos / "prisma_crop_cat.png", metric)
    prepared = task.prepare(model)
    found = cv.attribute_units(model, prepared, {"m*": cv.neurons()}, progress=False)
    vit = copy.deepcopy(model.module).double()
    tapped = Tapped(vit, {f"m{layer}": (block.mlp.fc2, None) for layer, block in enumerate(vit.blocks)})
    clean, corrupt = (side.take(0, 1).double() for side in (prepared.clean, prepared.corrupt))
    slopes = tapped.slopes(clean, lambda logits: logits[:, 281] - logits[:, 232])
    before, after = tapped.values(clean), tapped.values(corrupt)
    for node in tapped.places:
        expected = ((after[node] - before[node]) * slopes[node]).sum(dim=(0, 1))
        assert found.of(node)[:, 0] == pytest.approx(expected.numpy(), abs=1e-3)
