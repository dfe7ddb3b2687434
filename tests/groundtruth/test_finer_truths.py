"""What is planted in single neurons, features and paths is found, exactly, by brute force and by the search.

In float64: what matters has an effect of 12 logits or half of it, and everything else less than 1e-12.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import circuitvit as cv
from circuitvit.groundtruth.planted import PATH, TEXTURES
from circuitvit.testing import active_edges

METRIC = cv.logit_diff("yes", "no")
PLANTED_IN = {
    "neuron": {
        "input->a0.h0<k>",
        "input->a0.h0<v>",
        "input->a0.h1<k>",
        "input->a0.h1<v>",
        "a0.h0->m1.n7",
        "a0.h1->m1.n7",
        "m1.n7->logits",
    },
    "superposition": {
        "input->m0.f0",
        "m0.f0->m1",
        "input->a2.h0<k>",
        "m1->a2.h0<v>",
        "a2.h0->logits",
    },
    "path": {
        "input->a0.h0<v>",
        "a0.h0[A]->a1.h0<v>",
        "a1.h0[B]->logits",
        "input->a0.h1<v>",
        "a0.h1[C]->logits",
    },
}


@pytest.fixture(scope="module", params=PLANTED_IN)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def found(name: str) -> cv.Compiled:
    return cv.compiled(name, dtype=torch.float64)


def task_of(found: cv.Compiled, **options: object) -> cv.Task:
    """A pair of each change."""
    return cv.Task(*found.pairs(len(found.changes)), metric=METRIC, **options)  # type: ignore[arg-type]


def groups() -> cv.TokenGroups:
    """The class token, the three patches of the paths, and all others."""
    members = torch.full((10,), 4)
    members[0] = 0
    for number, patch in enumerate(PATH.values(), start=1):
        members[1 + patch] = number
    return cv.TokenGroups(("cls", *PATH, "other"), members)


def finer(found: cv.Compiled) -> cv.Model:
    """The model with what is planted in it as nodes, chosen by gradients where there is a choice."""
    task = task_of(found)
    if found.name == "neuron":
        return cv.refine_nodes(found.model, {"m*": cv.neurons()}, top=1, task=task, progress=False)
    if found.name == "superposition":
        return cv.refine_nodes(found.model, {"m0": found.dictionary()}, top=5, task=task, progress=False)
    return cv.split_sources(found.model, groups(), ["a0.h0", "a0.h1", "a1.h0"])


def test_by_brute_force_nothing_else_matters(name: str, found: cv.Compiled) -> None:
    assert set(active_edges(finer(found), task_of(found), at_least=1e-12)) == PLANTED_IN[name]


def test_find_gives_exactly_that(name: str, found: cv.Compiled) -> None:
    assert set(cv.find(finer(found), task_of(found), progress=False).circuit) == PLANTED_IN[name]


def test_states_keep_mean_0_and_length_whatever_is_on(found: cv.Compiled) -> None:
    stream = found.model.embed(torch.cat(found.pairs(6)).double())
    for stage in found.model.layers:
        assert float(stream.mean(dim=-1).abs().max()) < 1e-12
        assert float((stream.var(dim=-1, correction=0) - 1).abs().max()) < 1e-12
        stream = stream + stage.total(stage.write(stage.read(stream)))


# -- the neuron ------------------------------------------------------------------------------------------


def test_other_neurons_are_as_active_and_two_of_them_cancel() -> None:
    found = cv.compiled("neuron", dtype=torch.float64)
    task = task_of(found)
    hidden = found.model.activations(task.clean, "m1.hidden", tokens="cls", progress=False)["m1.hidden"]
    assert (hidden[:, 0, :10] > 0.9).all()
    scores = cv.attribute_units(found.model, task, {"m*": cv.neurons()}, "exact", progress=False)
    effects = {unit: score for unit, score in scores.to_dict().items() if abs(score) > 1e-12}
    assert effects == pytest.approx({"m1.n5": -6, "m1.n6": 6, "m1.n7": -12})
    every = cv.refine_nodes(found.model, {"m1": cv.neurons(range(10))})
    assert set(cv.find(every, task, progress=False).circuit) == PLANTED_IN["neuron"]


# -- the path --------------------------------------------------------------------------------------------


def test_denoising_shows_the_same_path() -> None:
    found = cv.compiled("path", dtype=torch.float64)
    task = task_of(found, direction="denoising")
    assert set(active_edges(finer(found), task, at_least=1e-12)) == PLANTED_IN["path"]


# -- features in superposition ---------------------------------------------------------------------------


def test_five_features_lie_in_three_dimensions_with_known_interference() -> None:
    found = cv.compiled("superposition", dtype=torch.float64)
    dictionary = found.dictionary()
    directions = dictionary.decoder / dictionary.decoder.norm(dim=1, keepdim=True)
    assert int(torch.linalg.matrix_rank(directions)) == 3
    cosines = (directions @ directions.T)[~torch.eye(5, dtype=torch.bool)]
    torch.testing.assert_close(cosines.abs(), torch.full((20,), 5**-0.5, dtype=torch.float64))

    images, _ = found.pairs(6)
    written = found.model.activations(images, "m0", progress=False)["m0"]
    features = dictionary.encode(written)
    shown = [found.program.pixels.index(texture) for texture in TEXTURES]
    textures = images[:, shown, ::2, ::2].flatten(2).transpose(1, 2)  # +1 where a patch has it
    torch.testing.assert_close(features[:, 1:], (textures.double() + 1) / 2)
    assert not features[:, 0].any()
    assert float((dictionary.decode(features) - written).abs().max()) < 1e-12


def rotated(dictionary: cv.Dictionary, turn: torch.Tensor) -> cv.Dictionary:
    return replace(dictionary, encoder=dictionary.encoder @ turn, decoder=dictionary.decoder @ turn)


def test_a_dictionary_that_is_rotated_leaves_the_effect_in_its_error() -> None:
    found = cv.compiled("superposition", dtype=torch.float64)
    drawn = torch.randn(48, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wrong = rotated(found.dictionary(), torch.linalg.qr(drawn).Q)
    model = cv.refine_nodes(found.model, {"m0": cv.features(wrong, range(5))})
    scores = cv.attribute_units(found.model, task_of(found), {"m0": wrong}, "exact", progress=False)
    effects = {unit: score for unit, score in scores.to_dict().items() if abs(score) > 1e-12}
    assert effects == pytest.approx({"m0.error": -6})  # of the pairs, one has its dots elsewhere
    expected = {edge.replace("m0.f0", "m0.error") for edge in PLANTED_IN["superposition"]}
    assert set(cv.find(model, task_of(found), progress=False).circuit) == expected


def test_a_dictionary_between_the_directions_misses_what_can_be_calculated() -> None:
    """Turned by half a step around their axis, directions are seen as two that lie beside them."""
    found = cv.compiled("superposition", dtype=torch.float64)
    true, turn = found.dictionary(), math.pi / 5
    around = torch.linalg.svd(true.decoder - true.decoder.mean(dim=0)).Vh[:2]
    within = torch.tensor([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]])
    half_step = torch.eye(48).double() + around.T @ (within.double() - torch.eye(2)) @ around
    wrong = rotated(true, half_step)

    written = true.decoder[:1]  # where the first of them is on
    features = wrong.encode(written)
    seen = (1 + 4 * math.cos(turn)) / 5
    assert sorted(features[0].tolist()) == pytest.approx([0, 0, 0, seen, seen])
    missed = (written - wrong.decode(features)).square().sum() / written.square().sum()
    assert float(missed) == pytest.approx(1 - 2 * seen**2 * (1 - 5**-0.5))
    model = cv.refine_nodes(found.model, {"m0": cv.features(wrong, range(5))})
    assert "m0.error->m1" in cv.find(model, task_of(found), progress=False).circuit


def test_only_superposed_features_have_a_dictionary() -> None:
    with pytest.raises(cv.CircuitViTError, match="path has no features in superposition"):
        cv.compiled("path").dictionary()
